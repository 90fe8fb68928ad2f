"""The vocabulary of a tokenizer.model, and of what other files of its folder add to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken

from ..common.wrap_errors import guarded
from .added_token_matcher import Splitter
from .backend import Place, spliced
from .detokenizer import Pieces
from .sentencepiece_model import SentencePieceModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from .backend import Found
    from .detokenizer import Detokenizer

UNREADABLE = "tokenizer.model fails to cut a text"


class SentencePieceVocabulary:
    """A `Vocabulary` over a SentencePiece model.

    A text without added tokens is cut as `sentencepiece` cuts it. Added tokens are the model's control and
    user-defined symbols, and what other files add. All but the user-defined symbols cut the text, and what
    stands between them is encoded by itself.

    legacy: whether a space is put not only before the text but after each of those tokens too, as the flag of
    that name in tokenizer_config.json says. A folder without it is from before the flag, when this was so.
    transformers 5 takes a missing flag for false, and puts no space before a text that begins with one.
    """

    def __init__(
        self,
        model: SentencePieceModel,
        added: Iterable[tuple[AddedToken, int | None]] = (),
        legacy: bool = True,
    ) -> None:
        self._model = model
        self._ids = {piece: index for index, piece in enumerate(model.pieces)}
        self._prefixed = {Place.START, Place.AFTER_TOKEN} if legacy else {Place.START}
        tokens = {text: (AddedToken(text, special=True), self._ids[text]) for text in model.control}
        for token, index in added:
            own = self._ids.get(token.content) if index is None else index
            if own is not None:
                tokens[token.content] = (token, own)
        cuts = [(token, index, Place.AFTER_TOKEN) for token, index in tokens.values()]
        symbols = [text for text in model.user_defined if text not in tokens]
        self._cuts = Splitter(cuts)
        self._all = Splitter(cuts + [(AddedToken(text), self._ids[text], Place.WITHIN) for text in symbols])
        self._tokens = {index: token for token, index in tokens.values()}
        self.added = {text: index for text, (_, index) in tokens.items()} | {s: self._ids[s] for s in symbols}
        self.kind = f"SentencePiece {model.kind}"
        self.size = max(len(model.pieces), *(index + 1 for index in self._tokens), 0)
        self.unknown = {model.unknown}
        self.named = {"bos_token": model.bos, "eos_token": model.eos}
        self.ends: tuple[list[int], list[int]] = ([self._ids[model.bos]] if model.bos else [], [])

    @classmethod
    def from_file(
        cls,
        path: Path,
        added: Iterable[tuple[AddedToken, int | None]] = (),
        prefix: bool | None = None,
        legacy: bool = True,
    ) -> SentencePieceVocabulary:
        """The vocabulary of a file. `prefix` overrules the model on whether a space is put before a text.

        Raises InputError when the file is broken.
        """
        with guarded(f"{str(path)!r} is no SentencePiece model that can be read; fetch the folder again"):
            return cls(SentencePieceModel(path.read_bytes(), prefix), added, legacy)

    def encode(self, text: str) -> list[int]:
        return spliced(text, self._cuts.find(text), self.ordinary)

    def read(self, text: str) -> tuple[list[int], list[Found]]:
        return self.encode(text), self._all.find(text)

    def ordinary(self, text: str, place: Place) -> list[int]:
        with guarded(UNREADABLE):
            return self._model.encode(text, place in self._prefixed)

    def normalized(self, text: str) -> str:
        with guarded(UNREADABLE):
            return self._model.normalized(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        stream = self.detokenizer(skip_special_tokens)
        return stream.push(ids) + stream.finish()

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        def text(index: int, first: bool) -> tuple[str, bool]:
            token = self._tokens.get(index)
            if token is None:
                return self._model.text(index, first)
            shown = "" if token.special and skip_special_tokens else token.content
            return shown, first and not shown

        return Pieces(text, lambda index: None if index in self._tokens else self._model.byte(index))

    def id_of(self, token: str) -> int | None:
        return self.added.get(token, self._ids.get(token))

    def token_of(self, index: int) -> str | None:
        if index in self._tokens:
            return str(self._tokens[index].content)
        return self._model.pieces[index] if 0 <= index < len(self._model.pieces) else None
