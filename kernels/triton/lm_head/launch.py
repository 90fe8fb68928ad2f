"""The vocabulary's product and the steering step in one: `kernels.lm_head`, without [rows, vocab] in memory.

    weigh    (request)                              as in `steer`
    blend    (request, part of the width)           where branches are not needed apart: Σ c h
    project  (tile of requests, of the vocabulary)  z = W h; best tokens, or two rows a request
    mix … choose                                    of those rows, where they are kept: as in `steer`
    settle   (branch)                               the token, its logit in every branch, normalisers
    finish   (request)                              as in `steer`

Greedy steps and draws without a filter are decided by `project`. A trust region, a mask, a filter, edits, the
likeliest tokens and a measured divergence need whole rows of scores: the first branch's and the mix of the
others, which the launches of `steer` go on with as with a request of two branches. Where rows are so many
that their arithmetic outlasts the reading of the weights, the vendor's product and `steer` follow each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from ...lm_head import product
from ...steering.features import Features
from ...steering.state import Groups
from ..configs import Tuning
from ..dot import UPCAST
from ..steering.step import Step, steer
from ..tuning import of as launches_of
from .plan import Plan
from .project import blend_kernel, project_kernel
from .reduce import settle_kernel

if TYPE_CHECKING:
    from ...steering.state import Edits, SteerTable
    from ...steering.step import Choice

PART = 1024
"""Of the width, in one go."""
PADDED = 4
"""`finish` merges one part as if of so many: with one, its code for Blackwell spills."""
TYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSION = {"enable_fp_fusion": True}
"""Said, since what a launch does without it depends on Triton's version."""


def lm_head_steer(
    hidden: Tensor,
    weight: Tensor,
    groups: Groups,
    table: SteerTable,
    edits: Edits | None = None,
    *,
    trace: bool = True,
    top: bool = False,
    tuning: Tuning | None = None,
) -> Choice:
    """Chooses one token for each request and moves the table on by it; see `kernels.lm_head.lm_head_steer`.

    hidden [rows, width] after the final norm, weight [vocab, width], contiguous, of one type: float32,
    bfloat16 or float16; sums are float32. tuning: how it is launched, None for what the device is launched
    with. Raises ValueError for other types, shapes or layouts.
    """
    _check(hidden, weight, groups)
    tuning = tuning or launches_of(hidden.device).head
    features = Features.of(groups, table)
    plan = Plan.of(features, groups, table, trace=trace, top=top, edited=edits is not None, tuning=tuning)
    exact = hidden.is_cuda and hidden.dtype == torch.float32  # no tensor core has that, and tiles of it spill
    if plan is None or exact:
        return steer(product(hidden, weight), groups, table, edits, trace=trace, top=top)
    ends = _Ends(hidden, weight, groups, table, features, plan, trace=trace, top=top)
    return _Rows(ends).run(edits) if plan.stored else ends.decide()


def _check(hidden: Tensor, weight: Tensor, groups: Groups) -> None:
    if hidden.dtype != weight.dtype or hidden.dtype not in TYPES:
        raise ValueError(
            f"hidden and weight must be of one floating type, not {hidden.dtype}, {weight.dtype}"
        )
    shapes = tuple(hidden.shape), tuple(weight.shape)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [rows, width], weight [vocab, width]; they are {shapes}")
    if not (hidden.is_contiguous() and weight.is_contiguous()):
        raise ValueError(
            f"hidden and weight must be contiguous and have strides {hidden.stride()}, {weight.stride()}"
        )
    if len(hidden) != len(groups.branch):
        raise ValueError(f"hidden has {len(hidden)} rows and the groups {len(groups.branch)}")
    if not hidden.device == weight.device == groups.table.device:
        raise ValueError(
            f"hidden is on {hidden.device}, weight on {weight.device}, groups on {groups.table.device}"
        )


class _Found(NamedTuple):
    """What the parts of a vocabulary left of each request; raw: see `settle_kernel`."""

    best: Tensor
    token: Tensor
    broken: Tensor
    score_max: Tensor
    score_sum: Tensor
    raw: Tensor
    measured: Tensor
    strength: Tensor


