"""Open engines for checks: CUDA graphs captured as when serving, kernels compiled on first use."""

from __future__ import annotations

from typing import Any

from ...engine.engine import Engine


def open_engine(model: str, device: str, captured: bool = True, **fields: Any) -> Engine:
    """Open an engine without warm-up launches of all kernels, since a check uses few of them."""
    engine = Engine.from_pretrained(model, device=device, enforce_eager=True, **fields)
    core, config = engine._core, engine.config
    if captured and core.async_scheduling and config.kernels == "triton":
        max_seq_len = config.max_model_len or engine.model_config.context_length
        core.runner.capture_graphs(config.max_num_seqs, max_seq_len)
    return engine
