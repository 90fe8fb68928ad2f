"""A steering or sampling feature as one object, and which features a step uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from ..distributed.vocab_parallel import UnshardedVocab
    from .layout import RequestLayout


class HeadOutput(IntEnum):
    """What a feature reads of the LM head's product. A head that is fused with the step stores no more."""

    TOKEN = 0
    """Nothing: the head's kernel chooses the token."""
    SCORES = 1
    """A row of mixed scores a request."""
    BASE_AND_MIX = 2
    """The logits of the first branch, and the mix of the others."""
    BRANCHES = 3
    """The logits of every branch."""


@dataclass(frozen=True)
class MaskInput:
    """What a mask is computed from: logits [rows, vocab], the coefficients [rows] of these rows in the
    scores, and the columns of the step's requests. Ids from `vocab_size` on are no tokens.
    """

    logits: Tensor
    coefs: Tensor
    layout: RequestLayout
    params: Mapping[str, Tensor]
    vocab_size: int
    shard: UnshardedVocab


@dataclass(frozen=True, eq=False)
class Feature:
    """A feature that a request may use.

    Its columns of the state are the fields of a dataclass beside it, which `SteeringCoefficients` or
    `RowSampling` extends. Its Triton part is in the module of the same name in `kernels.triton.steering`.

    is_used:          whether a request uses it, from the request's columns by name.
    warmup:           columns that turn it on, for steps that only launch its kernels.
    head_output:      what it reads of the LM head.
    branch_logprobs:  whether it needs the chosen token's log-probability in every branch.
    """

    is_used: Callable[[Mapping[str, Any]], bool]
    warmup: Mapping[str, Any] = field(default_factory=dict)
    head_output: HeadOutput = HeadOutput.TOKEN
    branch_logprobs: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A feature is a constant: a copied state refers to the same one."""
        return self


@dataclass(frozen=True, eq=False)
class Mask(Feature):
    """A feature that forbids tokens.

    find_forbidden:     (indices of the requests that use it [n], their forbidden tokens [n, vocab] bool).
    in_trust_region:    whether KL is measured among the allowed tokens only.
    """

    find_forbidden: Callable[[MaskInput], tuple[Tensor, Tensor]] = field(kw_only=True)
    in_trust_region: bool = False


class StepFeatures(frozenset[Feature]):
    """The features that the requests of a step use, known on the host."""

    @property
    def head_output(self) -> HeadOutput:
        """The most that any of them reads of the LM head."""
        return max((feature.head_output for feature in self), default=HeadOutput.TOKEN)

    @property
    def branch_logprobs(self) -> bool:
        return any(feature.branch_logprobs for feature in self)
