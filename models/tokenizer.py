"""Text to token ids and back: the checkpoint's tokenizer, text as it streams, and stop strings."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tokenizers import Tokenizer as Backend

from ..kernels.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no file. Raises InputError when it holds anything else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); fetch the model folder again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a JSON {type(found).__name__}; it must be an object")
    return found


class Tokenizer:
    """A tokenizer as its tokenizer.json describes it, and the special tokens that chats are built with.

    vocab_size:        number of ids with added tokens: the largest id + 1.
    eos_token_ids:     ids that end an answer, () where the model names none.
    bos_token, eos_token: their texts, "" where the model has none.
    prefix_token_ids:  what the tokenizer itself puts before a text when asked to, mostly BOS or nothing.
    """

    def __init__(
        self, backend: Backend, bos_token: str = "", eos_token: str = "", eos_token_ids: Sequence[int] = ()
    ) -> None:
        backend.no_truncation()  # a tokenizer saved after training would cut long prompts without a word
        backend.no_padding()
        self._backend = backend
        self._decoder = backend.decoder
        self._special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.eos_token_ids = tuple(eos_token_ids) or self._ids_of(eos_token)
        self.prefix_token_ids = self._prefix()

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a model folder. Raises InputError when tokenizer.json is missing or broken."""
        folder = Path(folder)
        backend = _load(folder)
        generation, config = read_json(folder / "generation_config.json"), read_json(folder / "config.json")
        bos, eos = (
            _special_token(folder, backend, name, generation, config) for name in ("bos_token", "eos_token")
        )
        ids = _eos_ids(folder / "generation_config.json", generation) or _eos_ids(
            folder / "config.json", config
        )
        return cls(backend, bos, eos, ids)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text. Special tokens written out in it are read as such.

        Raises InputError when the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            wrong = f"\\u{ord(text[error.start]):04x} at character {error.start}"
            raise InputError(
                f"the text holds the lone surrogate {wrong}; it must be valid Unicode"
            ) from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids without a token, such as padding rows of the LM head, are skipped."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def tokens(self, ids: Sequence[int], skip_special_tokens: bool) -> list[str]:
        """The vocabulary entries that `decode` makes its text of."""
        found = (self._backend.id_to_token(index) for index in ids)
        return [t for t in found if t is not None and not (skip_special_tokens and t in self._special)]

    def join(self, tokens: list[str]) -> str:
        """The text of vocabulary entries: `decode` is this of `tokens`."""
        return " ".join(tokens) if self._decoder is None else self._decoder.decode(tokens)

    def decoder_steps(self) -> list[dict[str, Any]]:
        """The steps from vocabulary entries to text, as tokenizer.json has them."""
        return [] if self._decoder is None else _flat(json.loads(self._decoder.__getstate__()))

    def _ids_of(self, token: str) -> tuple[int, ...]:
        index = self._backend.token_to_id(token) if token else None
        return () if index is None else (index,)

    def _prefix(self) -> list[int]:
        plain, full = self.encode("a"), self.encode("a", add_special_tokens=True)
        starts = range(len(full) - len(plain) + 1)
        return full[: next((i for i in starts if full[i : i + len(plain)] == plain), 0)]


class Detokenizer:
    """The text of an answer while its tokens arrive.

    What `push` and `finish` return, joined, is `decode` of all ids, exactly. What was returned never changes,
    so text is held back while a token to come could still alter it. Byte-level tokenizers hold at most an
    unfinished character. Byte-fallback ones hold a run of byte tokens until it ends, for one bad byte turns
    all of the run into U+FFFD. Each token is decoded once. For a decoder that rewrites across tokens (CTC,
    end-of-word suffixes) nothing is final before the end, and `finish` returns it all.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = _stream(tokenizer)

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next tokens, returns the text that has become final."""
        return self._stream.push(self._tokenizer.tokens(ids, self._skip))

    def finish(self) -> str:
        """The text still held back, to be called once; bytes that are no character become U+FFFD."""
        return self._stream.finish()


