"""Floor of the step time: the matrix multiplications of a decoding step alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from ...engine.execution.model_runner import inference_context
from ...kernels.cpu.row_padding import pad_rows
from ..common.statistics import median

if TYPE_CHECKING:
    from ...engine.engine import Engine

NUM_TRIALS = 5


class MatmulFloor:
    """All multiplications with weights, LM head included, on random activations of `num_rows` rows."""

    def __init__(self, engine: Engine, num_rows: int) -> None:
        self._model, config = engine._core.runner.model, engine.model_config
        tensor_kwargs: dict[str, Any] = {"dtype": self._model._compute_dtype, "device": self._model.device}
        num_rows = len(pad_rows(range(num_rows), self._model.device))
        with inference_context():
            self._hidden = torch.randn(num_rows, config.hidden_size, **tensor_kwargs)
            self._attn_output = torch.randn(num_rows, config.num_heads * config.head_dim, **tensor_kwargs)

    def measure(self) -> float:
        """Median seconds of NUM_TRIALS runs."""
        return median([self._time_once() for _ in range(NUM_TRIALS)])

    @inference_context()
    def _time_once(self) -> float:
        model, x = self._model, self._hidden.clone()
        start = time.perf_counter()
        for layer in model._layers:
            layer.qkv_proj(x)
            x = layer.o_proj.add_residual(x, self._attn_output)
            x = layer.down_proj.add_residual(x, layer.gate_up_proj(x))
        model.compute_logits(x.to(model.lm_head.dtype))
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - start
