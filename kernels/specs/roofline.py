"""What an operation moves and computes at least: specs, benches, profiles and plans all count with this.

Sizes are in numbers, itemsizes in bytes. What is the same for all rows and small (a norm's weight, a page
table) does not count.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OpCost:
    """bytes: the least that must cross the memory bus. flops: multiplications and additions of products."""

    bytes: float
    flops: float = 0.0

    def roofline_seconds(self, bandwidth: float, peak_flops: float) -> float:
        """The roofline: the longer of reading at so many bytes a second and computing at so many flops."""
        return max(self.bytes / bandwidth, self.flops / peak_flops)


def matmul(
    rows: float, in_features: float, out_features: float, itemsize: int, *, accumulate: bool = False
) -> OpCost:
    """[rows, inner] by a weight [outer, inner], which is read once; accumulate: to what is there already."""
    num_bytes = (
        in_features * out_features + rows * (in_features + (2 if accumulate else 1) * out_features)
    ) * itemsize
    return OpCost(num_bytes, 2 * rows * in_features * out_features)


def embedding(rows: float, hidden: int, itemsize: int) -> OpCost:
    """Rows that are looked up: read and written."""
    return OpCost(2 * rows * hidden * itemsize)


def norm(rows: float, hidden: int, itemsize: int) -> OpCost:
    """Rows read and written."""
    return OpCost(2 * rows * hidden * itemsize)


def swiglu(rows: float, intermediate_size: float, itemsize: int) -> OpCost:
    """Gate and up read, their activation written."""
    return OpCost(3 * rows * intermediate_size * itemsize)


def rope_and_write_kv(
    rows: float, num_heads: float, num_kv_heads: float, head_dim: int, itemsize: int
) -> OpCost:
    """Queries, keys and values read and written, and the float32 turns of a row, cos and sin."""
    return OpCost(2 * rows * (num_heads + 2 * num_kv_heads) * head_dim * itemsize + 8 * rows * head_dim)


def attention(
    num_seqs: float,
    seq_len: float,
    num_new: float,
    num_heads: float,
    num_kv_heads: float,
    head_dim: int,
    itemsize: int,
    window: int | None = None,
) -> OpCost:
    """Each branch has `num_new` tokens at the end of its context, which are `seq_len` with them.

    Every key and value that is seen is read once a branch; a token sees itself and all before it, of a window
    so many. Two products: scores, and the mix of the values.
    """
    keys_read = min(seq_len, seq_len if window is None else window + num_new - 1)
    num_bytes = 2 * num_seqs * (keys_read * num_kv_heads + num_new * num_heads) * head_dim * itemsize
    mean_context = seq_len - (num_new - 1) / 2  # what a token sees in the mean
    keys_seen = num_new * (mean_context if window is None else min(mean_context, window))
    return OpCost(num_bytes, 4 * num_seqs * keys_seen * num_heads * head_dim)


def steer(rows: float, vocab_size: int, itemsize: int) -> OpCost:
    """Every branch's logits read once."""
    return OpCost(rows * vocab_size * itemsize)
