"""Engines as they are checked: steps captured as where they serve, kernels compiled as they are needed."""

from __future__ import annotations

from typing import Any

from ...engine.engine import Engine


def open_engine(model: str, device: str, captured: bool = True, **fields: Any) -> Engine:
    """An engine without the launches that make every kernel ready, of which few are looked at."""
    engine = Engine.from_pretrained(model, device=device, enforce_eager=True, **fields)
    core, config = engine._core, engine.config
    if captured and core.async_scheduling and config.kernels == "triton":
        max_seq_len = config.max_model_len or engine.model_config.context_length
        core.runner.capture_graphs(config.max_num_seqs, max_seq_len)
    return engine
