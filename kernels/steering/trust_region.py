"""The strongest steering that stays near the merged policy: KL(π_a ‖ π_m) ≤ ε.

Along the ray log π_a ≃ b + a d with d = m − b, let A(a) = logsumexp(b + a d). Then

    KL(a) = (a − 1) A′(a) − [A(a) − A(1)],    dKL/da = (a − 1) A″(a),

where A′ and A″ are mean and variance of d under π_a. Constants in b and d cancel, so raw logits are enough.
KL is 0 at a = 1 and increases, and the step takes

    a* = min( a_T, max{ a ≥ 1 : KL(a) ≤ ε } )

by Newton on log KL over log(a − 1) from a − 1 = √(2ε/A″(1)), with a bisection where Newton leaves the bracket
or has not halved it in `PATIENCE` sweeps. The strength returned has itself been evaluated to obey the budget.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..distributed.vocab_parallel import WHOLE, Whole

TOLERANCE = 1e-3
"""The search stops when KL is within this relative distance below ε."""
PATIENCE = 3
MAX_SWEEPS = 60
PIECE = 512


def moments(
    base: Tensor, direction: Tensor, a: Tensor, shard: Whole = WHOLE
) -> tuple[Tensor, Tensor, Tensor]:
    """A(a), A′(a), A″(a), each [rows] float64, for base, direction [rows, vocab] and a [rows]."""
    scores = torch.addcmul(base, direction, a[:, None].to(base.dtype))
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp_()
    sums = [row_sum(weights), row_sum(weights.mul_(direction)), row_sum(weights.mul_(direction))]
    highest, total, first, second = shard.total(top[:, 0].double(), *sums)
    first, second = first / total, second / total
    return highest + total.log(), first, (second - first * first).clamp(min=0)


def row_sum(x: Tensor) -> Tensor:
    """Sums [rows, vocab] → [rows] in float64, in pieces whose length and order do not depend on `rows`."""
    if x.shape[-1] % PIECE:
        x = functional.pad(x, (0, -x.shape[-1] % PIECE))
    pieces: Tensor = x.unflatten(-1, (-1, PIECE))
    return pieces.sum(-1).double().sum(-1)


def divergence(base: Tensor, direction: Tensor, a: Tensor, shard: Whole = WHOLE) -> Tensor:
    """KL(π_a ‖ π_m) in nats, [rows] float64."""
    anchor, mean, _ = moments(base, direction, torch.ones_like(a), shard)
    value, first, _ = moments(base, direction - mean[:, None].to(direction.dtype), a, shard)
    return ((a - 1) * first - (value - (anchor - mean))).clamp(min=0)


def solve(
    base: Tensor, direction: Tensor, limit: Tensor, budget: Tensor, shard: Whole = WHOLE
) -> tuple[Tensor, Tensor]:
    """(a*, KL(π_a* ‖ π_m) in nats), each [rows] float64.

    base, direction: b and m − b [rows, vocab] float32; limit: a_T ≥ 1 [rows]; budget: ε > 0 [rows].
    A row that is not finite gets a* = 1 and KL = NaN.
    """
    one = torch.ones_like(limit)
    anchor, mean, variance = moments(base, direction, one, shard)
    centred = direction - mean[:, None].to(direction.dtype)
    anchor = anchor - mean  # A(1) of the centred direction, whose mean under π_1 is 0

    def evaluate(a: Tensor) -> tuple[Tensor, Tensor]:
        """KL(a) and its slope in log-log coordinates."""
        value, first, second = moments(base, centred, a, shard)
        kl = ((a - 1) * first - (value - anchor)).clamp(min=0)
        return kl, (a - 1) ** 2 * second / kl.clamp(min=1e-300)

    low, high = one, limit.clone()  # KL(low) ≤ ε < KL(high), once high has been looked at
    best = torch.zeros_like(limit)  # KL(low)
    kl, slope = evaluate(high)
    inside = kl <= budget
    low, best = torch.where(inside, high, low), torch.where(inside, kl, best)
    done = inside | ~torch.isfinite(kl)
    best = torch.where(torch.isfinite(kl), best, torch.nan)
    start = 1 + (2 * budget / variance.clamp(min=1e-300)).sqrt()
    trial = torch.where(start < high, start, (low + high) / 2)
    width, stuck = high - low, torch.zeros_like(limit)
    for _ in range(MAX_SWEEPS):
        if bool(done.all()):
            break
        kl, slope = evaluate(trial)
        inside = kl <= budget
        low, best = torch.where(inside & ~done, trial, low), torch.where(inside & ~done, kl, best)
        high = torch.where(inside | done, high, trial)
        done = done | (inside & (kl >= budget * (1 - TOLERANCE))) | (high - low <= 1e-7 * high)
        halved = high - low <= width / 2
        width, stuck = torch.where(halved, high - low, width), torch.where(halved, 0.0, stuck + 1)
        aim = (budget * (1 - TOLERANCE / 2) / kl.clamp(min=1e-300)).log() / slope.clamp(min=1e-9)
        newton = 1 + (trial - 1) * aim.clamp(-20, 20).exp()
        middle = torch.where(low > 1, 1 + ((low - 1) * (high - 1)).sqrt(), (low + high) / 2)
        useful = (newton > low) & (newton < high) & (stuck < PATIENCE)
        trial, stuck = torch.where(useful, newton, middle), torch.where(useful, stuck, 0.0)
    return low, best
