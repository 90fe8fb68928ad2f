"""Every kernel that is compiled in the tests and listed by `trimtab profile kernels`."""

from __future__ import annotations

from ..gpu.cases import INVARIANT_STEER, ITERATE, STEER
from ..gpu.layer_cases import LAYER_SPECS
from ..gpu.lm_head_steer_cases import LM_HEAD_STEER
from ..spec import KernelSpec

SPECS: tuple[KernelSpec, ...] = (STEER, INVARIANT_STEER, LM_HEAD_STEER, ITERATE, *LAYER_SPECS)
