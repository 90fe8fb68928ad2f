"""The rotary scaling of a GGUF file, as a config.json expresses it.

Linear and YaRN scaling are in the metadata. Llama 3.1's is in the tensor rope_freqs.weight: a divisor for
each of the head_dim / 2 frequencies. With t = turns per position, that divisor is 1 / m(t), where

    m = 1                                  for t > high / original
    m = 1 / factor                         for t < low / original
    m = 1 / factor + s · (1 - 1 / factor)  between, s = (t · original - low) / (high - low)

m depends on low / original and high / original alone, so `original` is a choice, and the two others follow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels.common.errors import InputError, quoted

if TYPE_CHECKING:
    from .reader import GGUFFile

FREQUENCIES = "rope_freqs.weight"
LOW, HIGH, ORIGINAL = 1.0, 4.0, 8192
"""Of every model published with this scaling; the file's own are found when they differ."""
TOLERANCE = 4e-6
"""On m: twice the error of a file. A frequency base^-x is off by 2⁻²⁴ · (1 + ln base), with ln base near 13;
s multiplies that by at most high / (high - low) = 4 / 3, and some roundings follow."""
UNSCALED = {"attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}
"""Further switches of a scaling, and the value of each that changes nothing."""
YARN = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
"""Of YaRN, by config.json's names: llama.cpp's converter takes them from there, its decoders ignore them."""


def rope_scaling(file: GGUFFile, prefix: str, theta: float, width: int) -> dict[str, Any] | None:
    """config.json's "rope_scaling"; None for plain rotary embedding. Metadata keys begin with `prefix`.

    Raises InputError for a scaling that no config.json expresses.
    """
    named, divided = _named(file, prefix), _divided(file, theta, width)
    if named and divided:
        raise InputError(f"the GGUF file scales rotary embedding twice, by {FREQUENCIES} and its metadata")
    return named or divided


def _named(file: GGUFFile, prefix: str) -> dict[str, Any] | None:
    key = f"{prefix}rope.scaling."
    for name, usual in UNSCALED.items():
        if (value := file.get(key + name, usual)) != usual:
            raise InputError(
                f"the GGUF file's {key}{name} is {quoted(value)}, which is not supported; known is {usual}"
            )
    factor = file.number(f"{key}factor", file.number(f"{prefix}rope.scale_linear", 1.0))
    kind = file.get(f"{key}type", "linear")
    if kind == "none" or factor == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise InputError(f"the GGUF file's {key}type is {quoted(kind)}; known are none, linear, yarn")
    trained = file.size(f"{key}original_context_length", file.size(f"{prefix}context_length"))
    own = {ours: file.number(key + theirs) for theirs, ours in YARN.items() if key + theirs in file.metadata}
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained, **own}


def _divided(file: GGUFFile, theta: float, width: int) -> dict[str, Any] | None:
    if FREQUENCIES not in file.tensors:
        return None
    stored = file.tensors[FREQUENCIES]
    if stored.shape != (width // 2,):
        raise InputError(
            f"the GGUF file's {FREQUENCIES} is of the shape {list(stored.shape)}; "
            f"it must be {width // 2} numbers of at least 1"
        )
    divisors = stored.rows(0, 1).numpy()[0].astype(np.float64)
    turns = theta ** -(np.arange(0, width, 2) / width) / (2 * math.pi)
    if not (np.isfinite(divisors) & (divisors >= 1)).all():
        raise InputError(
            f"the GGUF file's {FREQUENCIES} is {quoted(divisors.tolist())}; "
            f"it must be {len(turns)} numbers of at least 1"
        )
    if (divisors == 1).all():
        return None
    factor = float(divisors.max())
    for low, high in _limits(1 / divisors, turns, factor):
        if np.abs(_multiplier(turns, factor, low, high) - 1 / divisors).max() <= TOLERANCE:
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": ORIGINAL,
            }
    raise InputError(
        f"the GGUF file's {FREQUENCIES} is not Llama 3.1's scaling; no other is supported in this form"
    )


def _limits(found: np.ndarray, turns: np.ndarray, factor: float) -> list[tuple[float, float]]:
    """Pairs (low, high) worth trying: the usual, then the line through what lies between the two ends."""
    pairs = [(LOW, HIGH)]
    between = (found < 1) & (found > 1 / factor)
    if between.sum() >= 2:
        slope, start = np.polyfit(turns[between], (found[between] - 1 / factor) / (1 - 1 / factor), 1)
        if slope > 0:
            pairs.append((float(-start / slope * ORIGINAL), float((1 - start) / slope * ORIGINAL)))
    return [(low, high) for low, high in pairs if 0 < low < high]


def _multiplier(turns: np.ndarray, factor: float, low: float, high: float) -> np.ndarray:
    smooth = np.clip((turns * ORIGINAL - low) / (high - low), 0, 1)
    return np.asarray(1 / factor + smooth * (1 - 1 / factor))
