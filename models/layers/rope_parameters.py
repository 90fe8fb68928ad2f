"""Parse the RoPE settings of a config.json."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, short_repr
from ..common.config_reader import ConfigReader, config_error
from .rotary_embedding import DynamicRope, LinearRope, Llama3Rope, Rope, YarnRope

if TYPE_CHECKING:
    from collections.abc import Mapping

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic")
ORIGINAL_MAX_POSITION = "original_max_position_embeddings"
MAX_THETA, MAX_FACTOR = 1e15, 1e6


def parse_rope(reader: ConfigReader, max_position: int, head_dim: int) -> Rope:
    """The rotary embedding of a config.json, as written by transformers 4 or 5.

    `max_position` is its max_position_embeddings. Raises InputError for a type that is not in ROPE_TYPES.
    """
    section = _rope_section(reader)
    rope_type = section.get("rope_type", section.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise config_error("rope_type", rope_type, f"expected one of {', '.join(ROPE_TYPES)}")
    rope_reader = ConfigReader({**reader.data, **section})
    if rope_reader.get_float("partial_rotary_factor", 1.0, 0, 1) != 1:
        raise config_error(
            "partial_rotary_factor", rope_reader.data["partial_rotary_factor"], "only 1 is supported"
        )
    theta = rope_reader.get_float("rope_theta", 10_000.0, 2, MAX_THETA)
    # as in transformers, the top-level key takes precedence over the section's
    original_max_position = reader.get_int(
        ORIGINAL_MAX_POSITION, ConfigReader(section).get_int(ORIGINAL_MAX_POSITION, max_position)
    )
    if rope_type == "default":
        return Rope(theta=theta)
    if rope_type == "yarn":
        return _parse_yarn(rope_reader, theta, max_position, original_max_position)
    factor = rope_reader.get_float("factor", None, 1, MAX_FACTOR)
    if rope_type == "linear":
        return LinearRope(theta=theta, factor=factor)
    if rope_type == "llama3":
        return _parse_llama3(rope_reader, theta, factor, original_max_position)
    if head_dim == 2:
        raise config_error("head_dim", head_dim, "it must be at least 4 for a dynamic rope")
    return DynamicRope(theta=theta, factor=factor, original_max_position=max_position)


def _rope_section(reader: ConfigReader) -> Mapping[str, Any]:
    old, new = reader.get_dict("rope_scaling"), reader.get_dict("rope_parameters")
    if old and new and old != new:
        raise InputError(
            f"config.json has rope_scaling {short_repr(old)} and rope_parameters {short_repr(new)}; it must "
            f"have only one of them"
        )
    section = old or new
    for key, value in section.items():
        if isinstance(value, dict):
            raise config_error(
                "rope_parameters", section, f"{key!r} must not be an object: per-layer RoPE is not supported"
            )
    return {key: value for key, value in section.items() if value is not None}


def _parse_llama3(
    reader: ConfigReader, theta: float, factor: float, original_max_position: int
) -> Llama3Rope:
    low = reader.get_float("low_freq_factor", None, 1e-3, 1e6)
    high = reader.get_float("high_freq_factor", None, 1e-3, 1e6)
    if high <= low:
        raise config_error("high_freq_factor", high, f"it must be above low_freq_factor, which is {low:g}")
    return Llama3Rope(
        theta=theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=original_max_position,
    )


def _parse_yarn(
    reader: ConfigReader, theta: float, max_position: int, original_max_position: int
) -> YarnRope:
    factor = reader.get_float("factor", max_position / original_max_position, 1, MAX_FACTOR)
    beta_fast, beta_slow = (
        reader.get_float(f"beta_{suffix}", default, 1e-3, 1e6)
        for suffix, default in (("fast", 32), ("slow", 1))
    )
    if beta_fast < beta_slow:
        raise config_error("beta_fast", beta_fast, f"it must be at least beta_slow, which is {beta_slow:g}")
    attention_factor = _yarn_mscale(factor, 1.0)
    if reader.has("mscale") and reader.has("mscale_all_dim"):
        mscales = [reader.get_float(key, None, 0, 1e3) for key in ("mscale", "mscale_all_dim")]
        if all(mscales):
            attention_factor = _yarn_mscale(factor, mscales[0]) / _yarn_mscale(factor, mscales[1])
    attention_factor = reader.get_float("attention_factor", attention_factor, 1e-3, 1e3)
    return YarnRope(
        theta=theta,
        factor=factor,
        attention_factor=attention_factor,
        original_max_position=original_max_position,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=reader.get_bool("truncate", True),
    )


def _yarn_mscale(factor: float, mscale: float) -> float:
    """The scale of queries and keys that keeps attention as sharp over a longer context."""
    return 0.1 * mscale * math.log(factor) + 1.0
