"""The Triton kernels as one backend."""

from __future__ import annotations

from torch import Tensor

from ..backend import Backend
from ..ops import Ops
from .cache import TritonKV
from .norm import add_rms_norm
from .steer import steer
from .swiglu import swiglu


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """See `kernels.norm.rms_norm`, of whole rows."""
    return add_rms_norm(x.contiguous(), None, weight, eps)[1]


TRITON = Backend(Ops(rms_norm=rms_norm, swiglu=swiglu), TritonKV, TritonKV.page_bytes, steer, graphs=True)
