"""Distributed radix select: top-k and top-p thresholds of a sharded vocabulary without sorting.

Finds the largest t such that the values ≥ t reach a target count or mass. t is a float32, determined byte by
byte, the most significant first: each pass builds a histogram of the weights by the next byte, all-reduces it
over the shards, and takes the byte at which the suffix sum reaches the target. Weights are integers, so the
sums are exact and do not depend on the sharding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .communicator import Communicator


def weighted_kth(values: Tensor, weights: Tensor, target: Tensor, comm: Communicator) -> Tensor:
    """The largest t [rows] such that the weights of values ≥ t, over all shards, sum to at least `target`.

    values [rows, columns] float32; weights [rows, columns] and target [rows] int64.
    """
    keys = _float_to_key(values)
    prefix, above = torch.zeros_like(target), torch.zeros_like(target)  # key's leading bytes; weight above
    for shift in (24, 16, 8, 0):
        in_prefix = keys >> (shift + 8) == prefix[:, None]
        histogram = weights.new_zeros(len(values), 256)
        histogram.scatter_add_(1, (keys >> shift) & 255, torch.where(in_prefix, weights, 0))
        histogram = comm.all_reduce(histogram)
        suffix_sums = above[:, None] + histogram.flip(-1).cumsum(-1).flip(-1)
        byte = ((suffix_sums >= target[:, None]).sum(-1, keepdim=True) - 1).clamp(min=0)
        above = (suffix_sums - histogram).gather(-1, byte)[:, 0]
        prefix = prefix << 8 | byte[:, 0]
    return _key_to_float(prefix)


def _float_to_key(values: Tensor) -> Tensor:
    """Integers from 0 to 2³² − 1 in the order of the float32 values; −0 equals 0."""
    bits = torch.where(values == 0, 0.0, values).view(torch.int32).long()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) + (1 << 31)


def _key_to_float(keys: Tensor) -> Tensor:
    """Inverse of `_float_to_key`."""
    bits = keys - (1 << 31)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int32).view(torch.float32)
