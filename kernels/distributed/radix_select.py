"""Thresholds without a sort: the largest t for which enough of a row is at or above it.

Enough is a count or a mass. A float32 is looked for by its four bytes, the most significant first: each pass
sums the weights of all values by their next byte, the sums of all parts of the vocabulary are added, and the
byte is chosen at which they reach what is wanted. Weights are integers, so that the sums are exact and the
same however the vocabulary is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .communicator import Communicator


def weighted_kth(values: Tensor, weights: Tensor, target: Tensor, comm: Communicator) -> Tensor:
    """The largest t [rows] at or above which the weights of all parts sum to `target` [rows] or more.

    values [rows, columns] float32; weights the same, int64.
    """
    keys = _float_to_key(values)
    prefix, above = torch.zeros_like(target), torch.zeros_like(target)  # the key's bytes so far; beyond them
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
    """Whole numbers from 0 to 2³² − 1 that are ordered as the float32 values are; −0 and 0 are one."""
    bits = torch.where(values == 0, 0.0, values).view(torch.int32).long()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) + (1 << 31)


def _key_to_float(keys: Tensor) -> Tensor:
    """The float32 values of such numbers."""
    bits = keys - (1 << 31)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int32).view(torch.float32)
