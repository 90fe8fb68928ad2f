"""Minimum bytes and FLOPs of an engine's decoding step; divided by the peaks, its minimum time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...models import roofline

if TYPE_CHECKING:
    from ...engine.engine import Engine


def weight_bytes(engine: Engine) -> float:
    """Bytes of weights that a step reads, each once, in the engine's dtype."""
    return roofline.weight_bytes(engine.model_config, engine.dtype.itemsize)


def kv_bytes(engine: Engine, rows: int, tokens: float) -> float:
    """Bytes of keys and values that a step of `rows` branches reads, each with `tokens` tokens of context."""
    return roofline.kv_bytes(engine.model_config, rows, tokens, engine.dtype.itemsize)


def product_flops(engine: Engine, rows: int) -> float:
    """Multiplications and additions of a step's matrix multiplications with weights, without attention."""
    ops = roofline.decode_step_ops(engine.model_config, rows, 1, engine.dtype.itemsize)
    return sum(op.flops for op in ops if op.stage in roofline.MATMUL_STAGES)
