"""Trust region: the largest steering strength with KL(π_a ‖ π_m) ≤ ε, π_m the merged policy.

Along the ray log π_a ≃ b + a d with d = m − b, let A(a) = logsumexp(b + a d). Then

    KL(a) = (a − 1) A′(a) − [A(a) − A(1)],    dKL/da = (a − 1) A″(a),

where A′ and A″ are the mean and variance of d under π_a. Constants in b and d cancel, so raw logits suffice.
KL is 0 at a = 1 and increases, and the step takes

    a* = min( a_T, max{ a ≥ 1 : KL(a) ≤ ε } )

by Newton's method on log KL over log(a − 1), starting at a − 1 = √(2ε/A″(1)), with bisection where Newton
leaves the bracket or has not halved it in `PATIENCE` iterations. The KL of the returned strength has been
evaluated and is within the budget.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ..distributed.vocab_parallel import UNSHARDED, UnshardedVocab
from .feature import Feature, HeadOutput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .layout import RequestLayout

TOLERANCE = 1e-3
"""The search stops when KL is within this relative distance below ε."""
PATIENCE = 3
MAX_ITERS = 60
SUM_CHUNK = 512
MIN_EXPONENT = -87.0
"""exp of less is subnormal or 0: a CPU takes ten times as long for it, and it changes no sum with a 1."""
FORBIDDEN_LOGIT = -1e30
"""Of a masked token: finite, so that a shard of the vocabulary may hold masked tokens alone."""


def moments(
    base: Tensor, direction: Tensor, a: Tensor, shard: UnshardedVocab = UNSHARDED
) -> tuple[Tensor, Tensor, Tensor]:
    """A(a), A′(a), A″(a), each [rows] float64, for base, direction [rows, vocab] and a [rows]."""
    scores = torch.addcmul(base, direction, a[:, None].to(base.dtype))
    row_max = scores.amax(-1, keepdim=True)
    weights = scores.sub_(row_max).clamp_(min=MIN_EXPONENT).exp_()
    sums = [row_sum(weights), row_sum(weights.mul_(direction)), row_sum(weights.mul_(direction))]
    max_score, sum_exp, mean, mean_sq = shard.merge_logsumexp(row_max[:, 0].double(), *sums)
    mean, mean_sq = mean / sum_exp, mean_sq / sum_exp
    return max_score + sum_exp.log(), mean, (mean_sq - mean * mean).clamp(min=0)


def row_sum(x: Tensor) -> Tensor:
    """Sum [rows, vocab] → [rows] float64, in chunks whose size and order do not depend on the row count."""
    if x.shape[-1] % SUM_CHUNK:
        x = functional.pad(x, (0, -x.shape[-1] % SUM_CHUNK))
    chunks: Tensor = x.unflatten(-1, (-1, SUM_CHUNK))
    return chunks.sum(-1).double().sum(-1)


def kl_divergence(base: Tensor, direction: Tensor, a: Tensor, shard: UnshardedVocab = UNSHARDED) -> Tensor:
    """KL(π_a ‖ π_m) in nats, [rows] float64."""
    log_z1, mean, _ = moments(base, direction, torch.ones_like(a), shard)
    log_z, slope, _ = moments(base, direction - mean[:, None].to(direction.dtype), a, shard)
    return ((a - 1) * slope - (log_z - (log_z1 - mean))).clamp(min=0)


def solve_kl_budget(
    base: Tensor,
    direction: Tensor,
    max_strength: Tensor,
    kl_budget: Tensor,
    shard: UnshardedVocab = UNSHARDED,
) -> tuple[Tensor, Tensor]:
    """(a*, KL(π_a* ‖ π_m) in nats), each [rows] float64.

    base, direction: b and m − b [rows, vocab] float32; max_strength: a_T ≥ 1 [rows]; kl_budget: ε > 0 [rows].
    A row that is not finite gets a* = 1 and KL = NaN.
    """
    one = torch.ones_like(max_strength)
    log_z1, mean, variance = moments(base, direction, one, shard)
    centred = direction - mean[:, None].to(direction.dtype)
    log_z1 = log_z1 - mean  # A(1) of the centred direction, whose mean under π_1 is 0

    def evaluate(a: Tensor) -> tuple[Tensor, Tensor]:
        """KL(a) and its slope in log-log coordinates."""
        log_z, mean_a, var_a = moments(base, centred, a, shard)
        kl = ((a - 1) * mean_a - (log_z - log_z1)).clamp(min=0)
        return kl, (a - 1) ** 2 * var_a / kl.clamp(min=1e-300)

    low, high = one, max_strength.clone()  # KL(low) ≤ ε < KL(high), once high is evaluated
    best_kl = torch.zeros_like(max_strength)  # KL(low)
    kl, slope = evaluate(high)
    within_budget = kl <= kl_budget
    low, best_kl = torch.where(within_budget, high, low), torch.where(within_budget, kl, best_kl)
    converged = within_budget | ~torch.isfinite(kl)
    best_kl = torch.where(torch.isfinite(kl), best_kl, torch.nan)
    initial = 1 + (2 * kl_budget / variance.clamp(min=1e-300)).sqrt()
    trial = torch.where(initial < high, initial, (low + high) / 2)
    bracket, stalled = high - low, torch.zeros_like(max_strength)
    for _ in range(MAX_ITERS):
        if bool(converged.all()):
            break
        kl, slope = evaluate(trial)
        within_budget = kl <= kl_budget
        low, best_kl = (
            torch.where(within_budget & ~converged, trial, low),
            torch.where(within_budget & ~converged, kl, best_kl),
        )
        high = torch.where(within_budget | converged, high, trial)
        converged = (
            converged | (within_budget & (kl >= kl_budget * (1 - TOLERANCE))) | (high - low <= 1e-7 * high)
        )
        halved = high - low <= bracket / 2
        bracket, stalled = torch.where(halved, high - low, bracket), torch.where(halved, 0.0, stalled + 1)
        log_step = (kl_budget * (1 - TOLERANCE / 2) / kl.clamp(min=1e-300)).log() / slope.clamp(min=1e-9)
        newton = 1 + (trial - 1) * log_step.clamp(-20, 20).exp()
        midpoint = torch.where(low > 1, 1 + ((low - 1) * (high - 1)).sqrt(), (low + high) / 2)
        use_newton = (newton > low) & (newton < high) & (stalled < PATIENCE)
        trial, stalled = torch.where(use_newton, newton, midpoint), torch.where(use_newton, stalled, 0.0)
    return low, best_kl


def apply_trust_region(
    logits: Tensor,
    layout: RequestLayout,
    params: Mapping[str, Tensor],
    row_weight: Tensor,
    scores: Tensor,
    strength: Tensor,
    forbidden: Tensor | None,
    shard: UnshardedVocab,
    *,
    measure_kl: bool,
) -> Tensor:
    """Reduce strength and scores to the KL budget, where set; return KL(π_a ‖ π_m) [requests].

    With `measure_kl`, also compute the KL of methods without a budget that are of the form b + a (m − b).
    """
    kl = torch.full_like(strength, torch.nan)
    has_budget = params["kl_budget"] < torch.inf
    on_ray = (
        layout.has_base
        & (layout.num_rows > 1)
        & (params["base_coef"] == 1 - params["objective_coef"])
        & (params["prev_contrast_coef"] == 0)
    )
    rays = has_budget | (on_ray if measure_kl else has_budget)
    if not bool(rays.any()):
        return kl
    base = _select(layout.first_rows(logits), rays)
    direction = _select(layout.combine(logits, row_weight), rays) - base
    allowed_base = base if forbidden is None else base.masked_fill(_select(forbidden, rays), FORBIDDEN_LOGIT)
    bounded = has_budget[rays]
    if not bool(bounded.all()):
        unbounded = rays & ~has_budget
        rows = _select(allowed_base, ~bounded), _select(direction, ~bounded)
        kl[unbounded] = kl_divergence(*rows, strength[unbounded], shard)
    if bool(bounded.any()):
        a, kl[has_budget] = solve_kl_budget(
            _select(allowed_base, bounded),
            _select(direction, bounded),
            strength[has_budget],
            params["kl_budget"][has_budget],
            shard,
        )
        strength[has_budget] = a
        scores[has_budget] = torch.addcmul(base[bounded], direction[bounded], a[:, None].to(base.dtype))
    return kl


def _select(rows: Tensor, mask: Tensor) -> Tensor:
    """rows[mask], without a copy if that is all rows."""
    return rows if bool(mask.all()) else rows[mask]


KL_BUDGET = Feature(
    is_used=lambda columns: columns["kl_budget"] < math.inf,
    warmup={"kl_budget": 0.1},
    head_output=HeadOutput.BASE_AND_MIX,
)
