"""The Triton kernels as two backends: the fastest, and one by which a row's bits are its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from .. import lm_head
from ..backend import Backend, one_pair
from ..lm_head import Head
from ..ops import Ops
from .batch_invariant_matmul import matmul
from .jit_monitor import Compiles
from .lm_head.launch import lm_head_steer
from .paged_kv_cache import InvariantKV, TritonKV
from .rms_norm import rms_norm
from .steering.step import invariant_steer, steer
from .swiglu import swiglu
from .tuning import of as launches_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..steering.state import Edits, Groups, SteerTable
    from ..steering.step import Choice


def choose(
    head: Head,
    hidden: Tensor,
    groups: Groups,
    table: SteerTable,
    edits: Edits | None = None,
    *,
    trace: bool = True,
    top: bool = False,
) -> Choice:
    """See `kernels.lm_head.choose`; the product and the steering in one where that is quicker."""
    rows = hidden[: len(groups.branch)]
    return lm_head_steer(rows, head.weight, groups, table, edits, trace=trace, top=top)


choose_apart = partial(lm_head.choose, by=steer)
"""As `choose`, always one after the other."""
TRITON = Backend(
    Ops(rms_norm=rms_norm, swiglu=swiglu, head=Head),
    TritonKV,
    choose,
    graphs=True,
    compiles=Compiles,
    warm_shapes=lambda device, most: launches_of(device).head.shapes(most),
)
INVARIANT = replace(
    TRITON,
    ops=replace(TRITON.ops, matmul=matmul, head=partial(Head, product=partial(matmul, dtype=torch.float32))),
    cache=InvariantKV,
    choose=partial(lm_head.choose, by=invariant_steer),
    warm_shapes=one_pair,
)
"""Every launch runs the same code whatever is decoded with it, and no sum goes across rows."""
