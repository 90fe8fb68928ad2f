"""What an operation moves and computes at least: specs, benches, profiles and plans all count with this.

Sizes are in numbers, itemsizes in bytes. What is the same for all rows and small (a norm's weight, a page
table) does not count.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """bytes: the least that must cross the memory bus. flops: multiplications and additions of products."""

    bytes: float
    flops: float = 0.0

    def seconds(self, bandwidth: float, products: float) -> float:
        """The roofline: the longer of reading at so many bytes a second and computing at so many flops."""
        return max(self.bytes / bandwidth, self.flops / products)


def product(rows: float, inner: float, outer: float, itemsize: int, *, added: bool = False) -> Work:
    """[rows, inner] by a weight [outer, inner], which is read once; added: to what is there already."""
    moved = (inner * outer + rows * (inner + (2 if added else 1) * outer)) * itemsize
    return Work(moved, 2 * rows * inner * outer)


def embedding(rows: float, hidden: int, itemsize: int) -> Work:
    """Rows that are looked up: read and written."""
    return Work(2 * rows * hidden * itemsize)


def norm(rows: float, hidden: int, itemsize: int) -> Work:
    """Rows read and written."""
    return Work(2 * rows * hidden * itemsize)


def swiglu(rows: float, inner: float, itemsize: int) -> Work:
    """Gate and up read, their activation written."""
    return Work(3 * rows * inner * itemsize)


def rope_write(rows: float, heads: float, kv_heads: float, width: int, itemsize: int) -> Work:
    """Queries, keys and values read and written, and the float32 turns of a row, cos and sin."""
    return Work(2 * rows * (heads + 2 * kv_heads) * width * itemsize + 8 * rows * width)


def attention(
    branches: float,
    context: float,
    new: float,
    heads: float,
    kv_heads: float,
    width: int,
    itemsize: int,
    window: int | None = None,
) -> Work:
    """Each branch has `new` tokens at the end of its context, which are `context` with them.

    Every key and value that is seen is read once a branch; a token sees itself and all before it, of a window
    so many. Two products: scores, and the mix of the values.
    """
    read = min(context, context if window is None else window + new - 1)
    moved = 2 * branches * (read * kv_heads + new * heads) * width * itemsize
    middle = context - (new - 1) / 2  # what a token sees in the mean
    seen = new * (middle if window is None else min(middle, window))
    return Work(moved, 4 * branches * seen * heads * width)


def steer(rows: float, vocab: int, itemsize: int) -> Work:
    """Every branch's logits read once."""
    return Work(rows * vocab * itemsize)
