"""A step's matrix products alone: what is left of a decoding step when everything else is taken away."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from ...engine.execution.model_runner import plain_tensors
from ...kernels.cpu.linear import filled
from ..common.statistics import median

if TYPE_CHECKING:
    from ...engine.engine import Engine

TRIES = 5


class Products:
    """All products with the weights for `rows` branches, the head's among them, on random activations."""

    def __init__(self, engine: Engine, rows: int) -> None:
        self._model, config = engine._core.runner.model, engine.model_config
        like: dict[str, Any] = {"dtype": self._model._arithmetic, "device": self._model.device}
        rows = len(filled(range(rows), self._model.device))
        with plain_tensors():
            self._hidden = torch.randn(rows, config.hidden_size, **like)
            self._attended = torch.randn(rows, config.num_heads * config.head_dim, **like)

    def seconds(self) -> float:
        """The median time of some tries."""
        return median([self._once() for _ in range(TRIES)])

    @plain_tensors()
    def _once(self) -> float:
        model, x = self._model, self._hidden.clone()
        start = time.perf_counter()
        for layer in model._layers:
            layer.qkv(x)
            x = layer.output.add_to(x, self._attended)
            x = layer.down.add_to(x, layer.gate_up(x))
        model.logits(x.to(model.head.dtype))
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - start
