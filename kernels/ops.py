"""A backend's implementations of a decoder's operations, collected in one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from .lm_head import AnyLMHead, make_lm_head
from .reference.matmul import Matmul
from .specs.layers import LAYER_OPS


@dataclass(frozen=True)
class Ops:
    """One implementation of each operation; the references document the shapes.

    layer_ops: by name, the operations that `kernels.specs.layers` registers for decoder layers. Each is also
    an attribute: `ops.rms_norm(x, weight, eps)`.
    make_lm_head: builds the LM head from its weight and the soft cap of the logits (None for none), in the
    form that the backend's `sample` expects.
    matmul: multiplies by weights; None for that of the weights' format, see `kernels.linear`.
    """

    layer_ops: Mapping[str, Callable[..., Tensor]] = field(hash=False)
    make_lm_head: Callable[[Tensor, float | None], AnyLMHead]
    matmul: Matmul | None = None

    def __post_init__(self) -> None:
        vars(self).update(self.layer_ops)  # a call looks up one attribute

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Tensor]: ...


TORCH_OPS = Ops({spec.name: spec.reference for spec in LAYER_OPS}, make_lm_head)
"""The torch reference implementations."""
