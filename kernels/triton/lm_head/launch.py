"""LM head fused with the steering step, without [rows, vocab] logits in memory.

    reweight_kernel      (request)                        as in `steer`
    mix_hidden_kernel    (request, hidden tile)           Σ c h, if no branch is needed separately
    lm_head_kernel       (request tile, vocabulary tile)  z = W h; best tokens, or two rows per request
    mix_logits_kernel … sample_truncated_kernel           as in `steer`, on those rows if they are stored
    reduce_tiles_kernel  (request, branch)                token, its logit in every branch, normalisers
    finalize_kernel      (request)                        as in `steer`

`lm_head_kernel` alone decides greedy steps and sampling without filters. A trust region, support mask,
filter, edits, top log-probabilities and measured KL need full rows of scores: the first branch and the mix of
the others, which the launches of `steer` process like a request of two branches. With so many rows that the
arithmetic takes longer than reading the weights, the vendor's matmul is followed by `steer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from ...lm_head import logits_matmul
from ...steering.feature import StepFeatures
from ...steering.layout import RequestLayout
from ...steering.state import COLUMN_INDEX
from ..configs import LMHeadConfig
from ..dot import UPCAST
from ..steering.step import SteeringLaunch, steer
from ..tuning import get_launch_configs
from .plan import FusedPlan
from .project import lm_head_kernel, mix_hidden_kernel
from .reduce import reduce_tiles_kernel

if TYPE_CHECKING:
    from ...steering.layout import LogitEdits
    from ...steering.state import SteeringState
    from ...steering.step import SamplerOutput

BLOCK_K = 1024
"""Hidden dimension per step of `mix_hidden_kernel` and `reduce_tiles_kernel`."""
FINALIZE_BLOCK_S = 4
"""Padded number of parts that `finalize_kernel` merges: with 1, its Blackwell code spills registers."""
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAUNCH_OPTIONS = {"enable_fp_fusion": True}
"""Explicit, because the default depends on the Triton version."""


def lm_head_steer(
    hidden: Tensor,
    weight: Tensor,
    layout: RequestLayout,
    state: SteeringState,
    edits: LogitEdits | None = None,
    *,
    trace: bool = True,
    top: bool = False,
    config: LMHeadConfig | None = None,
) -> SamplerOutput:
    """Choose one token per request and update the steering state; see `kernels.lm_head.lm_head_steer`.

    hidden [rows, hidden_size] after the final norm, weight [vocab, hidden_size], contiguous, of one dtype:
    float32, bfloat16 or float16; accumulation is float32. config: None for the launch config of the device.
    Raises ValueError for other dtypes, shapes or strides.
    """
    _check_args(hidden, weight, layout)
    config = config or get_launch_configs(hidden.device).head
    features = state.features(layout)
    plan = FusedPlan.from_features(
        features, layout, state, trace=trace, top=top, has_edits=edits is not None, config=config
    )
    # tensor cores do not support float32, and float32 tiles spill registers
    is_fp32_cuda = hidden.is_cuda and hidden.dtype == torch.float32
    if plan is None or is_fp32_cuda:
        return steer(logits_matmul(hidden, weight), layout, state, edits, trace=trace, top=top)
    launch = _FusedEnds(hidden, weight, layout, state, features, plan, trace=trace, top=top)
    return _StoredRows(launch).run(edits) if plan.materialize else launch.run_fused()


def _check_args(hidden: Tensor, weight: Tensor, layout: RequestLayout) -> None:
    if hidden.dtype != weight.dtype or hidden.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"hidden and weight must share one floating dtype, got {hidden.dtype} and {weight.dtype}"
        )
    shapes = tuple(hidden.shape), tuple(weight.shape)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"expected hidden [rows, hidden_size] and weight [vocab, hidden_size], got {shapes}")
    if not (hidden.is_contiguous() and weight.is_contiguous()):
        raise ValueError(
            f"hidden and weight must be contiguous, got strides {hidden.stride()} and {weight.stride()}"
        )
    if len(hidden) != len(layout.branch_of_row):
        raise ValueError(f"hidden has {len(hidden)} rows, the request layout {len(layout.branch_of_row)}")
    if not hidden.device == weight.device == layout.state_rows.device:
        raise ValueError(
            f"expected one device, got hidden on {hidden.device}, weight on {weight.device}, "
            f"request layout on {layout.state_rows.device}"
        )


class _TileResults(NamedTuple):
    """Results per request and vocabulary part; token_score: see `reduce_tiles_kernel`."""

    best_score: Tensor
    best_token: Tensor
    nonfinite: Tensor
    score_max: Tensor
    score_sum: Tensor
    token_score: Tensor
    kl_sums: Tensor
    strength: Tensor


class _FusedEnds(SteeringLaunch):
    """First and last launches, over all rows; to `finalize_kernel` the chosen token is the vocabulary."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        layout: RequestLayout,
        state: SteeringState,
        features: StepFeatures,
        plan: FusedPlan,
        *,
        trace: bool,
        top: bool,
    ) -> None:
        logits = torch.empty(len(hidden), 1, device=hidden.device)
        super().__init__(logits, layout, state, features, trace=trace, top=top)
        self.tiling = replace(self.tiling, block_s=FINALIZE_BLOCK_S)
        self.hidden, self.weight, self.plan = hidden, weight, plan
        self.num_tiles = plan.num_vocab_tiles(len(weight))
        stats_shape = (self.num_rows, self.num_tiles) if plan.branch_logprobs else (1,)
        self.tile_max, self.tile_sum, self.tile_contrast, self.tile_base_contrast = (
            self._new(*stats_shape) for _ in range(4)
        )
        self.top_logprobs_fn: Callable[[Tensor], tuple[Tensor, Tensor]]

    @property
    def _return_logprobs(self) -> bool:
        return self.trace or self.top

    def run_fused(self) -> SamplerOutput:
        """Run a step in which `lm_head_kernel` selects the best tokens."""
        self._reweight()
        shape = (self.num_reqs, self.num_tiles)
        best_score, score_max, score_sum, token_score = (self._new(*shape) for _ in range(4))
        best_token, nonfinite = (self._new(*shape, dtype=torch.int32) for _ in range(2))
        results = _TileResults(
            best_score,
            best_token,
            nonfinite,
            score_max,
            score_sum,
            token_score,
            self.dummy,
            self.start_strength,
        )
        self._lm_head(self.dummy, self.dummy, results)
        return self.finalize_step(results)

    def project_rows(self, rows_out: Tensor, coefs_out: Tensor) -> None:
        """Reweight, and compute the stored rows: rows_out [requests · plan.rows_stored, vocab]."""
        self._reweight()
        dummy = self.dummy
        self._lm_head(
            rows_out, coefs_out, _TileResults(dummy, dummy, dummy, dummy, dummy, dummy, dummy, dummy)
        )

    def finalize_step(
        self, results: _TileResults, top_logprobs_fn: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    ) -> SamplerOutput:
        """Choose the tokens and return the step's output; top_logprobs_fn: maps the logsumexp of each
        request's scores to its top log-probabilities.
        """
        if top_logprobs_fn is not None:
            self.top_logprobs_fn = top_logprobs_fn
        tokens = self._reduce_tiles(results)
        return replace(self._finalize(), tokens=tokens)

    def _top_logprobs(self, lse: Tensor) -> tuple[Tensor, Tensor]:
        return self.top_logprobs_fn(lse)

    def _mix_hidden(self) -> tuple[Tensor, Tensor]:
        """(high, low): one mixed hidden state per request; low is the rounding error of high."""
        hidden_size, has_low = self.hidden.shape[1], self.hidden.dtype != torch.float32
        high = self.hidden.new_empty(self.num_reqs, hidden_size)
        low = torch.empty_like(high) if has_low else self.dummy
        layout = self.layout
        mix_hidden_kernel[(self.num_reqs, triton.cdiv(hidden_size, BLOCK_K))](
            self.hidden, layout.row_start, layout.num_rows,
            self.coefs, self.start_strength, self.on_ray, high, low,
            HIDDEN_SIZE=hidden_size, BLOCK_K=BLOCK_K, HAS_LOW=has_low, **LAUNCH_OPTIONS,
        )  # fmt: skip
        return high, low

    def _lm_head(self, rows_out: Tensor, coefs_out: Tensor, results: _TileResults) -> None:
        plan, tile, layout, state = self.plan, self.plan.tile, self.layout, self.state
        hidden, low = self._mix_hidden() if plan.mix_before_head else (self.hidden, self.dummy)
        vocab_size, hidden_size = self.weight.shape
        lm_head_kernel[(plan.num_row_tiles, self.num_tiles)](
            hidden, low, self.weight, layout.state_rows, layout.row_start, layout.num_rows,
            self.coefs, self.start_strength, self.on_ray,
            state.steps, state.params[COLUMN_INDEX["temperature"]], state.seeds,
            rows_out, coefs_out, self.tile_max, self.tile_sum, self.tile_contrast,
            self.tile_base_contrast, results.score_max, results.score_sum, results.token_score,
            results.nonfinite,
            results.best_score, results.best_token,
            vocab_size, state.vocab_size, self.num_reqs, self.num_tiles,
            MIX_BEFORE_HEAD=plan.mix_before_head, MATERIALIZE=plan.materialize,
            BRANCH_LOGPROBS=plan.branch_logprobs,
            RETURN_LOGPROBS=self._return_logprobs and not plan.materialize,
            ROWS_STORED=max(plan.rows_stored, 1), BRANCH_SLOTS=plan.branch_slots,
            BLOCK_M=plan.tile_rows, BLOCK_V=tile.tokens, HIDDEN_SIZE=hidden_size, BLOCK_K=tile.depth,
            HAS_LOW=low is not self.dummy, UPCAST=UPCAST,
            num_warps=tile.warps, num_stages=tile.stages, **LAUNCH_OPTIONS,
        )  # fmt: skip

    def _reduce_tiles(self, results: _TileResults) -> Tensor:
        """Merge all parts into one; returns the tokens [requests]."""
        layout, plan = self.layout, self.plan
        vocab_size, hidden_size = self.weight.shape
        num_parts = results.best_score.shape[1]
        tokens = self._new(self.num_reqs, dtype=torch.int64)
        grid_rows = layout.max_rows if plan.branch_logprobs or self._return_logprobs else 1
        reduce_tiles_kernel[(self.num_reqs, grid_rows)](
            self.hidden, self.weight, layout.state_rows, layout.row_start, layout.num_rows, self.on_ray,
            *self.params, self.tile_max, self.tile_sum, self.tile_contrast, self.tile_base_contrast,
            *results,
            self.logits, self.row_max, self.row_sum, self.row_contrast, self.base_contrast,
            self.best_score, self.best_token,
            self.nonfinite, self.score_max, self.score_sum, self.mixed_logits, self.kl_sums, self.strength,
            tokens,
            vocab_size, num_parts, self.num_tiles, self.num_reqs,
            MATERIALIZE=plan.materialize, BRANCH_LOGPROBS=plan.branch_logprobs,
            RETURN_LOGPROBS=self._return_logprobs,
            HAS_KL_BUDGET=self.has_kl_budget, MEASURE_KL=plan.materialize and self.trace,
            HIDDEN_SIZE=hidden_size, BLOCK_K=BLOCK_K,
            BLOCK_P=triton.next_power_of_2(num_parts), BLOCK_T=triton.next_power_of_2(self.num_tiles),
            **LAUNCH_OPTIONS,
        )  # fmt: skip
        return tokens