class StopStrings:
    """Finds the first stop text in a growing text, wherever the pieces it comes in are cut.

    The text ends at the earliest match; of two that start at the same place, at the one completed first. A
    match waits while another that starts before it may still be completed. `include` keeps the stop text
    itself. `hit` tells whether the text has ended, also after `finish`. Raises InputError when a stop text
    is empty.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if "" in self._stops:
            raise InputError("a stop text is ''; it must not be empty")
        self._include = include
        self._held = ""
        self.hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes more text; returns the text that may be shown now, and whether it ends there."""
        if self.hit:
            return "", True
        text = self._held + text
        unfinished = min((_unfinished(text, stop) for stop in self._stops), default=len(text))
        start, end = self._earliest(text)
        if start <= unfinished and end:
            return self._cut(text, start, end), True
        self._held = text[unfinished:]
        return text[:unfinished], False

    def finish(self) -> str:
        """The text still held back, when no more will come."""
        start, end = self._earliest(self._held)
        if end:
            return self._cut(self._held, start, end)
        held, self._held = self._held, ""
        return held

    def _cut(self, text: str, start: int, end: int) -> str:
        self.hit, self._held = True, ""
        return text[: end if self._include else start]

    def _earliest(self, text: str) -> tuple[int, int]:
        """Start and end of the earliest match, (0, 0) where there is none."""
        places = ((text.find(stop), len(stop)) for stop in self._stops)
        return min(((at, at + size) for at, size in places if at >= 0), default=(0, 0))


def _unfinished(text: str, stop: str) -> int:
    """Where the longest tail of `text` begins that is a beginning of `stop`, but not all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return at if at >= 0 else len(text)


class _Stream(Protocol):
    def push(self, tokens: list[str]) -> str: ...

    def finish(self) -> str: ...


class _Bytes:
    """Byte-level BPE: every token stands for bytes, and the text is their UTF-8."""

    def __init__(self) -> None:
        self._byte = _byte_of_character()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: list[str]) -> str:
        return self._utf8.decode(b"".join(map(self._bytes, tokens)))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token: str) -> bytes:
        try:
            return bytes([self._byte[character] for character in token])
        except KeyError:  # an added token is written as it reads
            return token.encode()


class _Window:
    """Decoders in which a token's text depends only on being the first and on the byte run it is in.

    `anchor` is a token that reads as itself: put before others it makes them not the first, and ends a run.
    """

    def __init__(self, join: Callable[[list[str]], str], is_held: Callable[[str], bool], anchor: str) -> None:
        self._join = join
        self._is_held = is_held
        self._anchor = anchor
        self._pending: list[str] = []
        self._first = True

    def push(self, tokens: list[str]) -> str:
        old = len(self._pending)
        self._pending += tokens
        for cut in range(len(self._pending), old, -1):
            if not self._is_held(self._pending[cut - 1]):
                return self._release(cut)
        return ""

    def finish(self) -> str:
        text, self._pending = self._text(self._pending), []
        return text

    def _release(self, cut: int) -> str:
        text = self._text(self._pending[:cut])
        if self._first and not text:
            return ""  # a space to be stripped from the front may be still to come
        self._first = False
        del self._pending[:cut]
        return text

    def _text(self, tokens: list[str]) -> str:
        if not tokens:
            return ""
        if self._first:
            return self._join(tokens)
        return self._join([self._anchor, *tokens])[len(self._anchor) :]


def _stream(tokenizer: Tokenizer) -> _Stream:
    steps = tokenizer.decoder_steps()
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _Bytes()
    anchor = _anchor(tokenizer) if _is_local(steps) else ""
    if not anchor:
        return _Window(tokenizer.join, lambda token: True, anchor)
    has_bytes = any(step["type"] == "ByteFallback" for step in steps)
    return _Window(tokenizer.join, _may_be_byte if has_bytes else lambda token: False, anchor)


def _anchor(tokenizer: Tokenizer) -> str:
    return next((c for c in "aeiou01" if tokenizer.join([c]) == c), "")


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


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet of bytes: printable Latin-1 stands for itself, the 68 others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flat(inner)]


def _load(folder: Path) -> Backend:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.json; give a model folder that holds one")
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise InputError(
            f"{path} is no tokenizer that can be read ({error}); fetch the model folder again"
        ) from error


def _special_token(
    folder: Path, backend: Backend, name: str, generation: dict[str, Any], config: dict[str, Any]
) -> str:
    """The text of "bos_token" or "eos_token", as the tokenizer's files name it, else by the model's id."""
    files = [read_json(folder / file) for file in ("tokenizer_config.json", "special_tokens_map.json")]
    token = next((found[name] for found in files if found.get(name) is not None), None)
    if token is None and not any(files):
        ids = (found.get(f"{name}_id") for found in (generation, config))
        index = next((i for i in ids if i is not None), None)
        index = index[0] if isinstance(index, list) and index else index
        token = backend.id_to_token(index) if isinstance(index, int) and index >= 0 else None
    token = token.get("content") if isinstance(token, dict) else token  # the form of an added token
    if token is not None and not isinstance(token, str):
        raise InputError(f"{name} in {folder / 'tokenizer_config.json'} is {token!r}; it must be a text")
    return token or ""


def _eos_ids(path: Path, found: dict[str, Any]) -> list[int]:
    value = found.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
        raise InputError(f"eos_token_id in {path} is {value!r}; it must be a token id or a list of them")
    return ids
