"""The chosen tokens go to all branches, on the device: what the next step reads of its rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 128


@triton.jit(do_not_specialize=["rows", "width"])
def advance_kernel(
    tokens_ptr,
    group_ptr,
    table_ptr,
    id_ptr,
    position_ptr,
    page_ptr,
    offset_ptr,
    rows,
    width,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    position = tl.load(position_ptr + row, mask=inside, other=0) + 1
    token = tl.load(tokens_ptr + tl.load(group_ptr + row, mask=inside, other=0), mask=inside, other=0)
    page = tl.load(table_ptr + row * width + position // BLOCK, mask=inside, other=0)
    tl.store(id_ptr + row, token, mask=inside)
    tl.store(position_ptr + row, position, mask=inside)
    tl.store(page_ptr + row, page, mask=inside)
    tl.store(offset_ptr + row, position % BLOCK, mask=inside)


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
    """Moves every row on by its group's token, in place; see `kernels.advance.advance`."""
    rows, width = tables.shape
    advance_kernel[(triton.cdiv(rows, ROWS),)](
        tokens, group, tables, ids, positions, pages, offsets, rows, width, BLOCK=block_size, ROWS=ROWS
    )
