"""The two Triton backends: `TRITON`, the fastest, and the batch-invariant `INVARIANT`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from .. import lm_head
from ..backend import Backend, min_warmup_shapes
from ..lm_head import LMHead
from ..ops import Ops
from ..specs.layers import LAYER_OPS, MATMUL
from .jit_monitor import JITMonitor
from .lm_head.launch import lm_head_steer
from .paged_kv_cache import BatchInvariantPagedKVCache, TritonPagedKVCache
from .steering.step import invariant_steer, steer
from .tuning import get_launch_configs

if TYPE_CHECKING:
    from torch import Tensor

    from ..steering.layout import LogitEdits, RequestLayout
    from ..steering.state import SteeringState
    from ..steering.step import SamplerOutput


def sample_fused(
    head: LMHead,
    hidden: Tensor,
    layout: RequestLayout,
    state: SteeringState,
    edits: LogitEdits | None = None,
    *,
    trace: bool = True,
    top: bool = False,
) -> SamplerOutput:
    """See `kernels.lm_head.sample_from_hidden`; fuses LM head and steering step where that is faster.

    A soft cap needs each branch's logits: those of mixed hidden states are not the mixed logits.
    """
    if head.softcap is not None:
        return sample_unfused(head, hidden, layout, state, edits, trace=trace, top=top)
    head_inputs = hidden[: len(layout.branch_of_row)]
    return lm_head_steer(head_inputs, head.weight, layout, state, edits, trace=trace, top=top)


sample_unfused = partial(lm_head.sample_from_hidden, sampler=steer)
"""Like `sample_fused`, but never fused."""
TRITON = Backend(
    Ops({spec.name: spec.launch for spec in LAYER_OPS}, LMHead),
    TritonPagedKVCache,
    sample_fused,
    cuda_graphs=True,
    jit_monitor=JITMonitor,
    warmup_shapes=lambda device, max_rows: get_launch_configs(device).head.warmup_shapes(max_rows),
)
INVARIANT = replace(
    TRITON,
    ops=replace(
        TRITON.ops,
        matmul=MATMUL.launch,
        make_lm_head=partial(LMHead, matmul_fn=partial(MATMUL.launch, dtype=torch.float32)),
    ),
    cache_cls=BatchInvariantPagedKVCache,
    sample=partial(lm_head.sample_from_hidden, sampler=invariant_steer),
    warmup_shapes=min_warmup_shapes,
)
"""Batch-invariant: every launch runs the same code whatever the batch, and no sum goes across rows."""