class _Ends(Step):
    """What is launched over all rows, before and after; to `finish` the vocabulary is the chosen token."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        groups: Groups,
        table: SteerTable,
        features: Features,
        plan: Plan,
        *,
        trace: bool,
        top: bool,
    ) -> None:
        column = torch.empty(len(hidden), 1, device=hidden.device)
        super().__init__(column, groups, table, features, trace=trace, top=top)
        self.tiling = replace(self.tiling, padded=PADDED)
        self.hidden, self.weight, self.plan = hidden, weight, plan
        self.tiles = plan.tiles(len(weight))
        tiled = (self.rows, self.tiles) if plan.normalised else (1,)
        self.tile_max, self.tile_sum = (self._new(*tiled) for _ in range(2))
        self.likeliest: Callable[[Tensor], tuple[Tensor, Tensor]]

    @property
    def _reported(self) -> bool:
        return self.trace or self.top

    def decide(self) -> Choice:
        """The whole step, where the product's launch finds the best tokens."""
        self._weigh()
        tiled = (self.size, self.tiles)
        best, score_max, score_sum, raw = (self._new(*tiled) for _ in range(4))
        index, broken = (self._new(*tiled, dtype=torch.int32) for _ in range(2))
        found = _Found(best, index, broken, score_max, score_sum, raw, self.none, self.start_strength)
        self._project(self.none, self.none, found)
        return self.end(found)

    def begin(self, kept: Tensor, coefficient: Tensor) -> None:
        """Weights and product, where rows are kept: kept [groups · plan.kept, vocab]."""
        self._weigh()
        none = self.none
        self._project(kept, coefficient, _Found(none, none, none, none, none, none, none, none))

    def end(
        self, found: _Found, likeliest: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    ) -> Choice:
        """The token and all that is told of it; `likeliest` tokens from the logarithm of a row's sum."""
        if likeliest is not None:
            self.likeliest = likeliest
        tokens = self._settle(found)
        return replace(self._finish(), tokens=tokens)

    def _likeliest(self, total: Tensor) -> tuple[Tensor, Tensor]:
        return self.likeliest(total)

    def _blend(self) -> tuple[Tensor, Tensor]:
        """One row a request; what its type cannot hold is a row of its own."""
        width, paired = self.hidden.shape[1], self.hidden.dtype != torch.float32
        high = self.hidden.new_empty(self.size, width)
        low = torch.empty_like(high) if paired else self.none
        groups = self.groups
        blend_kernel[(self.size, triton.cdiv(width, PART))](
            self.hidden, groups.first, groups.count,
            self.coefficient, self.start_strength, self.ray, high, low,
            WIDTH=width, PART=PART, PAIRED=paired, **FUSION,
        )  # fmt: skip
        return high, low

    def _project(self, kept: Tensor, kept_coefficient: Tensor, found: _Found) -> None:
        plan, tile, groups, table = self.plan, self.plan.tile, self.groups, self.table
        hidden, low = self._blend() if plan.blended else (self.hidden, self.none)
        vocab, width = self.weight.shape
        project_kernel[(plan.row_tiles, self.tiles)](
            hidden, low, self.weight, groups.table, groups.first, groups.count,
            self.coefficient, self.start_strength, self.ray,
            table.steps, *self._column("temperature", "seed"),
            kept, kept_coefficient, self.tile_max, self.tile_sum,
            found.score_max, found.score_sum, found.raw, found.broken, found.best, found.token,
            vocab, table.vocab, self.size, self.tiles,
            BLENDED=plan.blended, STORED=plan.stored, NORMALISED=plan.normalised,
            REPORTED=self._reported and not plan.stored, KEPT=max(plan.kept, 1), SLOTS=plan.slots,
            ROWS=plan.rows, TOKENS=tile.tokens, WIDTH=width, DEPTH=tile.depth,
            PAIRED=low is not self.none, UPCAST=UPCAST,
            num_warps=tile.warps, num_stages=tile.stages, **FUSION,
        )  # fmt: skip

    def _settle(self, found: _Found) -> Tensor:
        """Makes one part of all; the tokens, [groups]."""
        groups, plan = self.groups, self.plan
        vocab, width = self.weight.shape
        parts = found.best.shape[1]
        tokens = self._new(self.size, dtype=torch.int64)
        asked = groups.width if plan.normalised or self._reported else 1
        settle_kernel[(self.size, asked)](
            self.hidden, self.weight, groups.table, groups.first, groups.count, self.ray,
            *self._column("kl_budget"), self.tile_max, self.tile_sum, *found,
            self.logits, self.row_max, self.row_sum, self.best, self.index, self.broken,
            self.score_max, self.score_sum, self.mixed, self.measured, self.strength, tokens,
            vocab, parts, self.tiles, self.size,
            STORED=plan.stored, NORMALISED=plan.normalised, REPORTED=self._reported,
            LIMITED=self.features.limited, MEASURED=plan.stored and self.trace, WIDTH=width, PART=PART,
            P_PAD=triton.next_power_of_2(parts), T_PAD=triton.next_power_of_2(self.tiles), **FUSION,
        )  # fmt: skip
        return tokens


class _Rows(Step):
    """A step over the rows that were kept, as of requests of one or two branches, between its two ends."""

    def __init__(self, ends: _Ends) -> None:
        kept = ends._new(ends.plan.kept * ends.size, len(ends.weight))
        groups = _reduced(ends.groups, ends.plan.kept)
        super().__init__(kept, groups, ends.table, ends.features, trace=ends.trace, top=ends.top)
        self.ends = ends

    def _weigh(self) -> None:
        super()._weigh()
        self.ends.begin(self.logits, self.coefficient)

    def _finish(self) -> Choice:
        found = _Found(
            self.best, self.index, self.broken, self.score_max, self.score_sum, self.mixed, self.measured,
            self.strength,
        )  # fmt: skip
        return self.ends.end(found, self._likeliest)


def _reduced(groups: Groups, kept: int) -> Groups:
    """Requests of at most `kept` rows, each beginning with its own first branch."""
    owner = torch.arange(len(groups.table), device=groups.table.device)
    return Groups(
        table=groups.table,
        first=owner * kept,
        count=groups.count.clamp(max=kept),
        branch=groups.branch[groups.first].repeat_interleave(kept),
        owner=owner.repeat_interleave(kept),
        width=kept,
        rows=groups.rows,
    )
