"""Prompts in pieces that attend together on a CPU, each as far as its page goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention_metadata import Segment
from ..reference.causal_mask import hidden_keys

SCORES = 1 << 21
"""Scores of a prompt's tokens that are worked on at once: they and what becomes of them stay in a cache."""


@dataclass(frozen=True)
class _Piece:
    """A piece of a prompt: `count` tokens of it from `start` on, the first of which is the batch's `token`.

    pages: those that it reads, of its prompt's `segment`, from page `lowest` on. lead: see `Pieces`.
    """

    segment: int
    token: int
    start: int
    count: int
    lowest: int
    pages: list[int]

    @property
    def lead(self) -> int:
        return self.lowest % (1 << (len(self.pages) - 1).bit_length())


@dataclass(frozen=True)
class Pieces:
    """Pieces of prompts that attend together, padded to the same numbers of tokens and pages.

    tokens [pieces · count]: tokens of the batch, the last of a piece repeated. own: which of them are no
    repetition, `target` the tokens that they are. lowest, depth: which of the pages that are held they read,
    from which on and how many. lead: pages of zeros before them that make the sums pair as if from page 0 on.
    hidden [pieces, 1, count, 1, keys]: 0 for a key that is seen, else HIDDEN, for the keys from `first` on;
    all before are seen.
    """

    count: int
    lowest: int
    depth: int
    lead: int
    tokens: Tensor
    own: Tensor
    target: Tensor
    first: int
    hidden: Tensor

    @classmethod
    def of(cls, pieces: list[_Piece], size: int, held: int, block_size: int, window: int | None) -> Pieces:
        """Each of at most `size` tokens, and of as many pages as the others; held: the first that is."""
        depth, counts = len(pieces[0].pages), torch.tensor([piece.count for piece in pieces])[:, None]
        starts = torch.tensor([piece.start - piece.lowest * block_size for piece in pieces])[:, None]
        first = 0 if window is not None else int(starts.min()) // block_size * block_size
        steps = torch.arange(size)
        reach = torch.minimum(steps, counts - 1)
        tokens = (torch.tensor([piece.token for piece in pieces])[:, None] + reach).flatten()
        own = (steps < counts).flatten().nonzero().flatten()
        key = torch.arange(first, depth * block_size)
        return cls(
            count=size,
            lowest=pieces[0].lowest - held,
            depth=depth,
            lead=pieces[0].lead,
            tokens=tokens,
            own=own,
            target=tokens[own],
            first=first,
            hidden=hidden_keys(key, (starts + reach)[:, :, None], window)[:, None, :, None],
        )


@dataclass(frozen=True)
class Prompts:
    """Prompts, or pieces of them, whose pages [n, depth] are held while what reads them attends in turn."""

    pages: Tensor
    pieces: list[Pieces]

    @classmethod
    def cut(
        cls, prompts: list[tuple[int, Segment]], block_size: int, heads: int, window: int | None
    ) -> list[Prompts]:
        """prompts: (first token, segment). Short ones attend together, a long one's pieces by themselves."""
        found, alone = list[Prompts](), dict[int, list[tuple[int, _Piece]]]()
        for size, pieces in _alike(prompts, block_size, heads, window):
            if len(pieces) == 1:
                alone.setdefault(pieces[0].segment, []).append((size, pieces[0]))
            else:
                pages = torch.tensor([piece.pages for piece in pieces])
                found.append(cls(pages, [Pieces.of(pieces, size, pieces[0].lowest, block_size, window)]))
        for at, sized in alone.items():
            lowest = min(piece.lowest for _, piece in sized)
            end = max(piece.lowest + len(piece.pages) for _, piece in sized)
            pages = torch.tensor([prompts[at][1].pages[lowest:end]])
            each = [Pieces.of([piece], size, lowest, block_size, window) for size, piece in sized]
            found.append(cls(pages, each))
        return found


def _alike(
    prompts: list[tuple[int, Segment]], block_size: int, heads: int, window: int | None
) -> Iterator[tuple[int, list[_Piece]]]:
    """Pieces with as many pages, and about as many tokens: how many they are filled up to.

    A piece ends where its page does, so that it is hardly multiplied with keys that come after it, and before
    the scores of those that attend together leave the cache.
    """
    alike: dict[tuple[int, int, int], list[_Piece]] = {}
    for at, (token, segment) in enumerate(prompts):
        end, done = segment.start + segment.count, 0
        while done < segment.count:
            start = segment.start + done
            most = max(1, SCORES // (heads * end))
            count = min(most, segment.count - done, block_size - start % block_size)
            lowest = 0 if window is None else max(0, start - window + 1) // block_size
            pages = segment.pages[lowest : (start + count - 1) // block_size + 1]
            piece = _Piece(at, token + done, start, count, lowest, pages)
            alike.setdefault((len(pages), piece.lead, min(most, filled_up(count))), []).append(piece)
            done += count
    for (depth, _, size), pieces in alike.items():
        step = max(1, SCORES // (heads * size * depth * block_size))
        for first in range(0, len(pieces), step):
            yield size, pieces[first : first + step]


def filled_up(count: int) -> int:
    """What a piece of `count` tokens is filled up to: sizes are a quarter apart, so that many are alike."""
    step = max(16, 1 << max(0, (count - 1).bit_length() - 3))
    return -(-count // step) * step
