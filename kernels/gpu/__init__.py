"""The operations as Triton kernels, one file an operation; the rest of the package imports this on demand.

Triton decides as it is imported whether functions are interpreted (TRITON_INTERPRET=1) or compiled.
"""

from __future__ import annotations

from ..spec import KernelSpec
from .cases import INVARIANT_STEER, ITERATE, STEER
from .layer_cases import LAYER_SPECS
from .lm_head_steer_cases import LM_HEAD_STEER

SPECS: tuple[KernelSpec, ...] = (STEER, INVARIANT_STEER, LM_HEAD_STEER, ITERATE, *LAYER_SPECS)
"""Every kernel that is compiled in the tests and listed by `trimtab profile kernels`."""