class _StoredRows(SteeringLaunch):
    """The launches of `steer` over the stored rows, as requests of one or two branches."""

    def __init__(self, ends: _FusedEnds) -> None:
        rows = ends._new(ends.plan.rows_stored * ends.num_reqs, len(ends.weight))
        layout = _stored_layout(ends.layout, ends.plan.rows_stored)
        super().__init__(rows, layout, ends.state, ends.features, trace=ends.trace, top=ends.top)
        self.ends = ends

    def _reweight(self) -> None:
        super()._reweight()
        self.ends.project_rows(self.logits, self.coefs)

    def _finalize(self) -> SamplerOutput:
        results = _TileResults(
            self.best_score, self.best_token, self.nonfinite, self.score_max, self.score_sum,
            self.mixed_logits, self.kl_sums,
            self.strength,
        )  # fmt: skip
        return self.ends.finalize_step(results, self._top_logprobs)


def _stored_layout(layout: RequestLayout, rows_stored: int) -> RequestLayout:
    """Layout of the stored rows: at most `rows_stored` per request, the first its first branch."""
    req_ids = torch.arange(len(layout.state_rows), device=layout.state_rows.device)
    return RequestLayout(
        state_rows=layout.state_rows,
        row_start=req_ids * rows_stored,
        num_rows=layout.num_rows.clamp(max=rows_stored),
        branch_of_row=layout.branch_of_row[layout.row_start].repeat_interleave(rows_stored),
        request_of_row=req_ids.repeat_interleave(rows_stored),
        max_rows=rows_stored,
        host_state_rows=layout.host_state_rows,
    )
