"""Which tokens may be drawn: top-k, top-p and min-p as one threshold a row, ties kept.

A row's support is {v : s(v) ≥ t}. It depends on values only, never on ids or sort order; it equals that of
sorting but for tokens that tie at the threshold, which are all kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import search
from .shard import WHOLE, Shard, Whole

WINDOW = 1024
"""A nucleus is looked for among this many top tokens first, and by a full sort only where it is larger."""


def support_threshold(
    scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, shard: Whole = WHOLE
) -> Tensor:
    """t [rows, 1] for scores [rows, vocab], applied in the order top-k, top-p, min-p.

    top_k [rows] int64, 0 is off; top_p [rows] in (0, 1], 1 is off; min_p [rows] in [0, 1], 0 is off.
    """
    threshold = scores.new_full((len(scores), 1), -torch.inf)
    if bool((top_k > 0).any()):
        threshold = _kth_largest(scores, top_k, shard)
    if bool((top_p < 1).any()):
        kept = scores.masked_fill(scores < threshold, -torch.inf)
        threshold = torch.maximum(threshold, nucleus_threshold(kept, top_p, shard))
    if bool((min_p > 0).any()):
        floor = shard.amax(scores)[:, None] + min_p[:, None].to(scores.dtype).log()
        threshold = torch.maximum(threshold, floor)
    return threshold


def nucleus_threshold(scores: Tensor, top_p: Tensor, shard: Whole = WHOLE) -> Tensor:
    """t [rows, 1] such that {s ≥ t} is the smallest set of likeliest tokens with mass ≥ top_p of softmax(s).

    The token that crosses top_p belongs to the set; where top_p is 1 the threshold is −inf.
    """
    if isinstance(shard, Shard):
        return search.nucleus(scores, top_p, shard)
    total = scores.logsumexp(-1, keepdim=True)
    size = min(WINDOW, scores.shape[-1])
    values = scores.topk(size).values
    mass = (values - total).exp().double().cumsum(-1)
    wanted = top_p[:, None].double()
    if bool(((mass[:, -1:] < wanted) & (wanted < 1)).any()) and size < scores.shape[-1]:
        values = scores.sort(-1, descending=True).values
        mass = (values - total).exp().double().cumsum(-1)
    crossing = (mass < wanted).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    return values.gather(-1, crossing).masked_fill(wanted >= 1, -torch.inf)


def _kth_largest(scores: Tensor, top_k: Tensor, shard: Whole) -> Tensor:
    """The top_k-th largest score of each row [rows, 1]; −inf where top_k is 0 or no smaller than the row."""
    if isinstance(shard, Shard):
        return search.kth_largest(scores, top_k, shard)
    vocab = scores.shape[-1]
    off = (top_k == 0) | (top_k >= vocab)
    wanted = torch.where(off, 1, top_k)
    values = scores.topk(int(wanted.max())).values
    return values.gather(-1, wanted[:, None] - 1).masked_fill(off[:, None], -torch.inf)
