"""How GGUF files store a model family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GGUFFormat:
    """The names that llama.cpp has for a family.

    name: general.architecture; the metadata keys begin with it. config: keys of config.json that the name
    implies. float_keys: keys of config.json that the metadata store as numbers, and their metadata keys
    without that beginning. window_config: keys of config.json for a sliding window in every layer; None where
    the family has none. modules: Hugging Face modules of a layer with another GGUF name than Llama's.
    interleaved: rotary embedding pairs the rows 2i and 2i + 1 of a query or key head, not i and
    i + head_dim / 2 as in Hugging Face checkpoints.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    float_keys: Mapping[str, str] = field(default_factory=dict)
    window_config: Mapping[str, Any] | None = None
    modules: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
