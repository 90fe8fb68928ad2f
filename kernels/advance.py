"""The chosen tokens go to all branches: what the next step reads of its rows."""

from __future__ import annotations

from torch import Tensor


def advance(
    tokens: Tensor,
    group: Tensor,
    tables: Tensor,
    ids: Tensor,
    positions: Tensor,
    pages: Tensor,
    offsets: Tensor,
    block_size: int,
) -> None:
    """Moves every row on by one token, in place.

    tokens [groups] are what was chosen, group [rows] whose each row is, tables [rows, pages] its page table,
    all int64. ids, positions, pages, offsets [rows] int64: a row's next token, where that stands in its text,
    and in the cache. A table has a page for that place.
    """
    positions += 1
    ids.copy_(tokens[group])
    pages.copy_(tables.gather(1, (positions // block_size)[:, None])[:, 0])
    offsets.copy_(positions % block_size)
