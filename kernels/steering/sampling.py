"""Sampling parameters of a request, as the step reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GREEDY_BELOW = 1e-5
"""A lower temperature is greedy: scores divided by it would overflow float32."""


@dataclass(frozen=True)
class RowSampling:
    """Sampling parameters of one request: temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


def is_random(columns: Mapping[str, Any]) -> bool:
    """Whether a request with these columns draws its tokens, rather than taking the likeliest."""
    return bool(columns["temperature"] >= GREEDY_BELOW)
