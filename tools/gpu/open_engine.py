"""Engines as they are checked: steps captured as where they serve, kernels compiled as they are needed."""

from __future__ import annotations

from typing import Any

from ...engine.engine import Engine


def opened(model: str, device: str, captured: bool = True, **fields: Any) -> Engine:
    """An engine without the launches that make every kernel ready, of which few are looked at."""
    engine = Engine.from_pretrained(model, device=device, enforce_eager=True, **fields)
    core, config = engine._core, engine.config
    if captured and core.looks_ahead and config.kernels == "triton":
        length = config.max_model_len or engine.model_config.context
        core.runner.capture(config.max_num_seqs, length)
    return engine
