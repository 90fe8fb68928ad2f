"""The rotary embedding that a config.json asks for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..kernels.common.errors import InputError, quoted
from .common.config_reader import Fields, wrong
from .layers.rotary_embedding import DynamicRope, LinearRope, Llama3Rope, Rope, YarnRope

if TYPE_CHECKING:
    from collections.abc import Mapping

KINDS = ("default", "linear", "llama3", "yarn", "dynamic")
ORIGINAL = "original_max_position_embeddings"
MAX_THETA, MAX_FACTOR = 1e15, 1e6


def read_rope(config: Fields, trained: int, head_dim: int) -> Rope:
    """The rotary embedding of a config.json, in the spelling of transformers 4 or 5.

    `trained` is its max_position_embeddings. Raises InputError for a kind that is not in KINDS, by its name.
    """
    section = _section(config)
    kind = section.get("rope_type", section.get("type", "default"))
    if kind not in KINDS:
        raise wrong("rope_type", kind, f"known are {', '.join(KINDS)}")
    found = Fields({**config.data, **section})
    if found.number("partial_rotary_factor", 1.0, 0, 1) != 1:
        raise wrong("partial_rotary_factor", found.data["partial_rotary_factor"], "only 1 is supported")
    theta = found.number("rope_theta", 10_000.0, 2, MAX_THETA)
    # as transformers has it, the model's own key stands before that of the section
    original = config.size(ORIGINAL, Fields(section).size(ORIGINAL, trained))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "yarn":
        return _yarn(found, theta, trained, original)
    factor = found.number("factor", None, 1, MAX_FACTOR)
    if kind == "linear":
        return LinearRope(theta=theta, factor=factor)
    if kind == "llama3":
        return _llama3(found, theta, factor, original)
    if head_dim == 2:
        raise wrong("head_dim", head_dim, "a dynamic rope needs more than one pair")
    return DynamicRope(theta=theta, factor=factor, original=trained)


def _section(config: Fields) -> Mapping[str, Any]:
    old, new = config.object("rope_scaling"), config.object("rope_parameters")
    if old and new and old != new:
        raise InputError(
            f"config.json has rope_scaling {quoted(old)} and rope_parameters {quoted(new)}; it must have one"
        )
    section = old or new
    for key, value in section.items():
        if isinstance(value, dict):
            raise wrong("rope_parameters", section, f"{key!r} must be no object: all layers turn alike")
    return {key: value for key, value in section.items() if value is not None}


def _llama3(found: Fields, theta: float, factor: float, original: int) -> Llama3Rope:
    low = found.number("low_freq_factor", None, 1e-3, 1e6)
    high = found.number("high_freq_factor", None, 1e-3, 1e6)
    if high <= low:
        raise wrong("high_freq_factor", high, f"it must be above low_freq_factor, which is {low:g}")
    return Llama3Rope(theta=theta, factor=factor, low=low, high=high, original=original)


def _yarn(found: Fields, theta: float, trained: int, original: int) -> YarnRope:
    factor = found.number("factor", trained / original, 1, MAX_FACTOR)
    fast, slow = (found.number(f"beta_{key}", beta, 1e-3, 1e6) for key, beta in (("fast", 32), ("slow", 1)))
    if fast < slow:
        raise wrong("beta_fast", fast, f"it must be at least beta_slow, which is {slow:g}")
    magnitude = _magnitude(factor, 1.0)
    if found.has("mscale") and found.has("mscale_all_dim"):
        scales = [found.number(key, None, 0, 1e3) for key in ("mscale", "mscale_all_dim")]
        if all(scales):
            magnitude = _magnitude(factor, scales[0]) / _magnitude(factor, scales[1])
    magnitude = found.number("attention_factor", magnitude, 1e-3, 1e3)
    return YarnRope(
        theta=theta,
        factor=factor,
        magnitude=magnitude,
        original=original,
        fast=fast,
        slow=slow,
        truncate=found.flag("truncate", True),
    )


def _magnitude(factor: float, scale: float) -> float:
    """How much louder queries and keys become, so that attention over more tokens stays as sharp."""
    return 0.1 * scale * math.log(factor) + 1.0
