"""The layout of a step over a paged cache: where tokens go, who reads which page, what each may see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .parcel import send

CPU = torch.device("cpu")
HIDDEN = -1e30
"""The score of a key that may not be seen; finite, so that a page with no visible key makes no NaN."""
SCORES = 1 << 21
"""Scores of a prompt's tokens that are worked on at once: they and what becomes of them stay in a cache."""


@dataclass(frozen=True)
class Segment:
    """One branch's share of a step: `count` new tokens after the `start` that its pages already hold.

    pages: its page table, long enough for the new tokens.
    """

    start: int
    count: int
    pages: list[int]


@dataclass(frozen=True)
class Batch:
    """The ragged layout of one step, tokens of one segment after another.

    positions [rows]; pages, offsets [tokens]: where in the cache each token's K and V go. Rows beyond the
    tokens are padding: they repeat the last position, are written nowhere, and mean nothing.
    """

    segments: list[Segment]
    positions: Tensor
    pages: Tensor
    offsets: Tensor

    @classmethod
    def of(
        cls, segments: list[Segment], block_size: int, padding: int = 0, device: torch.device = CPU
    ) -> Batch:
        """The layout of these segments, in their order."""
        positions = [s.start + i for s in segments for i in range(s.count)]
        pages = [s.pages[(s.start + i) // block_size] for s in segments for i in range(s.count)]
        offsets = [p % block_size for p in positions]
        columns = (positions + positions[-1:] * padding, pages, offsets)
        return cls(segments, *send(device, *(np.array(column, np.int64) for column in columns)))


@dataclass(frozen=True)
class Readers:
    """Which page is read for which decoding row; a pair is one page read for one row.

    used:    pages [0, used) are multiplied, each for its first reader.
    stacked: pages [n] that more rows read, each multiplied for `most` of them.
    pairs:   [depth, rows]: for each row its pages in order; a page below `used` for its first reader, and
             used + index · most + place among the others of a stacked page. 0 where a row has no more pages.
    absent:  [depth, rows]: where it has none.
    """

    used: int
    stacked: Tensor
    most: int
    pairs: Tensor
    absent: Tensor

    @classmethod
    def of(cls, tables: list[list[int]]) -> Readers:
        """tables: the pages of each row, in order."""
        used = max(2, 1 + max(map(max, tables)))  # two, so that no product stands alone
        taken, others = set[int](), dict[int, list[tuple[int, int]]]()
        for row, table in enumerate(tables):
            for index, page in enumerate(table):
                if page in taken:
                    others.setdefault(page, []).append((row, index))
                taken.add(page)
        most = max(map(len, others.values()), default=0)
        depth = max(map(len, tables))
        pairs = [[table[i] if i < len(table) else 0 for table in tables] for i in range(depth)]
        for at, readers in enumerate(others.values()):
            for place, (row, index) in enumerate(readers):
                pairs[index][row] = used + at * most + place
        return cls(
            used=used,
            stacked=torch.tensor(list(others), dtype=torch.int64),
            most=most,
            pairs=torch.tensor(pairs),
            absent=torch.tensor([[i >= len(table) for table in tables] for i in range(depth)]),
        )


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


def hidden_keys(key: Tensor, token: Tensor, window: int | None) -> Tensor:
    """0 where the token at a position sees the key at a position, else HIDDEN."""
    hidden = key > token
    if window is not None:
        hidden |= key <= token - window
    return torch.zeros(hidden.shape).masked_fill_(hidden, HIDDEN)


def exchange(pages: Tensor, pairs: Iterable[tuple[int, int]]) -> None:
    """Exchanges what pages [layers, 2, pages, …] hold, two by two, one after the other."""
    for one, other in pairs:  # by slices: a list of indices would copy number by number
        held = pages[:, :, one].clone()
        pages[:, :, one] = pages[:, :, other]
        pages[:, :, other] = held
