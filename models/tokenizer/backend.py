"""Common interface of the tokenizer.json and tokenizer.model backends."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .detokenizer import Detokenizer


class TextPosition(Enum):
    """Position of a segment of text, which determines whether a prefix space is added.

    In many vocabularies a word starts with its space. They add a space at the start of a text, some also
    after each added token, but not within a text. AFTER_NORMALIZED is after an added token that is matched in
    the normalized text, so the segment is within the normalizer's input.
    """

    START = auto()
    AFTER_TOKEN = auto()
    AFTER_NORMALIZED = auto()
    WITHIN = auto()


class AddedTokenMatch(NamedTuple):
    """An added token matched at text[start:end], its id, and the position of the text that follows.

    prefix_ids: token ids before the match when there is no text between it and the previous match, such as
    those of a prefix space.
    """

    start: int
    end: int
    token_id: int
    next_position: TextPosition
    prefix_ids: tuple[int, ...] = ()


class TokenizerBackend(Protocol):
    """Text to token ids and back, for tokenizer.json or tokenizer.model.

    kind:            tokenization algorithm, such as "BPE".
    vocab_size:      largest id + 1.
    added_tokens:    ids of tokens that are matched before tokenization, such as "<s>", by their text.
    unk_ids:         ids of unknown tokens.
    bos_eos_ids:     ids that the tokenizer adds before and after a text.
    special_tokens:  texts of "bos_token" and "eos_token" in the tokenizer file.
    """

    kind: str
    vocab_size: int
    added_tokens: dict[str, int]
    unk_ids: set[int]
    bos_eos_ids: tuple[list[int], list[int]]
    special_tokens: dict[str, str]

    def encode(self, text: str) -> list[int]:
        """Encode a text, with added tokens recognized."""

    def encode_with_matches(self, text: str) -> tuple[list[int], list[AddedTokenMatch]]:
        """Encode as `encode`, and return the added tokens that were matched, in order."""

    def encode_plain(self, text: str, position: TextPosition) -> list[int]:
        """Encode a text, with added tokens treated as plain text."""

    def normalize(self, text: str) -> str:
        """Normalize the text as before tokenization, for example to one Unicode form."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Decode ids to text; ids without a token are skipped."""

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        """Return an incremental `decode`."""

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token, or None."""

    def id_to_token(self, token_id: int) -> str | None:
        """Return the token of an id, or None."""

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of a token that stands for bytes; None for one that stands for a text."""


def encode_segments(
    text: str, matches: Iterable[AddedTokenMatch], encode_plain: Callable[[str, TextPosition], list[int]]
) -> list[int]:
    """Encode a text with these added tokens, and the text between them with `encode_plain`."""
    ids: list[int] = []
    end, position = 0, TextPosition.START
    for match in matches:
        ids += encode_plain(text[end : match.start], position) if match.start > end else match.prefix_ids
        ids.append(match.token_id)
        end, position = match.end, match.next_position
    return ids + encode_plain(text[end:], position) if end < len(text) else ids
