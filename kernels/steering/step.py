"""The steering step: from the logits of a request's branches to its next token.

For each request of a batch, over branch logits z_b, with coefficients from its `Program` and weights w:

    w_k ∝ w⁰_k exp(−(β/τ) R_k)                                MATO's weights; without rewards they stay w⁰
    s = base · z_0 + scale · Σ_k w_k z_k  [+ g (z_1 − z_0) of the step before]          the steered scores
    s = b + a* (m − b),  b = z_0,  m = Σ_k w_k z_k            instead, in a trust region: KL(π_a* ‖ π_m) ≤ ε
    support mask → bias and bans → repetition → temperature → top-k → top-p → min-p → arg max or draw
    R_k ← R_k + l_k(y) − l_0(y)                               for the chosen token y, l = log-softmax of z

One call serves any mixture of methods and numbers of branches. Requests meet only in elementwise operations
and in reductions along the vocabulary, so that none depends on its neighbours, and a row that is not finite
fails its own request alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.vocab_parallel import WHOLE, Whole
from .coefficients import EMA, MEAN
from .features import Features
from .gumbel import gumbel
from .state import GREEDY_BELOW, Columns, Edits, Groups, SteerTable
from .top_k_top_p import support_threshold
from .trust_region import divergence, solve

TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Choice:
    """What a step chose, [groups] each unless said otherwise.

    failed:           logits were not finite or no token was allowed; the token is 0 and means nothing.
    logprob:          of the token under the steered scores, before support mask, edits and temperature.
    weights, rewards: [groups, K], those that chose the token; rewards with β.
    strength:         a, or a* in a trust region.
    kl:               KL(π_a ‖ π_m) in nats; NaN where the method is not of the form b + a (m − b).
    branch_logprobs:  [rows of the logits], log-probability of the token in each branch.
    top:              (log-probabilities, ids) of the likeliest tokens, [groups, 20] each, where asked for.
    """

    tokens: Tensor
    failed: Tensor
    logprob: Tensor
    weights: Tensor
    rewards: Tensor
    strength: Tensor
    kl: Tensor
    branch_logprobs: Tensor
    top: tuple[Tensor, Tensor] | None


def steer(
    logits: Tensor,
    groups: Groups,
    table: SteerTable,
    edits: Edits | None = None,
    *,
    trace: bool = True,
    top: bool = False,
) -> Choice:
    """Chooses one token for each request and moves the table on by it.

    logits [rows, vocab] float32. With trace=False, log-probabilities and KL are NaN where nothing needs them.
    """
    shard = table.shard
    # between two steps' products an operation costs its dispatch: what nobody asks for is left out
    asks, columns = Features.of(groups, table), Columns(table, groups.table)
    steps = table.steps[groups.table]
    rewards, weights = table.rewards[groups.table], table.asked[groups.table]
    if asks.rewarded:
        weights = reweight(weights, rewards, columns["reward"])
    share = torch.where(groups.branch > 0, weights[groups.owner, (groups.branch - 1).clamp(min=0)], 0.0)

    scores, strength = _mix(logits, groups, columns, steps, share, delayed=asks.delayed)
    kl = (
        _stay_near(logits, groups, columns, share, scores, strength, shard, measure=trace)
        if asks.limited or trace
        else torch.full_like(strength, torch.nan)
    )
    if asks.delayed:
        _add_delayed(logits, groups, columns, table, steps, scores)
    failed = shard.any(~(scores.sum(-1).isfinite() & _all_finite(logits, groups)))

    steered = shard.log_softmax(scores) if trace or top else None
    if bool(failed.any()):
        scores.masked_fill_(failed[:, None], 0.0)
    if asks.masked:
        _mask(scores, logits, groups, columns, table)
    scores[:, table.vocab :] = -torch.inf
    if edits is not None:
        edits.apply(scores)
    failed |= shard.amax(scores) == -torch.inf
    tokens = draw(scores, columns, steps, shard).masked_fill(failed, 0)

    branch_logprobs = _unknown(logits)
    if trace or asks.rewarded:
        branch_logprobs = shard.at(shard.log_softmax(logits), tokens[groups.owner])
        _reward(groups, columns, table, branch_logprobs)
    table.steps[groups.table] = steps + 1
    return Choice(
        tokens=tokens,
        failed=failed,
        logprob=shard.at(steered, tokens) if steered is not None else _unknown(scores),
        weights=weights,
        rewards=rewards * columns["beta"][:, None],
        strength=strength,
        kl=kl,
        branch_logprobs=branch_logprobs,
        top=shard.topk(steered, TOP_LOGPROBS) if top and steered is not None else None,
    )


def reweight(asked: Tensor, rewards: Tensor, reward: Tensor) -> Tensor:
    """w ∝ w⁰ exp(−reward · R): asked, rewards [groups, K]; reward = β/τ [groups] → [groups, K].

    The minimiser over the simplex of Σ w_k R_k + τ KL(w ‖ w⁰). In log space, and from the least reward on: it
    holds for any finite rewards and β/τ, and a weight that was asked to be 0 stays 0. A request without
    objectives has a row of zeros.
    """
    some = asked > 0
    least = rewards.masked_fill(~some, torch.inf).amin(-1, keepdim=True)
    exponents = asked.log() - reward[:, None] * torch.where(some, rewards - least, 0.0)
    exponents = exponents - exponents.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
    unnormalised = exponents.exp()
    # one after the other: `sum` would group a row by the columns that other requests need
    total = unnormalised.cumsum(-1)[:, -1:].clamp(min=1e-300)
    return torch.where((reward == 0)[:, None], asked, unnormalised / total)


def draw(scores: Tensor, columns: Columns, steps: Tensor, shard: Whole = WHOLE) -> Tensor:
    """A token for each row of scores [groups, vocab]: the arg max, or where there is a temperature a draw."""
    tokens = shard.argmax(scores)
    hot = (columns["temperature"] >= GREEDY_BELOW).nonzero()[:, 0]
    if len(hot):
        temperature, top_p, min_p = (columns[name][hot] for name in ("temperature", "top_p", "min_p"))
        warm = scores[hot] / temperature[:, None].to(scores.dtype)
        threshold = support_threshold(warm, columns["top_k"][hot], top_p, min_p, shard)
        noise = gumbel(columns["seed"][hot], steps[hot], scores.shape[1], shard.first)
        tokens[hot] = shard.argmax(noise.add_(warm).masked_fill_(warm < threshold, -torch.inf))
    return tokens


def _mix(
    logits: Tensor, groups: Groups, columns: Columns, steps: Tensor, share: Tensor, *, delayed: bool
) -> tuple[Tensor, Tensor]:
    """The steered scores [groups, vocab] and strength [groups]; a delayed method starts at z_1."""
    base, scale = columns["base"], columns["scale"]
    if delayed:
        starting = (columns["delay"] != 0) & (steps == 0)
        base, scale = torch.where(starting, 0.0, base), torch.where(starting, 1.0, scale)
    coefficients = torch.where(groups.branch > 0, scale[groups.owner] * share, base[groups.owner])
    return groups.combine(logits, coefficients), scale


def _stay_near(
    logits: Tensor,
    groups: Groups,
    columns: Columns,
    share: Tensor,
    scores: Tensor,
    strength: Tensor,
    shard: Whole,
    *,
    measure: bool,
) -> Tensor:
    """Where there is a trust region, moves scores and strength into it; returns KL(π_a ‖ π_m), [groups].

    With `measure` the divergence is also computed for methods without a region that lie on the same ray.
    """
    kl = torch.full_like(strength, torch.nan)
    has_base = groups.branch[groups.first] == 0
    limited = columns["kl_budget"] < torch.inf
    on_ray = has_base & (groups.count > 1) & (columns["base"] == 1 - strength) & (columns["delay"] == 0)
    rays = limited | (on_ray if measure else limited)
    if not bool(rays.any()):
        return kl
    base = logits[groups.first[rays]]
    direction = groups.combine(logits, share)[rays] - base
    bounded = limited[rays]
    if not bool(bounded.all()):
        free = rays & ~limited
        kl[free] = divergence(base[~bounded], direction[~bounded], strength[free], shard)
    if bool(bounded.any()):
        a, kl[limited] = solve(
            base[bounded], direction[bounded], strength[limited], columns["kl_budget"][limited], shard
        )
        strength[limited] = a
        scores[limited] = torch.addcmul(base[bounded], direction[bounded], a[:, None].to(base.dtype))
    return kl


def _add_delayed(
    logits: Tensor, groups: Groups, columns: Columns, table: SteerTable, steps: Tensor, scores: Tensor
) -> None:
    """OPAD: adds g times the previous step's z_1 − z_0 to the scores, and keeps this step's."""
    held = table.hold(logits.shape[1])
    for group in (columns["delay"] != 0).nonzero()[:, 0].tolist():
        slot, first = int(table.slot[groups.table[group]]), int(groups.first[group])
        if steps[group] > 0:
            scores[group] += columns["delay"][group].to(scores.dtype) * held[slot]
        held[slot] = logits[first + 1] - logits[first]


def _all_finite(logits: Tensor, groups: Groups) -> Tensor:
    """Whether all of a group's rows are finite, [groups]."""
    broken = torch.zeros(len(groups.table), dtype=torch.int64, device=logits.device)
    return broken.index_add_(0, groups.owner, (~logits.sum(-1).isfinite()).long()) == 0


