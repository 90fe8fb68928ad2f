"""Text to token ids and back, as the files of a model folder describe it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError, quoted
from ..common.json_files import read_json, readable
from .added_tokens import CONFIG, MAX_ID, SPECIALS, added_tokens, special_token
from .backend import Place, spliced
from .huggingface import JsonVocabulary
from .sentencepiece import SentencePieceVocabulary

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from .backend import Vocabulary
    from .detokenizer import Detokenizer

GENERATION, MODEL = "generation_config.json", "config.json"
FLAGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy")


class Tokenizer:
    """A vocabulary, and the special tokens that chats are built with.

    kind:              how text is cut: "BPE", "Unigram", "SentencePiece BPE".
    vocab_size:        number of ids with added tokens: the largest id + 1.
    eos_token_ids:     ids that end an answer, () where the model names none.
    bos_token, eos_token: their texts, "" where the model has none.
    prefix_token_ids, suffix_token_ids: what belongs before and after a text, mostly BOS and nothing.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        bos_token: str = "",
        eos_token: str = "",
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._vocabulary = vocabulary
        self.kind = vocabulary.kind
        self.vocab_size = vocabulary.size
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.eos_token_ids = tuple(eos_token_ids or self.ids_of(eos_token))
        self.prefix_token_ids, self.suffix_token_ids = vocabulary.ends
        visible = {text: index for text, index in vocabulary.added.items() if text.strip()}
        self._reserved = frozenset(visible.values()) - frozenset(vocabulary.unknown)
        self._written = _any_of({*visible, *map(vocabulary.normalized, visible)})

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a model folder: its tokenizer.json, or tokenizer.model where there is none.

        Raises InputError when there is neither, or a file is broken.
        """
        folder = Path(folder)
        vocabulary = _vocabulary(folder)
        bos, eos = (_special_text(folder, vocabulary, name) for name in ("bos_token", "eos_token"))
        return cls(vocabulary, bos, eos, _eos_ids(folder))

    def encode(
        self, text: str, add_special_tokens: bool = False, foreign: Container[int] | None = None
    ) -> list[int]:
        """Token ids of a text. Added tokens written out in it are read as such.

        `foreign` holds the places of characters that are not to be trusted: what one of them is part of is
        encoded as the text it is, and never becomes an added token, unless that is white space alone.
        Raises InputError when the text is not valid Unicode.
        """
        _require_unicode(text)
        ids = self._vocabulary.encode(text) if foreign is None else self._guarded(text, foreign)
        return [*self.prefix_token_ids, *ids, *self.suffix_token_ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids without a token, such as padding rows of the LM head, are skipped."""
        return self._vocabulary.decode(ids, skip_special_tokens)

    def detokenizer(self, skip_special_tokens: bool = True) -> Detokenizer:
        """`decode` for ids that arrive one by one."""
        return self._vocabulary.detokenizer(skip_special_tokens)

    def ids_of(self, token: str) -> list[int]:
        """The id of a token, in a list that is empty where there is none."""
        index = self._vocabulary.id_of(token) if token else None
        return [] if index is None else [index]

    def added_token_in(self, text: str) -> str:
        """What in a text might be read as an added token, "" where nothing might."""
        found = self._written.search(text) or self._written.search(self._vocabulary.normalized(text))
        return found.group() if found else ""

    def require_rows(self, rows: int) -> None:
        """Raises InputError unless an embedding of that many rows has one for every id; more are usual."""
        last = self.vocab_size - 1
        if last >= rows:
            token = self._vocabulary.token_of(last)
            raise InputError(
                f"the tokenizer has id {last}, for {quoted(token)}, and the model's embedding has {rows} rows"
                f", for ids up to {rows - 1}; both must be of the same model"
            )

    def _guarded(self, text: str, foreign: Container[int]) -> list[int]:
        ids, found = self._vocabulary.read(text)
        own = [token for token in found if not any(at in foreign for at in range(token.start, token.end))]
        wanted = [token.token_id for token in own if token.token_id in self._reserved]
        if [index for index in ids if index in self._reserved] == wanted:
            return ids
        return spliced(text, own, self._ordinary)

    def _ordinary(self, text: str, place: Place) -> list[int]:
        """Ids of untrusted text. What even so becomes an added token, for some vocabularies list these among
        their pieces, is cut in halves until it does not."""
        ids = self._vocabulary.ordinary(text, place)
        if self._reserved.isdisjoint(ids) or len(text) < 2:
            return ids
        middle = len(text) // 2
        return self._ordinary(text[:middle], place) + self._ordinary(text[middle:], Place.WITHIN)


def _vocabulary(folder: Path) -> Vocabulary:
    if (path := folder / "tokenizer.json").is_file():
        return JsonVocabulary.from_file(readable(path), added_tokens(folder))
    if (path := folder / "tokenizer.model").is_file():
        return _sentencepiece(folder, readable(path))
    raise InputError(
        f"{str(folder)!r} has no tokenizer.json and no tokenizer.model; give a model folder that holds one"
    )


def _sentencepiece(folder: Path, path: Path) -> Vocabulary:
    """A tokenizer.model, which leaves to tokenizer_config.json what tokenizer.json says itself.

    What that leaves out is as in the tokenizer classes of the time: BOS before a text, nothing after it.
    transformers 5 then adds no BOS either.
    """
    flags = read_json(folder / CONFIG)
    for name in FLAGS:
        if flags.get(name) is not None and not isinstance(flags[name], bool):
            raise InputError(
                f"{name} in {str(folder / CONFIG)!r} is {quoted(flags[name])}; it must be true or false"
            )
    prefix, legacy = flags.get("add_prefix_space"), flags.get("legacy") is not False
    vocabulary = SentencePieceVocabulary.from_file(path, added_tokens(folder), prefix, legacy)
    ends = [vocabulary.id_of(_special_text(folder, vocabulary, name)) for name in ("bos_token", "eos_token")]
    adds = flags.get("add_bos_token") is not False, flags.get("add_eos_token") is True
    before, after = ([end] if end is not None and add else [] for end, add in zip(ends, adds, strict=True))
    vocabulary.ends = (before, after)
    return vocabulary


def _special_text(folder: Path, vocabulary: Vocabulary, name: str) -> str:
    """The text of "bos_token" or "eos_token", as the tokenizer's files name it, else by the model's id."""
    text = special_token(folder, name)
    if text is None:
        text = vocabulary.named.get(name)
    if text is None and not any((folder / file).is_file() for file in (CONFIG, SPECIALS)):
        ids = (read_json(folder / file).get(f"{name}_id") for file in (GENERATION, MODEL))
        index = next((i for i in ids if i is not None), None)
        index = index[0] if isinstance(index, list) and index else index
        text = vocabulary.token_of(index) if isinstance(index, int) and 0 <= index <= MAX_ID else None
    return text or ""


def _eos_ids(folder: Path) -> list[int]:
    """The ids that end an answer: of generation_config.json, else of config.json."""
    for path in (folder / GENERATION, folder / MODEL):
        value = read_json(path).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
            raise InputError(
                f"eos_token_id in {str(path)!r} is {quoted(value)}; it must be a token id or a list of them"
            )
        if ids:
            return ids
    return []


def _any_of(texts: set[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = f"\\u{ord(text[error.start]):04x} at character {error.start}"
        raise InputError(f"the text holds the lone surrogate {wrong}; it must be valid Unicode") from error
