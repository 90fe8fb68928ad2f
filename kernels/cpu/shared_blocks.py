"""Who reads which page where every row decodes: a page that several share is read once for one of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
