"""Top-k, top-p and min-p as one threshold per row; ties are kept.

A row's support is {v : s(v) ≥ t}. It depends on values only, not on ids or sort order; it equals the support
by sorting, except that all tokens that tie at the threshold are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed.vocab_parallel import UNSHARDED, UnshardedVocab
from .feature import Feature, HeadOutput
from .sampling import is_random


def truncation_threshold(
    scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, shard: UnshardedVocab = UNSHARDED
) -> Tensor:
    """t [rows, 1] for scores [rows, vocab], applied in the order top-k, top-p, min-p.

    top_k [rows] int64, 0 is off; top_p [rows] in (0, 1], 1 is off; min_p [rows] in [0, 1], 0 is off.
    """
    threshold = scores.new_full((len(scores), 1), -torch.inf)
    if bool((top_k > 0).any()):
        threshold = shard.kth_largest(scores, top_k)
    if bool((top_p < 1).any()):
        truncated = scores.masked_fill(scores < threshold, -torch.inf)
        threshold = torch.maximum(threshold, shard.nucleus_threshold(truncated, top_p))
    if bool((min_p > 0).any()):
        floor = shard.amax(scores)[:, None] + min_p[:, None].to(scores.dtype).log()
        threshold = torch.maximum(threshold, floor)
    return threshold


TOP_K = Feature(
    is_used=lambda columns: is_random(columns) and columns["top_k"] > 0,
    warmup={"temperature": 1.0, "top_k": 2},
    head_output=HeadOutput.SCORES,
)
TOP_P = Feature(
    is_used=lambda columns: is_random(columns) and columns["top_p"] < 1,
    warmup={"temperature": 1.0, "top_p": 0.9},
    head_output=HeadOutput.SCORES,
)
MIN_P = Feature(
    is_used=lambda columns: is_random(columns) and columns["min_p"] > 0,
    warmup={"temperature": 1.0, "min_p": 0.1},
    head_output=HeadOutput.SCORES,
)
TRUNCATION = TOP_K, TOP_P, MIN_P
