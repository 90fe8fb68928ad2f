"""All registered kernels: compiled and checked in the tests, listed by `trimtab profile kernels`."""

from __future__ import annotations

from .layers import LAYER_SPECS
from .lm_head import LM_HEAD_STEER
from .spec import KernelSpec
from .steering import INVARIANT_STEER, ITERATE, STEER

SPECS: tuple[KernelSpec, ...] = (STEER, INVARIANT_STEER, LM_HEAD_STEER, ITERATE, *LAYER_SPECS)
