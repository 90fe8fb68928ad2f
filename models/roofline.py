"""Roofline model of a decoder step: the minimum bytes and FLOPs of each operation, from the sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..kernels.specs import roofline
from ..kernels.specs.roofline import OpCost
from .decoder import EMBEDDING, norms_per_layer, param_shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .config import ModelConfig

MATMUL_STAGES = ("qkv", "output", "mlp", "head")
"""Stages that multiply activations with weights."""
LOGIT_BYTES = 4
"""Bytes of a logit as the steering step reads it."""


@dataclass(frozen=True)
class StepOp:
    """An operation of a step: its stage, how often it runs, and the cost of one run."""

    stage: str
    count: float
    cost: OpCost

    @property
    def bytes(self) -> float:
        return self.count * self.cost.bytes

    @property
    def flops(self) -> float:
        return self.count * self.cost.flops

    def roofline_seconds(self, bandwidth: float, peak_flops: float) -> float:
        """The roofline time of all runs."""
        return self.count * self.cost.roofline_seconds(bandwidth, peak_flops)


@dataclass(frozen=True)
class SequenceShape:
    """Branches of equal shape: each computes the last `num_new` of its `context_len` tokens in the step."""

    num_branches: float
    context_len: float
    num_new: float = 1

    @property
    def num_tokens(self) -> float:
        return self.num_branches * self.num_new


def decode_step_ops(
    config: ModelConfig,
    num_rows: float,
    context_len: float,
    itemsize: int,
    tp_size: int = 1,
    bytes_per_weight: float | None = None,
) -> list[StepOp]:
    """A step in which `num_rows` branches decode one token each, at a mean context of `context_len`."""
    sequences = [SequenceShape(num_rows, context_len)]
    return step_ops(config, sequences, num_rows, itemsize, tp_size, bytes_per_weight=bytes_per_weight)


def step_ops(
    config: ModelConfig,
    sequences: Sequence[SequenceShape],
    num_rows: float,
    itemsize: int,
    tp_size: int = 1,
    num_forwards: int = 1,
    bytes_per_weight: float | None = None,
) -> list[StepOp]:
    """The operations of a step on one of `tp_size` devices, which shard the heads, MLP and vocabulary.

    itemsize: bytes of an activation, and of a weight unless `bytes_per_weight` is given.

    num_rows: branches that sample a token. num_forwards: the step's tokens are split evenly over this many
    forward passes, each of which reads all weights. Communication between devices is not included.
    """
    matmul = partial(roofline.matmul, itemsize=itemsize, bytes_per_weight=bytes_per_weight)
    hidden_size, head_dim, num_layers = config.hidden_size, config.head_dim, config.num_layers
    num_heads, num_kv_heads = config.num_heads / tp_size, config.num_kv_heads / tp_size
    intermediate_size, vocab_size = config.intermediate_size / tp_size, config.vocab_size / tp_size
    num_tokens, num_layer_runs = sum(sequence.num_tokens for sequence in sequences), num_layers * num_forwards
    tokens_per_forward = num_tokens / num_forwards
    return [
        StepOp("embed", num_forwards, roofline.embedding(tokens_per_forward, hidden_size, itemsize)),
        StepOp(
            "norm",
            norms_per_layer(config) * num_layer_runs + num_forwards,
            roofline.norm(tokens_per_forward, hidden_size, itemsize),
        ),
        StepOp(
            "qkv",
            num_layer_runs,
            matmul(tokens_per_forward, hidden_size, (num_heads + 2 * num_kv_heads) * head_dim),
        ),
        StepOp(
            "rope",
            num_layer_runs,
            roofline.rope_and_write_kv(tokens_per_forward, num_heads, num_kv_heads, head_dim, itemsize),
        ),
        *(
            StepOp(
                "attention",
                num_calls,
                _attention_cost(run, num_heads, num_kv_heads, head_dim, itemsize, window),
            )
            for run in sequences
            for window, num_calls in _count_windows(config.sliding_windows).items()
        ),
        StepOp(
            "output",
            num_layer_runs,
            matmul(tokens_per_forward, num_heads * head_dim, hidden_size, accumulate=True),
        ),
        StepOp(
            "mlp",
            num_layer_runs,
            matmul(tokens_per_forward, hidden_size, 2 * intermediate_size),
        ),
        StepOp("mlp", num_layer_runs, roofline.swiglu(tokens_per_forward, intermediate_size, itemsize)),
        StepOp(
            "mlp",
            num_layer_runs,
            matmul(tokens_per_forward, intermediate_size, hidden_size, accumulate=True),
        ),
        StepOp("head", 1, matmul(num_rows, hidden_size, vocab_size)),
        StepOp("steer", 1, roofline.steer(num_rows, config.vocab_size, LOGIT_BYTES)),
    ]


def weight_bytes(config: ModelConfig, itemsize: int) -> float:
    """Weight bytes that a step reads, each weight once.

    An untied embedding is excluded: only the rows of the step's tokens are read.
    """
    sizes = {name: math.prod(shape) for name, shape in param_shapes(config).items()}
    num_params = sum(sizes.values()) - (0 if config.tie_word_embeddings else sizes[EMBEDDING])
    return num_params * itemsize


def kv_bytes(config: ModelConfig, num_rows: float, context_len: float, itemsize: int) -> float:
    """KV cache bytes that a step of `num_rows` branches reads, each with `context_len` tokens before it."""
    visible_tokens = sum(
        context_len if window is None else min(context_len, window) for window in config.sliding_windows
    )
    return num_rows * visible_tokens * config.kv_elements_per_token / config.num_layers * itemsize


def workspace_bytes(
    config: ModelConfig, num_tokens: float, num_rows: float, itemsize: int, tp_size: int = 1
) -> float:
    """Approximate activation memory of the largest step: `num_tokens` tokens, `num_rows` rows that sample.

    The larger of a layer's two peaks (queries, keys and values, plus the rotated queries and the attention
    output; or the MLP's intermediate activations), cos and sin in float32, and each row's logits in the
    model's dtype, in float32, mixed, steered and filtered.
    """
    hidden_size, head_dim = config.hidden_size, config.head_dim
    attention_bytes = (3 * config.num_heads + 2 * config.num_kv_heads) * head_dim / tp_size * itemsize
    mlp_bytes = 3 * config.intermediate_size / tp_size * itemsize
    bytes_per_token = 2 * hidden_size * itemsize + 2 * head_dim * 4 + max(attention_bytes, mlp_bytes)
    return num_tokens * bytes_per_token + num_rows * config.vocab_size * (itemsize + 16)


def _attention_cost(
    sequence: SequenceShape,
    num_heads: float,
    num_kv_heads: float,
    head_dim: int,
    itemsize: int,
    window: int | None,
) -> OpCost:
    return roofline.attention(
        sequence.num_branches,
        sequence.context_len,
        sequence.num_new,
        num_heads,
        num_kv_heads,
        head_dim,
        itemsize,
        window,
    )


def _count_windows(windows: Sequence[int | None]) -> dict[int | None, int]:
    """How many layers have each window."""
    return {window: windows.count(window) for window in dict.fromkeys(windows)}
