"""The Triton kernels as two backends: the fastest, and one by which a row's bits are its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from .. import lm_head
from ..backend import Backend, min_warmup_shapes
from ..lm_head import LMHead
from ..ops import Ops
from .batch_invariant_matmul import matmul
from .jit_monitor import JITMonitor
from .lm_head.launch import lm_head_steer
from .paged_kv_cache import BatchInvariantPagedKVCache, TritonPagedKVCache
from .rms_norm import rms_norm
from .steering.step import invariant_steer, steer
from .swiglu import swiglu
from .tuning import get_launch_configs

if TYPE_CHECKING:
    from torch import Tensor

    from ..steering.state import LogitEdits, RequestLayout, SteeringState
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
    """See `kernels.lm_head.sample_from_hidden`; the product and the steering in one where that is quicker.

    A soft cap needs each branch's logits: those of mixed hidden states are not the mixed logits.
    """
    if head.softcap is not None:
        return sample_unfused(head, hidden, layout, state, edits, trace=trace, top=top)
    head_inputs = hidden[: len(layout.branch_of_row)]
    return lm_head_steer(head_inputs, head.weight, layout, state, edits, trace=trace, top=top)


sample_unfused = partial(lm_head.sample_from_hidden, sampler=steer)
"""As `choose`, always one after the other."""
TRITON = Backend(
    Ops(rms_norm=rms_norm, swiglu=swiglu, make_lm_head=LMHead),
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
        matmul=matmul,
        make_lm_head=partial(LMHead, matmul_fn=partial(matmul, dtype=torch.float32)),
    ),
    cache_cls=BatchInvariantPagedKVCache,
    sample=partial(lm_head.sample_from_hidden, sampler=invariant_steer),
    warmup_shapes=min_warmup_shapes,
)
"""Every launch runs the same code whatever is decoded with it, and no sum goes across rows."""
