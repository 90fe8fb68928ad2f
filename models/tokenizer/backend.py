"""What a tokenizer's file knows, whichever of the two kinds of file it is."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .detokenizer import Detokenizer


class TextPosition(Enum):
    """Where a stretch of text stands.

    Many vocabularies begin a word with its space. They put one before a text at the start, some also after
    each added token; within a text it would be one too many. A token that is looked for in the text as its
    normaliser leaves it, AFTER_NORMALIZED, stands within what the normaliser saw.
    """

    START = auto()
    AFTER_TOKEN = auto()
    AFTER_NORMALIZED = auto()
    WITHIN = auto()


class AddedTokenMatch(NamedTuple):
    """An added token that is read in a text: from where to where, its id, and the place of what follows.

    prefix_ids: ids of a space put before the text where the token took what stood there, and nothing is
    between.
    """

    start: int
    end: int
    token_id: int
    next_position: TextPosition
    prefix_ids: tuple[int, ...] = ()


class TokenizerBackend(Protocol):
    """Text to token ids and back, as tokenizer.json or tokenizer.model has it.

    kind:     how it cuts text, such as "BPE".
    vocab_size:     its largest id + 1.
    added_tokens:    the tokens that stand apart from all cutting, such as "<s>": ids by what is written for
    them. unk_ids:  ids that mean "no token for this".
    bos_eos_ids:     the ids it would put before and after a text.
    special_tokens:    what the file itself says of "bos_token" and "eos_token".
    """

    kind: str
    vocab_size: int
    added_tokens: dict[str, int]
    unk_ids: set[int]
    bos_eos_ids: tuple[list[int], list[int]]
    special_tokens: dict[str, str]

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which added tokens are read as such."""

    def encode_with_matches(self, text: str) -> tuple[list[int], list[AddedTokenMatch]]:
        """The same, and which added tokens were read, in order."""

    def encode_plain(self, text: str, position: TextPosition) -> list[int]:
        """Ids of a text in which added tokens are text like any other."""

    def normalize(self, text: str) -> str:
        """The text in the form in which it is cut: many bring Unicode to one form first."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of ids; ids without a token are skipped."""

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        """What does the same for ids that come in pieces."""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, None where there is no such."""

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id, None where there is no such."""


def encode_segments(
    text: str, matches: Iterable[AddedTokenMatch], encode_plain: Callable[[str, TextPosition], list[int]]
) -> list[int]:
    """Ids of a text in which these are the added tokens, and what stands between is ordinary."""
    ids: list[int] = []
    end, position = 0, TextPosition.START
    for match in matches:
        ids += encode_plain(text[end : match.start], position) if match.start > end else match.prefix_ids
        ids.append(match.token_id)
        end, position = match.end, match.next_position
    return ids + encode_plain(text[end:], position) if end < len(text) else ids
