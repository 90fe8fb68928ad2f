"""Tokenizer of a model folder: text to token ids and back, and its special tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError, short_repr
from ..common.json_files import read_json, require_small_file
from .added_tokens import (
    MAX_TOKEN_ID,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    read_added_tokens,
    read_special_token,
)
from .backend import TextPosition, encode_segments
from .huggingface import HFTokenizerBackend
from .sentencepiece import SentencePieceBackend

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from .backend import TokenizerBackend
    from .detokenizer import Detokenizer

GENERATION_CONFIG, MODEL_CONFIG = "generation_config.json", "config.json"
BOOL_KEYS = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy")


class Tokenizer:
    """A vocabulary, and its special tokens.

    kind:              tokenization algorithm: "BPE", "Unigram", "SentencePiece BPE".
    vocab_size:        number of ids with added tokens: the largest id + 1.
    eos_token_ids:     ids that end an answer, () if the model defines none.
    bos_token, eos_token: their texts, "" if the model has none.
    prefix_token_ids, suffix_token_ids: ids to add before and after a text, usually [BOS] and [].
    """

    def __init__(
        self,
        backend: TokenizerBackend,
        bos_token: str = "",
        eos_token: str = "",
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._backend = backend
        self.kind = backend.kind
        self.vocab_size = backend.vocab_size
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.eos_token_ids = tuple(eos_token_ids or self.token_to_ids(eos_token))
        self.prefix_token_ids, self.suffix_token_ids = backend.bos_eos_ids
        visible = {text: token_id for text, token_id in backend.added_tokens.items() if text.strip()}
        self._added_ids = frozenset(visible.values()) - frozenset(backend.unk_ids)
        self._added_pattern = _compile_alternatives({*visible, *map(backend.normalize, visible)})

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Load tokenizer.json of a model folder, or tokenizer.model if that is missing.

        Raises InputError when both are missing, or a file is corrupt.
        """
        folder = Path(folder)
        backend = _load_backend(folder)
        bos_token, eos_token = (
            _special_token_text(folder, backend, name) for name in ("bos_token", "eos_token")
        )
        return cls(backend, bos_token, eos_token, _read_eos_ids(folder))

    def encode(
        self, text: str, add_special_tokens: bool = False, untrusted: Container[int] | None = None
    ) -> list[int]:
        """Encode a text to token ids. Added tokens in the text are recognized.

        `untrusted` contains the indices of untrusted characters: an added token that includes one is encoded
        as plain text, unless the token is only whitespace.
        Raises InputError when the text is not valid Unicode.
        """
        _check_unicode(text)
        ids = self._backend.encode(text) if untrusted is None else self._encode_untrusted(text, untrusted)
        return [*self.prefix_token_ids, *ids, *self.suffix_token_ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode token ids to text; ids without a token, such as padding rows of the LM head, are skipped."""
        return self._backend.decode(ids, skip_special_tokens)

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """Return an incremental `decode`."""
        return self._backend.detokenizer(skip_special_tokens)

    def token_to_ids(self, token: str) -> list[int]:
        """Return the id of a token in a list, or an empty list."""
        token_id = self._backend.token_to_id(token) if token else None
        return [] if token_id is None else [token_id]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token, also a special one, adds to a text in mid-sentence, with leading space."""
        token_bytes = self._backend.token_bytes(token_id)
        if token_bytes is not None:
            return token_bytes
        once, twice = (self.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return (twice[len(once) :] if twice.startswith(once) else once).encode()

    def added_token_id(self, text: str) -> int | None:
        """The id of the added token of this text, such as `<|endoftext|>`; None if there is none."""
        return self._backend.added_tokens.get(text)

    def find_added_token(self, text: str) -> str:
        """Return the first part of a text that may be encoded as an added token, or ""."""
        match = self._added_pattern.search(text) or self._added_pattern.search(self._backend.normalize(text))
        return match.group() if match else ""

    def check_vocab_size(self, vocab_size: int) -> None:
        """Raise InputError unless an embedding of `vocab_size` rows covers every id; more rows are common."""
        max_id = self.vocab_size - 1
        if max_id >= vocab_size:
            token = self._backend.id_to_token(max_id)
            raise InputError(
                f"the tokenizer has id {max_id}, for {short_repr(token)}, and the model's embedding has "
                f"{vocab_size} rows, for ids up to {vocab_size - 1}; use the tokenizer of the model"
            )

    def _encode_untrusted(self, text: str, untrusted: Container[int]) -> list[int]:
        ids, matches = self._backend.encode_with_matches(text)
        trusted = [
            match
            for match in matches
            if not any(index in untrusted for index in range(match.start, match.end))
        ]
        expected = [token.token_id for token in trusted if token.token_id in self._added_ids]
        if [token_id for token_id in ids if token_id in self._added_ids] == expected:
            return ids
        return encode_segments(text, trusted, self._encode_plain)

    def _encode_plain(self, text: str, position: TextPosition) -> list[int]:
        """Encode untrusted text. Some vocabularies list added tokens among their pieces: if one results, the
        text is halved until none does."""
        ids = self._backend.encode_plain(text, position)
        if self._added_ids.isdisjoint(ids) or len(text) < 2:
            return ids
        middle = len(text) // 2
        return self._encode_plain(text[:middle], position) + self._encode_plain(
            text[middle:], TextPosition.WITHIN
        )


def _load_backend(folder: Path) -> TokenizerBackend:
    if (path := folder / "tokenizer.json").is_file():
        return HFTokenizerBackend.from_file(require_small_file(path), read_added_tokens(folder))
    if (path := folder / "tokenizer.model").is_file():
        return _load_sentencepiece(folder, require_small_file(path))
    raise InputError(
        f"{str(folder)!r} has no tokenizer.json and no tokenizer.model; use a model folder with one of them"
    )


def _load_sentencepiece(folder: Path, path: Path) -> TokenizerBackend:
    """Load a tokenizer.model, with the settings of tokenizer_config.json.

    Defaults of missing settings are those of the older tokenizer classes: BOS before a text, nothing after
    it. transformers 5 adds no BOS in this case.
    """
    config = read_json(folder / TOKENIZER_CONFIG)
    for name in BOOL_KEYS:
        if config.get(name) is not None and not isinstance(config[name], bool):
            raise InputError(
                f"{name} in {str(folder / TOKENIZER_CONFIG)!r} is {short_repr(config[name])}; it must be "
                f"true or false"
            )
    add_prefix, legacy = config.get("add_prefix_space"), config.get("legacy") is not False
    backend = SentencePieceBackend.from_file(path, read_added_tokens(folder), add_prefix, legacy)
    end_ids = [
        backend.token_to_id(_special_token_text(folder, backend, name)) for name in ("bos_token", "eos_token")
    ]
    add_flags = config.get("add_bos_token") is not False, config.get("add_eos_token") is True
    prefix_ids, suffix_ids = (
        [end_id] if end_id is not None and add else [] for end_id, add in zip(end_ids, add_flags, strict=True)
    )
    backend.bos_eos_ids = (prefix_ids, suffix_ids)
    return backend


def _special_token_text(folder: Path, backend: TokenizerBackend, name: str) -> str:
    """Text of "bos_token" or "eos_token" from the tokenizer's files, else from the model's id."""
    text = read_special_token(folder, name)
    if text is None:
        text = backend.special_tokens.get(name)
    if text is None and not any((folder / file).is_file() for file in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP)):
        ids = (read_json(folder / file).get(f"{name}_id") for file in (GENERATION_CONFIG, MODEL_CONFIG))
        token_id = next((value for value in ids if value is not None), None)
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        text = (
            backend.id_to_token(token_id)
            if isinstance(token_id, int) and 0 <= token_id <= MAX_TOKEN_ID
            else None
        )
    return text or ""


def _read_eos_ids(folder: Path) -> list[int]:
    """Ids that end an answer, from generation_config.json, else from config.json."""
    for path in (folder / GENERATION_CONFIG, folder / MODEL_CONFIG):
        value = read_json(path).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
            raise InputError(
                f"eos_token_id in {str(path)!r} is {short_repr(value)}; it must be a token id or a list "
                f"of them"
            )
        if ids:
            return ids
    return []


def _compile_alternatives(texts: set[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(text[error.start]):04x} at character {error.start}"
        raise InputError(
            f"the text contains the lone surrogate {surrogate}; it must be valid Unicode"
        ) from error
