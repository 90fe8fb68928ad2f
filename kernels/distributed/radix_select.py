"""Thresholds without a sort: the largest t for which enough of a row lies at or above it.

Enough is a count or a mass. A float32 is looked for by its four bytes, the most significant first: each pass
sums the weights of all values by their next byte, the sums of all parts of the vocabulary are added, and the
byte is chosen at which they reach what is wanted. Weights are integers, so that the sums are exact and the
same however the vocabulary is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .communicator import Peers


def largest(values: Tensor, weights: Tensor, wanted: Tensor, peers: Peers) -> Tensor:
    """The largest t [rows] at or above which the weights of all parts sum to `wanted` [rows] or more.

    values [rows, columns] float32; weights the same, int64.
    """
    keys = _ordered(values)
    found, above = torch.zeros_like(wanted), torch.zeros_like(wanted)  # the key's bytes so far; beyond them
    for shift in (24, 16, 8, 0):
        inside = keys >> (shift + 8) == found[:, None]
        sums = weights.new_zeros(len(values), 256)
        sums.scatter_add_(1, (keys >> shift) & 255, torch.where(inside, weights, 0))
        sums = peers.sum(sums)
        reached = above[:, None] + sums.flip(-1).cumsum(-1).flip(-1)
        byte = ((reached >= wanted[:, None]).sum(-1, keepdim=True) - 1).clamp(min=0)
        above = (reached - sums).gather(-1, byte)[:, 0]
        found = found << 8 | byte[:, 0]
    return _value(found)


def _ordered(values: Tensor) -> Tensor:
    """Whole numbers from 0 to 2³² − 1 that are ordered as the float32 values are; −0 and 0 are one."""
    bits = torch.where(values == 0, 0.0, values).view(torch.int32).long()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) + (1 << 31)


def _value(keys: Tensor) -> Tensor:
    """The float32 values of such numbers."""
    bits = keys - (1 << 31)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int32).view(torch.float32)
