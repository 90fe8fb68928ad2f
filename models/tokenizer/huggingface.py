"""The vocabulary of a tokenizer.json, through the `tokenizers` package."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from ...kernels.common.errors import InputError, quoted
from ..common.wrap_errors import guarded
from .backend import Found, Place
from .detokenizer import ByteLevel, Detokenizer, Window

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

NEVER_TRAINED = "\U0010ffff"
"""A code point that is no character."""
UNREADABLE, UNWRITABLE = "tokenizer.json fails to cut a text", "tokenizer.json fails to make a text of tokens"


class JsonVocabulary:
    """A `Vocabulary` over `tokenizers.Tokenizer`."""

    def __init__(self, backend: Backend) -> None:
        backend.no_truncation()  # a tokenizer saved after training would cut long prompts without a word
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self.kind = type(backend.model).__name__
        self.size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.added = {token.content: index for index, token in added.items()}
        self.unknown = _unknown(backend)
        self._then = {
            index: Place.AFTER_NORMALIZED if token.normalized else Place.AFTER_TOKEN
            for index, token in added.items()
            if index not in self.unknown
        }
        self.named: dict[str, str] = {}
        self._backend = backend
        self._decoder = backend.decoder
        self._special = {token.content for token in added.values() if token.special}
        self._pipelines = {Place.START: backend}
        self.ends = self._ends()

    @classmethod
    def from_file(cls, path: Path, added: Iterable[tuple[AddedToken, int | None]] = ()) -> JsonVocabulary:
        """The vocabulary of a file, and the tokens that other files of its folder add to it.

        Raises InputError when the file is broken, or numbers a token otherwise than those files do.
        """
        with guarded(f"{str(path)!r} is no tokenizer that can be read; fetch the model folder again"):
            return cls(cls._with(Backend.from_file(str(path)), path, added))

    @staticmethod
    def _with(backend: Backend, path: Path, added: Iterable[tuple[AddedToken, int | None]]) -> Backend:
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        for token, index in added:
            if token.content in known or (index is None and backend.token_to_id(token.content) is None):
                continue
            backend.add_tokens([token])
            if index is not None and (own := backend.token_to_id(token.content)) != index:
                raise InputError(
                    f"the token {quoted(token.content)} has id {own} by {path.name} and id {index} by the "
                    "files beside it; they must agree"
                )
        return backend

    def encode(self, text: str) -> list[int]:
        with guarded(UNREADABLE):
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def read(self, text: str) -> tuple[list[int], list[Found]]:
        with guarded(UNREADABLE):
            encoding = self._backend.encode(text, add_special_tokens=False)
        found: list[Found] = []
        since: list[int] = []  # ids since the last of them
        for index, offsets in zip(encoding.ids, encoding.offsets, strict=True):
            if index in self._then:
                found.append(Found(*offsets, index, self._then[index], tuple(since)))
                since = []
            else:
                since.append(index)
        return encoding.ids, found

    def ordinary(self, text: str, place: Place) -> list[int]:
        with guarded(UNREADABLE):
            pipeline = self._pipeline(place)
            if pipeline.normalizer is not None:
                text = pipeline.normalizer.normalize_str(text)
            pieces = [text]
            if pipeline.pre_tokenizer is not None:
                pieces = [piece for piece, _ in pipeline.pre_tokenizer.pre_tokenize_str(text)]
            model = self._backend.model
            return [token.id for piece in pieces for token in model.tokenize(piece)]

    def normalized(self, text: str) -> str:
        normalizer = self._backend.normalizer
        with guarded(UNREADABLE):
            return text if normalizer is None else str(normalizer.normalize_str(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        with guarded(UNWRITABLE):
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        def tokens(ids: Sequence[int]) -> list[str]:
            return self.tokens(ids, skip_special_tokens)

        steps = [] if self._decoder is None else _flat(_state(self._decoder))
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return ByteLevel(tokens)
        anchor = next((c for c in "aeiou01" if self.join([c]) == c), "") if _is_local(steps) else ""
        if not anchor:
            return Window(tokens, self.join, lambda token: True, anchor)
        has_bytes = any(step["type"] == "ByteFallback" for step in steps)
        return Window(tokens, self.join, _may_be_byte if has_bytes else lambda token: False, anchor)

    def tokens(self, ids: Sequence[int], skip_special_tokens: bool) -> list[str]:
        """The vocabulary entries that `decode` makes its text of."""
        found = (self._backend.id_to_token(index) for index in ids)
        return [t for t in found if t is not None and not (skip_special_tokens and t in self._special)]

    def join(self, tokens: list[str]) -> str:
        """The text of vocabulary entries: `decode` is this of `tokens`."""
        with guarded(UNWRITABLE):
            return " ".join(tokens) if self._decoder is None else str(self._decoder.decode(tokens))

    def id_of(self, token: str) -> int | None:
        index: int | None = self._backend.token_to_id(token)
        return index

    def token_of(self, index: int) -> str | None:
        token: str | None = self._backend.id_to_token(index)
        return token

    def _ends(self) -> tuple[list[int], list[int]]:
        plain, full = self.encode("a"), self._backend.encode("a", add_special_tokens=True).ids
        starts = (i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain)
        start = next(starts, len(full))
        return full[:start], full[start + len(plain) :]

    def _pipeline(self, place: Place) -> Backend:
        """What normalises and pre-tokenizes text at this place; only the prefix space differs."""
        if place not in self._pipelines:
            steps = {"normalizer": self._backend.normalizer, "pre_tokenizer": self._backend.pre_tokenizer}
            moved = {n: None if step is None else _moved(_state(step), place) for n, step in steps.items()}
            model = {"type": "BPE", "vocab": {}, "merges": []}
            whole: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": model, **moved}
            self._pipelines[place] = Backend.from_str(json.dumps(whole))
        return self._pipelines[place]


def _state(component: Any) -> dict[str, Any]:
    """A component as tokenizer.json has it."""
    found: dict[str, Any] = json.loads(component.__getstate__())
    return found


def _moved(step: dict[str, Any], place: Place) -> dict[str, Any]:
    """A normaliser or pre-tokenizer as it works away from the start of a text."""
    inner = next((key for key in ("normalizers", "pretokenizers") if key in step), None)
    if inner is not None:
        return {**step, inner: [_moved(each, place) for each in step[inner]]}
    if step.get("prepend_scheme") == "first":
        return {**step, "prepend_scheme": "never"}
    if place is Place.AFTER_TOKEN:
        return step
    if step["type"] == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    if place is Place.AFTER_NORMALIZED:
        return step
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return {**step, **{key: value for key, value in never.items() if key in step}}


def _unknown(backend: Backend) -> set[int]:
    """What a character becomes that no text has; of use only where it is an added token, such as "<unk>"."""
    try:
        return {token.id for token in backend.model.tokenize(NEVER_TRAINED)}
    except Exception:  # the library raises plain Exception where there is no unknown token
        return set()


def _is_local(steps: list[dict[str, Any]]) -> bool:
    """Whether no step lets a token change the text of one before it, byte runs aside."""
    types = [step["type"] for step in steps]
    fuse = types.index("Fuse") if "Fuse" in types else len(steps)
    return all(map(_keeps_to_tokens, steps[:fuse])) and all(map(_keeps_to_characters, steps[fuse + 1 :]))


def _keeps_to_tokens(step: dict[str, Any]) -> bool:
    return step["type"] in ("Replace", "ByteFallback", "Metaspace", "Strip", "WordPiece")


def _keeps_to_characters(step: dict[str, Any]) -> bool:
    """Of a step that sees the whole text, after Fuse: whether it can be done as the text grows."""
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1
    return bool(step["type"] == "Fuse" or (step["type"] == "Strip" and step["stop"] == 0))


def _may_be_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flat(inner)]
