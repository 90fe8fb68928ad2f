"""A tokenizer.model: its pieces, of which kind each is, and how text is cut into them."""

from __future__ import annotations

from typing import Any

from sentencepiece import SentencePieceProcessor

from .protobuf import fields

SPACE = "▁"
PIECE, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3  # fields of a ModelProto
TYPE, MODEL_TYPE, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES = 3, 3, 3, 4  # fields of these
CONTROL, USER_DEFINED = 3, 4  # types of a piece
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "words", 4: "characters"}
PREFIX, NO_PREFIX = b"\x1a\x02\x18\x01", b"\x1a\x02\x18\x00"
"""A ModelProto of ADD_DUMMY_PREFIX alone. Put after another it overrules it: the last value counts."""


class SentencePieceModel:
    """The model in the bytes of a file.

    prefix:        whether a space is put before a text; None leaves it to the model.
    kind:          "unigram" or "BPE".
    pieces:        texts by id, "▁" for a space.
    control:       symbols that no text is cut into.
    user_defined:  symbols that every text is cut at.

    Raises whatever the package raises when the bytes are no model.
    """

    def __init__(self, content: bytes, prefix: bool | None = None) -> None:
        if prefix is not None:
            content += PREFIX if prefix else NO_PREFIX
        self._full = SentencePieceProcessor(model_proto=content)
        self._bare = SentencePieceProcessor(model_proto=content + NO_PREFIX)
        parts = list(fields(content))
        types = [dict(fields(piece)).get(TYPE) for number, piece in parts if number == PIECE]
        normalizer = _merged(parts, NORMALIZER_SPEC)
        self._squeezes = bool(normalizer.get(REMOVE_EXTRA_WHITESPACES, True))
        self._strips = self._squeezes or bool(normalizer.get(ADD_DUMMY_PREFIX, True))
        self._unknown_text: str = self._full.decode([self._full.unk_id()])
        self.kind = MODEL_TYPES.get(_merged(parts, TRAINER_SPEC).get(MODEL_TYPE, 1), "of an unknown kind")
        self.pieces: list[str] = [self._full.id_to_piece(index) for index in range(len(self._full))]
        self.control = [piece for piece, kind in zip(self.pieces, types, strict=True) if kind == CONTROL]
        self.user_defined = [p for p, kind in zip(self.pieces, types, strict=True) if kind == USER_DEFINED]
        self._bytes = {
            index: bytes([int(piece[3:5], 16)])
            for index, piece in enumerate(self.pieces)
            if self._full.is_byte(index)
        }
        self.unknown: int = self._full.unk_id()
        self.bos, self.eos = self._named(self._full.bos_id()), self._named(self._full.eos_id())

    def encode(self, text: str, prefix: bool) -> list[int]:
        """Ids of a text. The space before it, where the model puts one, can be left out."""
        ids: list[int] = (self._full if prefix else self._bare).encode(text)
        return ids

    def normalized(self, text: str) -> str:
        """The text in the Unicode form and with the spaces that it is cut in."""
        return str(self._bare.normalize(text)).replace(SPACE, " ")

    def byte(self, index: int) -> bytes | None:
        """The byte that a piece stands for, None where it stands for a text."""
        return self._bytes.get(index)

    def text(self, index: int, first: bool) -> tuple[str, bool]:
        """The text of a piece, "" where there is none, and whether the next is still the first.

        The first one loses the space that was put before the text.
        """
        if not 0 <= index < len(self.pieces):
            return "", first
        if index == self.unknown:
            return self._unknown_text, False
        piece = self.pieces[index]
        strip = first and self._strips and piece.startswith(SPACE)
        text = piece[strip:].replace(SPACE, " ")
        return text, first and not text and (self._squeezes or not strip)

    def _named(self, index: int) -> str:
        return self.pieces[index] if index >= 0 else ""


def _merged(parts: list[tuple[int, Any]], number: int) -> dict[int, Any]:
    """A message within a message, all its occurrences together."""
    return dict(fields(b"".join(part for found, part in parts if found == number)))
