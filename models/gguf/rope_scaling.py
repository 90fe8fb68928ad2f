"""Convert a GGUF file's RoPE scaling to config.json's `rope_scaling`.

Linear and YaRN scaling are in the metadata. Llama 3.1's is in the tensor rope_freqs.weight: a divisor for
each of the head_dim / 2 frequencies. With t = rotations per position, that divisor is 1 / m(t), where

    m = 1                                  for t > high / original
    m = 1 / factor                         for t < low / original
    m = 1 / factor + s · (1 - 1 / factor)  between, s = (t · original - low) / (high - low)

m depends only on low / original and high / original, so `original` can be chosen freely and determines the
other two.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels.common.errors import InputError, short_repr

if TYPE_CHECKING:
    from .reader import GGUFFile

ROPE_FREQS = "rope_freqs.weight"
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR, ORIGINAL_MAX_POSITION = 1.0, 4.0, 8192
"""The values of all published models with this scaling; others are fitted from the tensor."""
TOLERANCE = 4e-6
"""Tolerance on m: twice the rounding error of a file. A frequency base^-x has a relative error of
2⁻²⁴ · (1 + ln base), with ln base near 13; s multiplies that by at most high / (high - low) = 4 / 3, and some
roundings follow."""
NEUTRAL_SETTINGS = {"attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}
"""Scaling settings that are not supported, with their neutral values."""
YARN_KEYS = {
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
"""YaRN settings and their config.json names: llama.cpp's converter copies them, its decoders ignore them."""


def build_rope_scaling(file: GGUFFile, prefix: str, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return config.json's "rope_scaling"; None for unscaled RoPE. Metadata keys begin with `prefix`.

    Raises InputError for a scaling that config.json cannot express.
    """
    from_metadata, from_freqs = (
        _scaling_from_metadata(file, prefix),
        _scaling_from_freqs(file, theta, head_dim),
    )
    if from_metadata and from_freqs:
        raise InputError(f"the GGUF file has RoPE scaling in both {ROPE_FREQS} and its metadata")
    return from_metadata or from_freqs


def _scaling_from_metadata(file: GGUFFile, prefix: str) -> dict[str, Any] | None:
    key = f"{prefix}rope.scaling."
    for name, neutral in NEUTRAL_SETTINGS.items():
        if (value := file.get(key + name, neutral)) != neutral:
            raise InputError(
                f"the GGUF file's {key}{name} is {short_repr(value)}; only {neutral} is supported"
            )
    factor = file.get_float(f"{key}factor", file.get_float(f"{prefix}rope.scale_linear", 1.0))
    scaling_type = file.get(f"{key}type", "linear")
    if scaling_type == "none" or factor == 1.0:
        return None
    if scaling_type == "linear":
        return {"rope_type": "linear", "factor": factor}
    if scaling_type != "yarn":
        raise InputError(
            f"the GGUF file's {key}type is {short_repr(scaling_type)}; expected one of none, linear, yarn"
        )
    original_max_position = file.get_size(
        f"{key}original_context_length", file.get_size(f"{prefix}context_length")
    )
    yarn_args = {
        config_key: file.get_float(key + gguf_key)
        for gguf_key, config_key in YARN_KEYS.items()
        if key + gguf_key in file.metadata
    }
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original_max_position,
        **yarn_args,
    }


def _scaling_from_freqs(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    if ROPE_FREQS not in file.tensors:
        return None
    tensor = file.tensors[ROPE_FREQS]
    if tensor.shape != (head_dim // 2,):
        raise InputError(
            f"the GGUF file's {ROPE_FREQS} has shape {list(tensor.shape)}; expected [{head_dim // 2}]"
        )
    divisors = tensor.dequantize_rows(0, 1).numpy()[0].astype(np.float64)
    rotations = theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    if not (np.isfinite(divisors) & (divisors >= 1)).all():
        raise InputError(
            f"the GGUF file's {ROPE_FREQS} is {short_repr(divisors.tolist())}; "
            f"all values must be finite and at least 1"
        )
    if (divisors == 1).all():
        return None
    factor = float(divisors.max())
    for low, high in _freq_factor_candidates(1 / divisors, rotations, factor):
        if np.abs(_freq_multiplier(rotations, factor, low, high) - 1 / divisors).max() <= TOLERANCE:
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": ORIGINAL_MAX_POSITION,
            }
    raise InputError(
        f"the GGUF file's {ROPE_FREQS} does not match Llama 3.1's scaling, the only one supported"
    )


def _freq_factor_candidates(
    multipliers: np.ndarray, rotations: np.ndarray, factor: float
) -> list[tuple[float, float]]:
    """Candidates for (low, high): the published values, then a linear fit of the interpolated multipliers."""
    pairs = [(LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR)]
    in_ramp = (multipliers < 1) & (multipliers > 1 / factor)
    if in_ramp.sum() >= 2:
        slope, intercept = np.polyfit(
            rotations[in_ramp], (multipliers[in_ramp] - 1 / factor) / (1 - 1 / factor), 1
        )
        if slope > 0:
            pairs.append(
                (
                    float(-intercept / slope * ORIGINAL_MAX_POSITION),
                    float((1 - intercept) / slope * ORIGINAL_MAX_POSITION),
                )
            )
    return [(low, high) for low, high in pairs if 0 < low < high]


def _freq_multiplier(rotations: np.ndarray, factor: float, low: float, high: float) -> np.ndarray:
    smooth = np.clip((rotations * ORIGINAL_MAX_POSITION - low) / (high - low), 0, 1)
    return np.asarray(1 / factor + smooth * (1 - 1 / factor))
