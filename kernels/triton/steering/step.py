"""The steering step on a device: `kernels.steering.step` in a few launches, whose number the host knows
beforehand.

    weigh   (request)          weights, coefficients of the mix
    mix     (request, split)   Σ c z, (max, Σ exp) of every row; in a trust region the sums of 8 strengths
    refine  (request, split)   in a trust region: the sums of 12 strengths inside the bracket
    search  (request, split)   4 launches each for a support mask, for top-k and for top-p
    score   (request, split)   a*, scores, mask, bans and penalties, noise, best token of a split
    choose  (request, split)   with top-k, top-p or min-p: the best token among those kept
    finish  (request)          token, log-probabilities, KL, rewards, step

A split of the vocabulary has one length for a vocabulary, whatever the batch, and its partial results are
merged by the next launch, so that a request's results do not depend on its neighbours. Nothing is read back
by the host and there are no atomics: which launches a step has follows from what its requests were admitted
with. Bias and penalties are scattered into two dense maps first, and the likeliest 20 are torch's `topk` of
the stored scores.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from ...steering.features import Features
from ...steering.state import Edits
from ...steering.step import TOP_LOGPROBS, Choice
from .finalize import ROWS, finish_kernel
from .mix_logits import mix_kernel
from .score import choose_kernel, score_kernel
from .top_k_top_p import Kind, search
from .trust_region import COARSE, INNER, TILE, refine_kernel
from .weights import CHUNK, weigh_kernel

if TYPE_CHECKING:
    from ...steering.state import Groups, SteerTable

LONG_VOCABULARY = 65_536


EVERYTHING = Features(**dict.fromkeys((field.name for field in fields(Features)), True))


@dataclass(frozen=True)
class Tiling:
    """How a vocabulary is split: a function of its size alone."""

    split: int
    count: int
    padded: int
    warps: int

    @classmethod
    def of(cls, vocab: int) -> Tiling:
        longest = 4096 if vocab > LONG_VOCABULARY else 2048
        split = min(longest, max(128, triton.next_power_of_2(vocab)))
        count = triton.cdiv(vocab, split)
        return cls(split, count, triton.next_power_of_2(count), max(split // 512, 1))


def steer(
    logits: Tensor,
    groups: Groups,
    table: SteerTable,
    edits: Edits | None = None,
    *,
    trace: bool = True,
    top: bool = False,
) -> Choice:
    """Chooses one token for each request and moves the table on by it; see `kernels.steering.step.steer`.

    logits [rows, vocab] float32 or bfloat16, contiguous. Raises ValueError for another type or layout.
    """
    _check(logits, groups)
    return Step(logits, groups, table, Features.of(groups, table), trace=trace, top=top).run(edits)


def invariant_steer(
    logits: Tensor,
    groups: Groups,
    table: SteerTable,
    edits: Edits | None = None,
    *,
    trace: bool = True,
    top: bool = False,
) -> Choice:
    """As `steer`, by the same launches of the same code whatever the step's requests ask for.

    Code that is compiled for other features may round otherwise. A request without a feature skips it; what a
    trace tells is measured in any case.
    """
    _check(logits, groups)
    step = Step(logits, groups, table, EVERYTHING, trace=True, top=True)
    choice = step.run(edits or Edits.none(logits.device))
    return choice if top else replace(choice, top=None)


def _check(logits: Tensor, groups: Groups) -> None:
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"logits must be float32 or bfloat16 and are {logits.dtype}")
    if logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous [rows, vocab] and have shape {tuple(logits.shape)}")
    if len(logits) != len(groups.branch):
        raise ValueError(f"logits have {len(logits)} rows and the groups {len(groups.branch)}")
    if groups.table.device != logits.device:
        raise ValueError(f"logits are on {logits.device} and the groups on {groups.table.device}")


class Step:
    """One step's buffers, and its launches in their order; features: what these are compiled for."""

    def __init__(
        self,
        logits: Tensor,
        groups: Groups,
        table: SteerTable,
        features: Features,
        *,
        trace: bool,
        top: bool,
    ) -> None:
        self.logits, self.groups, self.table = logits, groups, table
        self.trace, self.top = trace, top
        self.rows, self.vocab = logits.shape
        self.size, self.width = len(groups.table), table.asked.shape[1]
        self.features, self.tiling = features, Tiling.of(self.vocab)
        self.blocks = {"SPLIT": self.tiling.split, "num_warps": self.tiling.warps}
        splits = self.tiling.count
        self.none = self._new(1)
        self.weights = self._new(self.size, self.width, dtype=torch.float64)
        self.rewards = torch.empty_like(self.weights)
        self.coefficient = self._new(self.rows)
        self.start_strength = self._new(self.size, dtype=torch.float64)
        self.strength = torch.empty_like(self.start_strength)
        self.ray = self._new(self.size, dtype=torch.int32)
        self.limits = self._new(self.size, 3, dtype=torch.float64)
        self.mixed = self._new(self.size, self.vocab)
        self.row_max, self.row_sum, self.row_allowed = (self._new(self.rows, splits) for _ in range(3))
        self.score_max, self.score_sum, self.allowed_max, self.best = (
            self._new(self.size, splits) for _ in range(4)
        )
        self.index = self._new(self.size, splits, dtype=torch.int32)
        self.broken = self._new(2, self.size, splits, dtype=torch.int32)  # as found by mix, by score
        self.centre = self._new(self.size)
        self.coarse, self.inner, self.bracket = (
            self._new(self.size, *shape) if features.limited else self.none
            for shape in ((4, COARSE, splits), (4, INNER, splits), (6,))
        )
        self.measured = self._new(self.size, 4, 2, splits) if trace or features.limited else self.none
        self.steered = self._new(self.size, self.vocab) if top else self.none
        self.allowed = self._new(self.size, self.vocab) if features.filtered else self.none

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.logits.device)

    def run(self, edits: Edits | None) -> Choice:
        self._weigh()
        self._mix()
        if self.features.limited:
            self._refine()
        nucleus = self._search(Kind.NUCLEUS) if self.features.masked else None
        self._score(edits, nucleus)
        if self.features.filtered:
            self._choose()
        return self._finish()

    def _column(self, *names: str) -> list[Tensor]:
        return [self.table.columns[name] for name in names]

    @property
    def _grid(self) -> tuple[int, int]:
        return self.size, self.tiling.count

    def _weigh(self) -> None:
        groups, table = self.groups, self.table
        weigh_kernel[(self.size,)](
            groups.table, groups.first, groups.count, groups.branch,
            table.asked, table.rewards, table.steps,
            *self._column("base", "scale", "delay", "reward", "beta", "kl_budget"),
            *self._column("temperature", "mask_top_p", "top_k", "top_p"),
            self.weights, self.rewards, self.coefficient, self.start_strength, self.ray, self.limits,
            self.vocab, self.width, CHUNK=CHUNK, num_warps=1,
        )  # fmt: skip

    def _mix(self) -> None:
        groups, table, features = self.groups, self.table, self.features
        contrast = table.hold(self.vocab) if features.delayed else self.none
        mix_kernel[self._grid](
            self.logits, groups.table, groups.first, groups.count,
            self.coefficient, self.start_strength, table.steps, *self._column("delay"),
            table.slot, contrast, *self._column("kl_budget"),
            self.mixed, self.row_max, self.row_sum, self.row_allowed, self.broken, self.centre, self.coarse,
            self.vocab, self.tiling.count, table.vocab,
            DELAYED=features.delayed, LIMITED=features.limited, NODES=COARSE, **self.blocks,
        )  # fmt: skip

    def _refine(self) -> None:
        refine_kernel[self._grid](
            self.logits, self.mixed, self.groups.table, self.groups.first, *self._column("kl_budget"),
            self.start_strength, self.centre, self.coarse, self.bracket, self.inner,
            self.vocab, self.tiling.count,
            NODES=COARSE, INNER=INNER, S_PAD=self.tiling.padded, **self.blocks,
        )  # fmt: skip

    def _search(self, kind: Kind, outer: Tensor | None = None) -> Tensor:
        nucleus = kind is Kind.NUCLEUS
        rows, tops = (self.logits, self.row_allowed) if nucleus else (self.allowed, self.allowed_max)
        temperature = self.table.columns["mask_temperature" if nucleus else "temperature"]
        named, split = self.table.vocab, self.tiling.split
        return search(kind, rows, tops, self.groups, self.limits, temperature, named, split, outer)

    def _score(self, edits: Edits | None, nucleus: Tensor | None) -> None:
        groups, features = self.groups, self.features
        added, penalty = self._spread(edits) if edits is not None else (self.none, self.none)
        score_kernel[self._grid](
            self.logits, self.mixed, self.steered, self.allowed, added, penalty,
            groups.table, groups.first, groups.count, self.start_strength, self.ray, self.table.steps,
            *self._column("kl_budget", "temperature", "seed"),
            self.centre, self.bracket, self.inner, self.none if nucleus is None else nucleus,
            self.strength, self.score_max, self.score_sum, self.measured, self.broken, self.allowed_max,
            self.best, self.index, self.vocab, self.table.vocab, self.tiling.count, self.size,
            int(self.top),
            LIMITED=features.limited, MASKED=nucleus is not None, EDITED=edits is not None,
            FILTERED=features.filtered, MEASURED=self.trace, REPORTED=self.trace or self.top,
            INNER=INNER, TILE=TILE, S_PAD=self.tiling.padded, **self.blocks,
        )  # fmt: skip

    def _spread(self, edits: Edits) -> tuple[Tensor, Tensor]:
        """What edits add, and what they divide by, [groups, vocab]."""
        added, penalty = torch.zeros_like(self.mixed), torch.ones_like(self.mixed)
        added.index_put_(edits.bias_at, edits.bias, accumulate=True)
        penalty[edits.repetition_at] = edits.repetition
        return added, penalty

    def _choose(self) -> None:
        features = self.features
        top_k = self._search(Kind.TOP_K) if features.top_k else None
        top_p = self._search(Kind.TOP_P, top_k) if features.top_p else None
        choose_kernel[self._grid](
            self.allowed, self.allowed_max, self.groups.table, self.table.steps,
            *self._column("temperature", "min_p", "seed"),
            self.none if top_k is None else top_k, self.none if top_p is None else top_p,
            self.best, self.index, self.vocab, self.tiling.count,
            WITH_K=top_k is not None, WITH_P=top_p is not None, S_PAD=self.tiling.padded, **self.blocks,
        )  # fmt: skip

    def _finish(self) -> Choice:
        groups, table = self.groups, self.table
        tokens = self._new(self.size, dtype=torch.int64)
        failed = self._new(self.size, dtype=torch.uint8)
        logprob, total = self._new(self.size), self._new(self.size)
        kl = torch.empty_like(self.strength)
        branch_logprobs = self._new(self.rows)
        reported = self.trace or self.top
        finish_kernel[(self.size,)](
            self.logits, self.mixed, groups.table, groups.first, groups.count, groups.branch,
            *self._column("accumulate", "decay", "kl_budget"), table.rewards, table.steps,
            self.strength, self.ray, self.row_max, self.row_sum, self.score_max, self.score_sum,
            self.measured, self.broken, self.best, self.index,
            tokens, failed, logprob, kl, branch_logprobs, total,
            self.vocab, self.tiling.count, self.size, self.width,
            LIMITED=self.features.limited, MEASURED=self.trace, REPORTED=reported,
            NORMALISED=self.trace or self.features.rewarded,
            CHUNK=CHUNK, ROWS=ROWS, S_PAD=self.tiling.padded, num_warps=1,
        )  # fmt: skip
        return Choice(
            tokens=tokens,
            failed=failed.view(torch.bool),
            logprob=logprob,
            weights=self.weights,
            rewards=self.rewards,
            strength=self.strength,
            kl=kl,
            branch_logprobs=branch_logprobs,
            top=self._likeliest(total) if self.top else None,
        )

    def _likeliest(self, total: Tensor) -> tuple[Tensor, Tensor]:
        found: Any = self.steered.topk(min(TOP_LOGPROBS, self.vocab))
        return found.values - total[:, None], found.indices
