"""A SentencePiece model: its pieces, their types, and text encoding."""

from __future__ import annotations

from typing import Any

from sentencepiece import SentencePieceProcessor

from .protobuf import parse_fields

SPACE = "▁"
PIECE, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3  # fields of a ModelProto
TYPE, MODEL_TYPE, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES = 3, 3, 3, 4  # fields of the embedded messages
CONTROL, USER_DEFINED = 3, 4  # types of a piece
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "words", 4: "characters"}
ADD_PREFIX_PROTO, NO_PREFIX_PROTO = b"\x1a\x02\x18\x01", b"\x1a\x02\x18\x00"
"""A ModelProto of ADD_DUMMY_PREFIX only. Appended to another, it overrides it: the last value counts."""


class SentencePieceModel:
    """A model from the bytes of its file.

    add_prefix:            whether to add a space before a text; None uses the model's setting.
    kind:                  "unigram", "BPE", "words" or "characters".
    pieces:                texts by id, with "▁" for a space.
    control_symbols:       symbols that no text is encoded to.
    user_defined_symbols:  symbols that every text is split at.

    Raises the exceptions of `sentencepiece` when the bytes are not a model.
    """

    def __init__(self, model_proto: bytes, add_prefix: bool | None = None) -> None:
        if add_prefix is not None:
            model_proto += ADD_PREFIX_PROTO if add_prefix else NO_PREFIX_PROTO
        self._processor = SentencePieceProcessor(model_proto=model_proto)
        self._no_prefix_processor = SentencePieceProcessor(model_proto=model_proto + NO_PREFIX_PROTO)
        model_fields = list(parse_fields(model_proto))
        piece_types = [
            dict(parse_fields(piece)).get(TYPE)
            for field_number, piece in model_fields
            if field_number == PIECE
        ]
        normalizer = _merge_messages(model_fields, NORMALIZER_SPEC)
        self._removes_extra_spaces = bool(normalizer.get(REMOVE_EXTRA_WHITESPACES, True))
        self._strips_first_space = self._removes_extra_spaces or bool(normalizer.get(ADD_DUMMY_PREFIX, True))
        self._unk_text: str = self._processor.decode([self._processor.unk_id()])
        self.kind = MODEL_TYPES.get(
            _merge_messages(model_fields, TRAINER_SPEC).get(MODEL_TYPE, 1), "of an unknown type"
        )
        self.pieces: list[str] = [self._processor.id_to_piece(index) for index in range(len(self._processor))]
        self.control_symbols = [
            piece for piece, piece_type in zip(self.pieces, piece_types, strict=True) if piece_type == CONTROL
        ]
        self.user_defined_symbols = [
            piece for piece, kind in zip(self.pieces, piece_types, strict=True) if kind == USER_DEFINED
        ]
        self._byte_by_id = {
            index: bytes([int(piece[3:5], 16)])
            for index, piece in enumerate(self.pieces)
            if self._processor.is_byte(index)
        }
        self.unk_id: int = self._processor.unk_id()
        self.bos_token, self.eos_token = (
            self._piece_or_empty(self._processor.bos_id()),
            self._piece_or_empty(self._processor.eos_id()),
        )

    def encode(self, text: str, add_prefix: bool) -> list[int]:
        """Encode a text. `add_prefix` False omits the space that the model adds before a text."""
        ids: list[int] = (self._processor if add_prefix else self._no_prefix_processor).encode(text)
        return ids

    def normalize(self, text: str) -> str:
        """Normalize Unicode and spaces as before encoding, without a prefix space."""
        return str(self._no_prefix_processor.normalize(text)).replace(SPACE, " ")

    def piece_byte(self, piece_id: int) -> bytes | None:
        """Return the byte of a byte piece, None for other pieces."""
        return self._byte_by_id.get(piece_id)

    def piece_text(self, piece_id: int, at_start: bool) -> tuple[str, bool]:
        """Return the text of a piece, "" for an invalid id, and whether the next is still at the start.

        The prefix space is removed from the first piece.
        """
        if not 0 <= piece_id < len(self.pieces):
            return "", at_start
        if piece_id == self.unk_id:
            return self._unk_text, False
        piece = self.pieces[piece_id]
        strip = at_start and self._strips_first_space and piece.startswith(SPACE)
        text = piece[strip:].replace(SPACE, " ")
        return text, at_start and not text and (self._removes_extra_spaces or not strip)

    def _piece_or_empty(self, piece_id: int) -> str:
        return self.pieces[piece_id] if piece_id >= 0 else ""


def _merge_messages(model_fields: list[tuple[int, Any]], field_number: int) -> dict[int, Any]:
    """Parse an embedded message, with all its occurrences merged."""
    return dict(parse_fields(b"".join(message for number, message in model_fields if number == field_number)))
