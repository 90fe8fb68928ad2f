"""Kernel warm-up: launch every kernel variant that requests may need before the first request.

Kernels are specialized by the features that a step's requests use, not by sizes: numbers of rows, branches,
objectives and tokens are not compiled in. Warm-up steps run on the cache's padding block and a temporary
steering state, so they leave no traces.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from ...kernels.attention_metadata import SequenceChunk
from ...kernels.backend import MIN_SHAPE
from ...kernels.reference.paged_kv_cache import PagedKVCache
from ...kernels.steering.coefficients import SteeringCoefficients
from ...kernels.steering.masks import MASKS
from ...kernels.steering.prev_contrast import PREV_CONTRAST
from ...kernels.steering.rewards import REWARDS
from ...kernels.steering.sampling import RowSampling
from ...kernels.steering.state import SteeringState
from ...kernels.steering.top_k_top_p import MIN_P, TOP_K, TOP_P
from ...kernels.steering.trust_region import KL_BUDGET
from .step_input import NewRequestData, StepInput

if TYPE_CHECKING:
    from ...kernels.steering.feature import Feature
    from .model_runner import ModelRunner

LOG = logging.getLogger("trimtab.engine")
BatchShape = tuple[int, int]
"""(number of requests, number of branches of the first one); the others have one branch."""
REPORT_FLAGS = ((False, False), (True, False), (False, True))
"""(trace, top log-probabilities); a step with both launches the same kernels as one with a trace."""
OFF_ON = (False, True)
GREEDY_SAMPLING, TRUNCATED_SAMPLING = RowSampling(), RowSampling(temperature=1.0, min_p=0.1)


def warm_up(runner: ModelRunner, shapes: Sequence[BatchShape]) -> None:
    """Run the warm-up steps; the monitor counts later compiles as late. Every rank runs the same steps.

    shapes: see `Backend.warmup_shapes`. The first runs the LM head unfused, except in plain steps, for which
    the last does.
    """
    cache, steering_state, seconds = runner.cache, runner.steering_state, runner.steer_seconds
    assert isinstance(cache, PagedKVCache), "only PagedKVCache has a padding block"
    LOG.info("launching every kernel once; kernels not in Triton's cache are compiled")
    start = time.perf_counter()
    runner.steering_state = SteeringState(
        steering_state.vocab_size, steering_state.device, steering_state.shard
    )
    try:
        for step_input in warmup_steps(cache.padding_block, *shapes):
            runner.execute_as_worker(step_input)
    finally:
        runner.steering_state, runner.steer_seconds = steering_state, seconds
    jit_monitor, elapsed = runner.jit_monitor, time.perf_counter() - start
    if jit_monitor:
        jit_monitor.seal()
        LOG.info(
            "launched every kernel in %.1f seconds; %d were compiled or loaded", elapsed, jit_monitor.count
        )


def warmup_steps(
    padding_block: int, unfused_shape: BatchShape, *fused_shapes: BatchShape
) -> Iterator[StepInput]:
    """Steps that launch each variant of each kernel, using only the padding block.

    The first loop covers the switches of the score kernel. The other kernels have fewer of these and
    others (previous contrast, rewards, kind of truncation), each varied together with a switch that its
    kernel ignores. The second loop covers the kernels before and after an LM head fused with steering, the
    third the fused LM head itself.
    """
    # scoring uses a small cache: AMD's compiler specializes on tensors below 2 GiB
    yield StepInput(score_token_ids=[0, 0])
    # a prefill step; all later steps decode, and may be replayed from CUDA graphs
    yield _make_step(padding_block, MIN_SHAPE, _make_coefficients(), num_tokens=2)
    for has_kl_budget, has_masks, has_edits, has_truncation in product(OFF_ON, repeat=4):
        coefficients = _make_coefficients(has_kl_budget, has_edits, has_masks, has_prev_contrast=has_edits)
        truncation = [MIN_P, *([TOP_K] if has_kl_budget else []), *([TOP_P] if has_masks else [])]
        sampling = RowSampling(**_warmup_columns(truncation)) if has_truncation else GREEDY_SAMPLING
        for report in REPORT_FLAGS:
            yield _make_step(padding_block, unfused_shape, coefficients, sampling, report, has_edits)
    for has_kl_budget, has_rewards, sampling in product(
        OFF_ON, OFF_ON, (GREEDY_SAMPLING, TRUNCATED_SAMPLING)
    ):
        for report in REPORT_FLAGS:
            yield _make_step(
                padding_block,
                MIN_SHAPE,
                _make_coefficients(has_kl_budget, has_rewards=has_rewards),
                sampling,
                report,
            )
    for shape in fused_shapes:
        for has_rewards, sampling in product(OFF_ON, (GREEDY_SAMPLING, TRUNCATED_SAMPLING)):
            yield _make_step(padding_block, shape, _make_coefficients(has_rewards=has_rewards), sampling)
        yield _make_step(padding_block, shape, _make_coefficients(), report=(True, False))
        yield _make_step(padding_block, shape, _make_coefficients(has_kl_budget=True))


def _make_coefficients(
    has_kl_budget: bool = False,
    has_rewards: bool = False,
    has_masks: bool = False,
    has_prev_contrast: bool = False,
) -> SteeringCoefficients:
    features = {KL_BUDGET: has_kl_budget, REWARDS: has_rewards, PREV_CONTRAST: has_prev_contrast}
    features |= dict.fromkeys(MASKS, has_masks)
    columns = _warmup_columns(feature for feature, is_used in features.items() if is_used)
    return SteeringCoefficients(objective_coef=1.0, **columns)


def _warmup_columns(features: Iterable[Feature]) -> dict[str, Any]:
    return {name: value for feature in features for name, value in feature.warmup.items()}


def _make_step(
    padding_block: int,
    shape: BatchShape,
    coefficients: SteeringCoefficients,
    sampling: RowSampling = GREEDY_SAMPLING,
    report: tuple[bool, bool] = (False, False),
    has_edits: bool = False,
    num_tokens: int = 1,
) -> StepInput:
    """A step whose first request has these coefficients and sampling; its first branch has `num_tokens`."""
    num_requests, num_branches = shape
    other_rows = list(range(1, num_requests))
    num_seqs = num_branches + len(other_rows)
    return StepInput(
        new_requests=[
            NewRequestData(0, coefficients, [1.0] * (num_branches - 1), sampling),
            *(
                NewRequestData(row, SteeringCoefficients(objective_coef=1.0), [], GREEDY_SAMPLING)
                for row in other_rows
            ),
        ],
        chunks=[
            SequenceChunk(0, num_tokens, [padding_block]),
            *[SequenceChunk(0, 1, [padding_block])] * (num_seqs - 1),
        ],
        token_ids=[0] * (num_seqs + num_tokens - 1),
        rope_lengths=[1] * (num_seqs + num_tokens - 1),
        logits_indices=[row + num_tokens - 1 for row in range(num_seqs)],
        request_branches=[(0, list(range(num_branches))), *((row, [0]) for row in other_rows)],
        logit_bias=[(0, 0, 0.0)] if has_edits else [],
        trace=report[0],
        top=report[1],
    )
