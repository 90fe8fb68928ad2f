"""Tokenizer backend for tokenizer.model (SentencePiece), with the added tokens of other files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken

from ..common.wrap_errors import wrap_errors
from .added_token_matcher import AddedTokenMatcher
from .backend import TextPosition, encode_segments
from .detokenizer import SentencePieceDetokenizer
from .sentencepiece_model import SentencePieceModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from .backend import AddedTokenMatch
    from .detokenizer import Detokenizer

ENCODE_ERROR = "tokenizer.model cannot encode the text"


class SentencePieceBackend:
    """A `TokenizerBackend` over a SentencePiece model.

    A text without added tokens is encoded as by `sentencepiece`. Added tokens are the model's control and
    user-defined symbols, and the added tokens of other files. All except the user-defined symbols split the
    text, and each segment between them is encoded separately.

    legacy: whether a space is added not only before the text but also after each of those tokens: the flag of
    that name in tokenizer_config.json. A folder without the flag predates it, when this was the behaviour.
    transformers 5 treats a missing flag as false, and adds no space before a text that starts with one.
    """

    def __init__(
        self,
        model: SentencePieceModel,
        added: Iterable[tuple[AddedToken, int | None]] = (),
        legacy: bool = True,
    ) -> None:
        self._model = model
        self._piece_ids = {piece: token_id for token_id, piece in enumerate(model.pieces)}
        self._prefixed_positions = (
            {TextPosition.START, TextPosition.AFTER_TOKEN} if legacy else {TextPosition.START}
        )
        tokens = {
            text: (AddedToken(text, special=True), self._piece_ids[text]) for text in model.control_symbols
        }
        for token, index in added:
            added_id = self._piece_ids.get(token.content) if index is None else index
            if added_id is not None:
                tokens[token.content] = (token, added_id)
        split_tokens = [(token, index, TextPosition.AFTER_TOKEN) for token, index in tokens.values()]
        symbols = [text for text in model.user_defined_symbols if text not in tokens]
        self._split_matcher = AddedTokenMatcher(split_tokens)
        self._full_matcher = AddedTokenMatcher(
            split_tokens
            + [(AddedToken(text), self._piece_ids[text], TextPosition.WITHIN) for text in symbols]
        )
        self._added_by_id = {index: token for token, index in tokens.values()}
        self.added_tokens = {text: index for text, (_, index) in tokens.items()} | {
            symbol: self._piece_ids[symbol] for symbol in symbols
        }
        self.kind = f"SentencePiece {model.kind}"
        self.vocab_size = max(len(model.pieces), *(index + 1 for index in self._added_by_id), 0)
        self.unk_ids = {model.unk_id}
        self.special_tokens = {"bos_token": model.bos_token, "eos_token": model.eos_token}
        self.bos_eos_ids: tuple[list[int], list[int]] = (
            [self._piece_ids[model.bos_token]] if model.bos_token else [],
            [],
        )

    @classmethod
    def from_file(
        cls,
        path: Path,
        added: Iterable[tuple[AddedToken, int | None]] = (),
        add_prefix: bool | None = None,
        legacy: bool = True,
    ) -> SentencePieceBackend:
        """Load a tokenizer.model. `add_prefix` overrides whether the model adds a space before a text.

        Raises InputError when the file is corrupt.
        """
        with wrap_errors(f"{str(path)!r} is a corrupt SentencePiece model; fetch the folder again"):
            return cls(SentencePieceModel(path.read_bytes(), add_prefix), added, legacy)

    def encode(self, text: str) -> list[int]:
        return encode_segments(text, self._split_matcher.find_matches(text), self.encode_plain)

    def encode_with_matches(self, text: str) -> tuple[list[int], list[AddedTokenMatch]]:
        return self.encode(text), self._full_matcher.find_matches(text)

    def encode_plain(self, text: str, position: TextPosition) -> list[int]:
        with wrap_errors(ENCODE_ERROR):
            return self._model.encode(text, position in self._prefixed_positions)

    def normalize(self, text: str) -> str:
        with wrap_errors(ENCODE_ERROR):
            return self._model.normalize(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        detokenizer = self.detokenizer(skip_special_tokens)
        return detokenizer.step(ids) + detokenizer.flush()

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        def piece_text(token_id: int, at_start: bool) -> tuple[str, bool]:
            token = self._added_by_id.get(token_id)
            if token is None:
                return self._model.piece_text(token_id, at_start)
            text = "" if token.special and skip_special_tokens else token.content
            return text, at_start and not text

        return SentencePieceDetokenizer(
            piece_text, lambda index: None if index in self._added_by_id else self._model.piece_byte(index)
        )

    def token_to_id(self, token: str) -> int | None:
        return self.added_tokens.get(token, self._piece_ids.get(token))

    def id_to_token(self, token_id: int) -> str | None:
        if token_id in self._added_by_id:
            return str(self._added_by_id[token_id].content)
        return self._model.pieces[token_id] if 0 <= token_id < len(self._model.pieces) else None

    def token_bytes(self, token_id: int) -> bytes | None:
        return None if token_id in self._added_by_id else self._model.piece_byte(token_id)
