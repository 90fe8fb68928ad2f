"""The steering step on a GPU: `kernels.steering.step` as a fixed sequence of Triton launches.

    reweight_kernel          (request)          weights, coefficients of the mix
    mix_logits_kernel        (request, split)   Σ c z, statistics of every row; trust region: 8 strengths
    kl_bracket_kernel        (request, split)   trust region: 12 strengths inside the bracket
    find_thresholds          (request, split)   4 launches each for support mask, top-k and top-p
    score_kernel             (request, split)   a*, scores, mask, bans, penalties, noise, best per split
    sample_truncated_kernel  (request, split)   top-k, top-p, min-p: the best of the remaining tokens
    finalize_kernel          (request)          token, log-probabilities, KL, rewards, step count

The split length depends only on the vocabulary size, and the next launch merges the partial results of the
splits, so that a request's results do not depend on the rest of the batch. There are no atomics and no reads
by the host: the parameters of the admitted requests determine the launches of a step. Bias and penalties are
scattered into two dense maps first. The top 20 log-probabilities are `torch.topk` of the stored scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from ...steering.feature import StepFeatures
from ...steering.features import FEATURES
from ...steering.gains import GAINS
from ...steering.layout import LogitEdits
from ...steering.masks import MASKS, NUCLEUS_MASK
from ...steering.prev_contrast import PREV_CONTRAST
from ...steering.step import TOP_LOGPROBS, SamplerOutput
from ...steering.top_k_top_p import TOP_K, TOP_P, TRUNCATION
from ...steering.trust_region import KL_BUDGET
from .finalize import BLOCK_R, finalize_kernel
from .mix_logits import mix_logits_kernel
from .score import sample_truncated_kernel, score_kernel
from .top_k_top_p import ThresholdKind, find_thresholds
from .trust_region import MAX_POINTS, NUM_COARSE, NUM_INNER, kl_bracket_kernel, masked_coarse_sums_kernel
from .weights import BLOCK_O, reweight_kernel

if TYPE_CHECKING:
    from ...steering.layout import RequestLayout
    from ...steering.state import SteeringState

LARGE_VOCAB = 65_536


ALL_FEATURES = StepFeatures(FEATURES)


@dataclass(frozen=True)
class VocabTiling:
    """Split of the vocabulary; depends on its size alone."""

    block_v: int
    num_splits: int
    block_s: int
    num_warps: int

    @classmethod
    def from_vocab_size(cls, vocab_size: int) -> VocabTiling:
        max_block_v = 4096 if vocab_size > LARGE_VOCAB else 2048
        block_v = min(max_block_v, max(128, triton.next_power_of_2(vocab_size)))
        num_splits = triton.cdiv(vocab_size, block_v)
        return cls(block_v, num_splits, triton.next_power_of_2(num_splits), max(block_v // 512, 1))


def steer(
    logits: Tensor,
    layout: RequestLayout,
    state: SteeringState,
    edits: LogitEdits | None = None,
    *,
    trace: bool = True,
    top: bool = False,
) -> SamplerOutput:
    """Choose one token per request and update the steering state; see `kernels.steering.step.steer`.

    logits [rows, vocab] float32 or bfloat16, contiguous. Raises ValueError for other inputs.
    """
    _check_args(logits, layout)
    return SteeringLaunch(logits, layout, state, state.features(layout), trace=trace, top=top).run(edits)


def invariant_steer(
    logits: Tensor,
    layout: RequestLayout,
    state: SteeringState,
    edits: LogitEdits | None = None,
    *,
    trace: bool = True,
    top: bool = False,
) -> SamplerOutput:
    """Like `steer`, with the same launches and compiled variants whatever features the requests use.

    Variants compiled for other features may round differently. Requests without a feature skip it; trace
    outputs are always computed.
    """
    _check_args(logits, layout)
    launch = SteeringLaunch(logits, layout, state, ALL_FEATURES, trace=True, top=True)
    output = launch.run(edits or LogitEdits.empty(logits.device))
    return output if top else replace(output, top_logprobs=None)


def _check_args(logits: Tensor, layout: RequestLayout) -> None:
    if logits.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"logits must be float32 or bfloat16, got {logits.dtype}")
    if logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous [rows, vocab], got shape {tuple(logits.shape)}")
    if len(logits) != len(layout.branch_of_row):
        raise ValueError(f"logits have {len(logits)} rows, the request layout {len(layout.branch_of_row)}")
    if layout.state_rows.device != logits.device:
        raise ValueError(f"logits are on {logits.device}, the request layout on {layout.state_rows.device}")


class SteeringLaunch:
    """Buffers and ordered launches of one step; features: those that the kernels are compiled with."""

    def __init__(
        self,
        logits: Tensor,
        layout: RequestLayout,
        state: SteeringState,
        features: StepFeatures,
        *,
        trace: bool,
        top: bool,
    ) -> None:
        self.logits, self.layout, self.state = logits, layout, state
        self.trace, self.top = trace, top
        self.params = state.params, state.params.stride(0)
        self.num_rows, self.vocab_size = logits.shape
        self.num_reqs, self.max_objectives = len(layout.state_rows), state.prior_weights.shape[1]
        self.features, self.tiling = features, VocabTiling.from_vocab_size(self.vocab_size)
        self.launch_args = {"BLOCK_V": self.tiling.block_v, "num_warps": self.tiling.num_warps}
        num_splits = self.tiling.num_splits
        self.dummy = self._new(1)
        self.weights = self._new(self.num_reqs, self.max_objectives, dtype=torch.float64)
        self.rewards = torch.empty_like(self.weights)
        self.coefs = self._new(self.num_rows)
        self.start_strength = self._new(self.num_reqs, dtype=torch.float64)
        self.strength = torch.empty_like(self.start_strength)
        self.on_ray = self._new(self.num_reqs, dtype=torch.int32)
        self.truncation_params = self._new(self.num_reqs, 3, dtype=torch.float64)
        self.mixed_logits = self._new(self.num_reqs, self.vocab_size)
        self.row_max, self.row_sum, self.row_contrast, self.base_contrast, self.row_valid_max = (
            self._new(self.num_rows, num_splits) for _ in range(5)
        )
        self.score_max, self.score_sum, self.allowed_max, self.best_score = (
            self._new(self.num_reqs, num_splits) for _ in range(4)
        )
        self.best_token = self._new(self.num_reqs, num_splits, dtype=torch.int32)
        # [0] by mix_logits_kernel, [1] by score_kernel
        self.nonfinite = self._new(2, self.num_reqs, num_splits, dtype=torch.int32)
        self.centre = self._new(self.num_reqs)
        self.has_masks = not features.isdisjoint(MASKS)
        self.has_region_masks = any(mask.in_trust_region for mask in MASKS if mask in features)
        self.has_truncation = not features.isdisjoint(TRUNCATION)
        self.has_kl_budget = KL_BUDGET in features
        self.coarse_sums, self.inner_sums, self.bracket = (
            self._new(self.num_reqs, *shape) if self.has_kl_budget else self.dummy
            for shape in ((4, NUM_COARSE, num_splits), (4, NUM_INNER, num_splits), (6,))
        )
        self.kl_sums = (
            self._new(self.num_reqs, 4, 2, num_splits) if trace or self.has_kl_budget else self.dummy
        )
        self.steered_scores = self._new(self.num_reqs, self.vocab_size) if top else self.dummy
        self.allowed_scores = self._new(self.num_reqs, self.vocab_size) if self.has_truncation else self.dummy

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.logits.device)

    def run(self, edits: LogitEdits | None) -> SamplerOutput:
        self._reweight()
        self._mix_logits()
        if self.has_kl_budget:
            self._bracket_kl()
        nucleus_threshold = (
            self._find_thresholds(ThresholdKind.NUCLEUS) if NUCLEUS_MASK in self.features else None
        )
        self._score(edits, nucleus_threshold)
        if self.has_truncation:
            self._sample_truncated()
        return self._finalize()

    @property
    def _grid(self) -> tuple[int, int]:
        return self.num_reqs, self.tiling.num_splits

    def _reweight(self) -> None:
        layout, state = self.layout, self.state
        reweight_kernel[(self.num_reqs,)](
            layout.state_rows, layout.row_start, layout.num_rows, layout.branch_of_row,
            state.prior_weights, state.rewards, state.branch_rewards, state.base_rewards, state.steps,
            *self.params, self.weights, self.rewards, self.coefs, self.start_strength, self.on_ray,
            self.truncation_params,
            self.vocab_size, self.max_objectives, BLOCK_O=BLOCK_O, num_warps=1,
        )  # fmt: skip

    def _mix_logits(self) -> None:
        layout, state, features = self.layout, self.state, self.features
        prev_contrast = state.reserve_contrast(self.vocab_size) if PREV_CONTRAST in features else self.dummy
        mix_logits_kernel[self._grid](
            self.logits, layout.state_rows, layout.row_start, layout.num_rows,
            self.coefs, self.start_strength, state.steps, *self.params,
            state.contrast_slot, prev_contrast,
            self.mixed_logits, self.row_max, self.row_sum, self.row_contrast, self.base_contrast,
            self.row_valid_max, self.nonfinite, self.centre, self.coarse_sums,
            self.vocab_size, self.tiling.num_splits, state.vocab_size,
            HAS_PREV_CONTRAST=PREV_CONTRAST in features,
            STORE_COARSE_SUMS=self.has_kl_budget and not self.has_region_masks,
            NUM_COARSE=NUM_COARSE, **self.launch_args,
        )  # fmt: skip

    def _bracket_kl(self) -> None:
        layout = self.layout
        inputs = (
            self.logits, self.mixed_logits, layout.state_rows, layout.row_start, layout.num_rows,
            *self.params, self.coefs, self.start_strength, self.row_valid_max, self.centre,
            self.coarse_sums,
        )  # fmt: skip
        if self.has_region_masks:
            masked_coarse_sums_kernel[self._grid](
                *inputs, self.vocab_size, self.tiling.num_splits,
                NUM_COARSE=NUM_COARSE, BLOCK_S=self.tiling.block_s, **self.launch_args,
            )  # fmt: skip
        kl_bracket_kernel[self._grid](
            *inputs, self.bracket, self.inner_sums, self.vocab_size, self.tiling.num_splits,
            HAS_MASKS=self.has_region_masks, NUM_COARSE=NUM_COARSE, NUM_INNER=NUM_INNER,
            BLOCK_S=self.tiling.block_s, **self.launch_args,
        )  # fmt: skip

    def _find_thresholds(self, kind: ThresholdKind, prior: Tensor | None = None) -> Tensor:
        is_nucleus = kind is ThresholdKind.NUCLEUS
        values, split_max = (
            (self.logits, self.row_valid_max) if is_nucleus else (self.allowed_scores, self.allowed_max)
        )
        valid_vocab, block_v = self.state.vocab_size, self.tiling.block_v
        return find_thresholds(
            kind,
            values,
            split_max,
            self.layout,
            self.truncation_params,
            self.state.params,
            valid_vocab,
            block_v,
            prior,
        )

    def _score(self, edits: LogitEdits | None, nucleus_threshold: Tensor | None) -> None:
        layout = self.layout
        bias, repetition_penalty = (
            self._scatter_edits(edits) if edits is not None else (self.dummy, self.dummy)
        )
        score_kernel[self._grid](
            self.logits, self.mixed_logits, self.steered_scores, self.allowed_scores, bias,
            repetition_penalty,
            layout.state_rows, layout.row_start, layout.num_rows, self.coefs, self.start_strength,
            self.on_ray, self.state.steps, *self.params, self.state.seeds, self.row_valid_max,
            self.centre, self.bracket, self.inner_sums,
            self.dummy if nucleus_threshold is None else nucleus_threshold,
            self.strength, self.score_max, self.score_sum, self.kl_sums, self.nonfinite, self.allowed_max,
            self.best_score, self.best_token, self.vocab_size, self.state.vocab_size,
            self.tiling.num_splits, self.num_reqs,
            int(self.top),
            HAS_KL_BUDGET=self.has_kl_budget, HAS_MASKS=self.has_masks,
            HAS_EDITS=edits is not None,
            HAS_TRUNCATION=self.has_truncation, MEASURE_KL=self.trace,
            RETURN_LOGPROBS=self.trace or self.top,
            NUM_INNER=NUM_INNER, MAX_POINTS=MAX_POINTS, BLOCK_S=self.tiling.block_s, **self.launch_args,
        )  # fmt: skip

    def _scatter_edits(self, edits: LogitEdits) -> tuple[Tensor, Tensor]:
        """Bias and repetition penalty as dense maps, [requests, vocab]."""
        bias, repetition_penalty = torch.zeros_like(self.mixed_logits), torch.ones_like(self.mixed_logits)
        bias.index_put_(edits.bias_index, edits.bias, accumulate=True)
        repetition_penalty[edits.repetition_index] = edits.repetition
        return bias, repetition_penalty

    def _sample_truncated(self) -> None:
        features = self.features
        top_k_threshold = self._find_thresholds(ThresholdKind.TOP_K) if TOP_K in features else None
        top_p_threshold = (
            self._find_thresholds(ThresholdKind.TOP_P, top_k_threshold) if TOP_P in features else None
        )
        sample_truncated_kernel[self._grid](
            self.allowed_scores, self.allowed_max, self.layout.state_rows, self.state.steps,
            *self.params, self.state.seeds,
            self.dummy if top_k_threshold is None else top_k_threshold,
            self.dummy if top_p_threshold is None else top_p_threshold,
            self.best_score, self.best_token, self.vocab_size, self.tiling.num_splits,
            HAS_TOP_K=top_k_threshold is not None, HAS_TOP_P=top_p_threshold is not None,
            BLOCK_S=self.tiling.block_s, **self.launch_args,
        )  # fmt: skip

    def _finalize(self) -> SamplerOutput:
        layout, state = self.layout, self.state
        tokens = self._new(self.num_reqs, dtype=torch.int64)
        failed = self._new(self.num_reqs, dtype=torch.uint8)
        logprob, lse = self._new(self.num_reqs), self._new(self.num_reqs)
        kl = torch.empty_like(self.strength)
        branch_logprobs = self._new(self.num_rows)
        fulfilment = torch.full_like(self.weights, torch.nan)
        return_logprobs = self.trace or self.top
        finalize_kernel[(self.num_reqs,)](
            self.logits, self.mixed_logits, layout.state_rows, layout.row_start, layout.num_rows,
            layout.branch_of_row,
            *self.params, state.rewards, state.branch_rewards, state.base_rewards, state.steps,
            self.strength, self.on_ray, self.row_max, self.row_sum, self.row_contrast, self.base_contrast,
            self.score_max, self.score_sum,
            self.kl_sums, self.nonfinite, self.best_score, self.best_token,
            tokens, failed, logprob, kl, branch_logprobs, fulfilment, lse,
            self.vocab_size, self.tiling.num_splits, self.num_reqs, self.max_objectives,
            HAS_KL_BUDGET=self.has_kl_budget, MEASURE_KL=self.trace, RETURN_LOGPROBS=return_logprobs,
            BRANCH_LOGPROBS=self.trace or self.features.branch_logprobs,
            BLOCK_O=BLOCK_O, BLOCK_R=BLOCK_R, BLOCK_S=self.tiling.block_s, num_warps=1,
        )  # fmt: skip
        return SamplerOutput(
            tokens=tokens,
            failed=failed.view(torch.bool),
            logprob=logprob,
            weights=self.weights,
            rewards=self.rewards,
            fulfilment=fulfilment if self.trace or GAINS in self.features else fulfilment.fill_(torch.nan),
            strength=self.strength,
            kl=kl,
            branch_logprobs=branch_logprobs,
            top_logprobs=self._top_logprobs(lse) if self.top else None,
        )

    def _top_logprobs(self, lse: Tensor) -> tuple[Tensor, Tensor]:
        top: Any = self.steered_scores.topk(min(TOP_LOGPROBS, self.vocab_size))
        return top.values - lse[:, None], top.indices
