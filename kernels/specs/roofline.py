"""Roofline cost of each operation: minimum bytes moved and FLOPs, for specs, benches, profiles and plans.

Sizes are in elements, item sizes in bytes. Small inputs shared by all rows (a norm's weight, a block table)
are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OpCost:
    """bytes: minimum memory traffic. flops: multiplications and additions of matmuls."""

    bytes: float
    flops: float = 0.0

    def roofline_seconds(self, bandwidth: float, peak_flops: float) -> float:
        """max(bytes / bandwidth, flops / peak_flops), with bandwidth and peak_flops per second."""
        return max(self.bytes / bandwidth, self.flops / peak_flops)


def matmul(
    rows: float,
    in_features: float,
    out_features: float,
    itemsize: int,
    *,
    accumulate: bool = False,
    bytes_per_weight: float | None = None,
) -> OpCost:
    """[rows, in] times a weight [out, in], read once. accumulate: add to an existing [rows, out].

    bytes_per_weight: of the stored weight, by default `itemsize`.
    """
    weight_bytes = in_features * out_features * (itemsize if bytes_per_weight is None else bytes_per_weight)
    num_bytes = weight_bytes + rows * (in_features + (2 if accumulate else 1) * out_features) * itemsize
    return OpCost(num_bytes, 2 * rows * in_features * out_features)


def embedding(rows: float, hidden: int, itemsize: int) -> OpCost:
    """Looked-up rows read and written."""
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
    """Queries, keys and values read and written, and a float32 cos and sin per row."""
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
    """Each sequence has `num_new` query tokens at the end of its `seq_len` tokens.

    Every visible key and value is read once per sequence; a token attends to itself and all tokens before it,
    or to the last `window` tokens. Two matmuls: the scores, and probabilities times values.
    """
    keys_read = min(seq_len, seq_len if window is None else window + num_new - 1)
    num_bytes = 2 * num_seqs * (keys_read * num_kv_heads + num_new * num_heads) * head_dim * itemsize
    mean_context = seq_len - (num_new - 1) / 2  # mean keys per query token
    keys_seen = num_new * (mean_context if window is None else min(mean_context, window))
    return OpCost(num_bytes, 4 * num_seqs * keys_seen * num_heads * head_dim)


def steer(rows: float, vocab_size: int, itemsize: int) -> OpCost:
    """The logits of every row read once."""
    return OpCost(rows * vocab_size * itemsize)