def _mask(scores: Tensor, logits: Tensor, groups: Groups, columns: Columns, table: SteerTable) -> None:
    """Support masks; scores [groups, vocab] in place."""
    masked = (columns["mask_top_p"] < 1).nonzero()[:, 0]
    if not len(masked):
        return  # others of the table have one
    last = groups.first[masked] + groups.count[masked] - 1  # one objective: the row after the base
    preferred = logits[last] / columns["mask_temperature"][masked, None].to(logits.dtype)
    preferred[:, table.vocab :] = -torch.inf
    outside = preferred < table.shard.nucleus(preferred, columns["mask_top_p"][masked])
    scores[masked] = scores[masked].masked_fill(outside, -torch.inf)


def _reward(groups: Groups, columns: Columns, table: SteerTable, branch_logprobs: Tensor) -> None:
    """Adds the chosen token's rewards l_k − l_0 to the table."""
    before = table.rewards[groups.table]
    objective = groups.branch > 0
    gains = torch.zeros_like(before)
    reward = (branch_logprobs - branch_logprobs[groups.first[groups.owner]]).double()
    gains[groups.owner[objective], groups.branch[objective] - 1] = reward[objective]
    count = (table.steps[groups.table] + 1)[:, None]
    decay, kind = columns["decay"][:, None], columns["accumulate"][:, None]
    after = torch.where(
        kind == MEAN,
        before + (gains - before) / count,
        torch.where(kind == EMA, decay * before + (1 - decay) * gains, before + gains),
    )
    known = (groups.branch[groups.first] == 0)[:, None] & after.isfinite()
    table.rewards[groups.table] = torch.where(known, after, before)


def _unknown(rows: Tensor) -> Tensor:
    return rows.new_full((len(rows),), torch.nan)
