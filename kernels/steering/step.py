"""The steering step: from the logits of a request's branches to its next token.

For each request, over branch logits z_b, with its `SteeringCoefficients` and weights w (base, scale and g are
base_coef, objective_coef and prev_contrast_coef):

    w_k ∝ w⁰_k exp(−(β/τ) R_k)                                MATO's weights; w⁰ without rewards
    s = base · z_0 + scale · Σ_k w_k z_k  [+ g (z_1 − z_0) of the previous step]        the steered scores
    s = b + a* (m − b),  b = z_0,  m = Σ_k w_k z_k            instead, with a KL budget: KL(π_a* ‖ π_m) ≤ ε
    support mask → bias and bans → repetition → temperature → top-k → top-p → min-p → argmax or sample
    R_k ← R_k + l_k(y) − l_0(y)                               for the chosen token y, l = log-softmax of z

One call handles any mixture of methods and branch counts. Requests share only elementwise operations and
reductions along the vocabulary, so none depends on the others, and a row that is not finite fails only its
request.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.vocab_parallel import UNSHARDED, UnshardedVocab
from .coefficients import EMA, MEAN
from .features import StepFeatures
from .gumbel import gumbel
from .state import GREEDY_BELOW, LogitEdits, RequestLayout, StateView, SteeringState
from .top_k_top_p import truncation_threshold
from .trust_region import kl_divergence, solve_kl_budget

TOP_LOGPROBS = 20


@dataclass(frozen=True)
class SamplerOutput:
    """Results of a steering step; [requests] each unless noted.

    failed:           logits were not finite or no token was allowed; the token is 0 and has no meaning.
    logprob:          of the token under the steered scores, before support mask, edits and temperature.
    weights, rewards: [requests, K], as used for this token; rewards include β.
    strength:         a, or a* with a KL budget.
    kl:               KL(π_a ‖ π_m) in nats; NaN where the method is not of the form b + a (m − b).
    branch_logprobs:  [rows of the logits], log-probability of the token in each branch.
    top_logprobs:     (log-probabilities, ids) of the likeliest tokens, [requests, 20] each, if requested.
    """

    tokens: Tensor
    failed: Tensor
    logprob: Tensor
    weights: Tensor
    rewards: Tensor
    strength: Tensor
    kl: Tensor
    branch_logprobs: Tensor
    top_logprobs: tuple[Tensor, Tensor] | None


def steer(
    logits: Tensor,
    layout: RequestLayout,
    state: SteeringState,
    edits: LogitEdits | None = None,
    *,
    trace: bool = True,
    top: bool = False,
) -> SamplerOutput:
    """Choose one token for each request and update the state.

    logits [rows, vocab] float32. With trace=False, log-probabilities and KL are NaN unless needed otherwise.
    """
    shard = state.shard
    # skip what no request needs: between two steps' matmuls, dispatch dominates an operation's cost
    features, params = StepFeatures.from_layout(layout, state), StateView(state, layout.state_rows)
    steps = state.steps[layout.state_rows]
    rewards, weights = state.rewards[layout.state_rows], state.prior_weights[layout.state_rows]
    if features.has_rewards:
        weights = reweight(weights, rewards, params["reward_rate"])
    row_weight = torch.where(
        layout.branch_of_row > 0, weights[layout.request_of_row, (layout.branch_of_row - 1).clamp(min=0)], 0.0
    )

    scores, strength = _mix_logits(
        logits, layout, params, steps, row_weight, uses_prev_contrast=features.uses_prev_contrast
    )
    kl = (
        _apply_trust_region(logits, layout, params, row_weight, scores, strength, shard, measure_kl=trace)
        if features.has_kl_budget or trace
        else torch.full_like(strength, torch.nan)
    )
    if features.uses_prev_contrast:
        _add_prev_contrast(logits, layout, params, state, steps, scores)
    failed = shard.any(~(scores.sum(-1).isfinite() & _logits_finite(logits, layout)))

    logprobs = shard.log_softmax(scores) if trace or top else None
    if bool(failed.any()):
        scores.masked_fill_(failed[:, None], 0.0)
    if features.has_nucleus_mask:
        _apply_nucleus_mask(scores, logits, layout, params, state)
    scores[:, state.vocab_size :] = -torch.inf
    if edits is not None:
        edits.apply(scores)
    failed |= shard.amax(scores) == -torch.inf
    tokens = sample(scores, params, steps, shard).masked_fill(failed, 0)

    branch_logprobs = _nan_rows(logits)
    if trace or features.has_rewards:
        branch_logprobs = shard.gather_token(shard.log_softmax(logits), tokens[layout.request_of_row])
        _accumulate_rewards(layout, params, state, branch_logprobs)
    state.steps[layout.state_rows] = steps + 1
    return SamplerOutput(
        tokens=tokens,
        failed=failed,
        logprob=shard.gather_token(logprobs, tokens) if logprobs is not None else _nan_rows(scores),
        weights=weights,
        rewards=rewards * params["beta"][:, None],
        strength=strength,
        kl=kl,
        branch_logprobs=branch_logprobs,
        top_logprobs=shard.topk(logprobs, TOP_LOGPROBS) if top and logprobs is not None else None,
    )


def reweight(prior: Tensor, rewards: Tensor, reward_rate: Tensor) -> Tensor:
    """w ∝ w⁰ exp(−reward_rate · R): prior, rewards [requests, K]; reward_rate β/τ [requests] → [requests, K].

    The minimiser over the simplex of Σ w_k R_k + τ KL(w ‖ w⁰). Computed in log space relative to the smallest
    reward, so it is stable for any finite rewards and β/τ, and a prior of 0 stays 0. A request without
    objectives has a row of zeros.
    """
    positive = prior > 0
    min_reward = rewards.masked_fill(~positive, torch.inf).amin(-1, keepdim=True)
    log_weights = prior.log() - reward_rate[:, None] * torch.where(positive, rewards - min_reward, 0.0)
    log_weights = log_weights - log_weights.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
    unnormalised = log_weights.exp()
    # sequential: the order of `sum` would depend on K, the maximum over all requests
    total = unnormalised.cumsum(-1)[:, -1:].clamp(min=1e-300)
    return torch.where((reward_rate == 0)[:, None], prior, unnormalised / total)


def sample(scores: Tensor, params: StateView, steps: Tensor, shard: UnshardedVocab = UNSHARDED) -> Tensor:
    """Choose a token for each row of scores [requests, vocab]: the argmax, or a sample if temperature > 0."""
    tokens = shard.argmax(scores)
    sampled = (params["temperature"] >= GREEDY_BELOW).nonzero()[:, 0]
    if len(sampled):
        temperature, top_p, min_p = (params[name][sampled] for name in ("temperature", "top_p", "min_p"))
        scaled = scores[sampled] / temperature[:, None].to(scores.dtype)
        threshold = truncation_threshold(scaled, params["top_k"][sampled], top_p, min_p, shard)
        noise = gumbel(params["seed"][sampled], steps[sampled], scores.shape[1], shard.vocab_start)
        tokens[sampled] = shard.argmax(noise.add_(scaled).masked_fill_(scaled < threshold, -torch.inf))
    return tokens


def _mix_logits(
    logits: Tensor,
    layout: RequestLayout,
    params: StateView,
    steps: Tensor,
    row_weight: Tensor,
    *,
    uses_prev_contrast: bool,
) -> tuple[Tensor, Tensor]:
    """The steered scores [requests, vocab] and strength [requests]; OPAD's first step takes z_1 alone."""
    base_coef, objective_coef = params["base_coef"], params["objective_coef"]
    if uses_prev_contrast:
        first_step = (params["prev_contrast_coef"] != 0) & (steps == 0)
        base_coef, objective_coef = (
            torch.where(first_step, 0.0, base_coef),
            torch.where(first_step, 1.0, objective_coef),
        )
    row_coefs = torch.where(
        layout.branch_of_row > 0,
        objective_coef[layout.request_of_row] * row_weight,
        base_coef[layout.request_of_row],
    )
    return layout.combine(logits, row_coefs), objective_coef


def _apply_trust_region(
    logits: Tensor,
    layout: RequestLayout,
    params: StateView,
    row_weight: Tensor,
    scores: Tensor,
    strength: Tensor,
    shard: UnshardedVocab,
    *,
    measure_kl: bool,
) -> Tensor:
    """Reduce strength and scores to the KL budget, where set; return KL(π_a ‖ π_m) [requests].

    With `measure_kl`, also compute the KL of methods without a budget that are of the form b + a (m − b).
    """
    kl = torch.full_like(strength, torch.nan)
    has_base = layout.branch_of_row[layout.row_start] == 0
    has_budget = params["kl_budget"] < torch.inf
    on_ray = (
        has_base
        & (layout.num_rows > 1)
        & (params["base_coef"] == 1 - strength)
        & (params["prev_contrast_coef"] == 0)
    )
    rays = has_budget | (on_ray if measure_kl else has_budget)
    if not bool(rays.any()):
        return kl
    base = logits[layout.row_start[rays]]
    direction = layout.combine(logits, row_weight)[rays] - base
    bounded = has_budget[rays]
    if not bool(bounded.all()):
        unbounded = rays & ~has_budget
        kl[unbounded] = kl_divergence(base[~bounded], direction[~bounded], strength[unbounded], shard)
    if bool(bounded.any()):
        a, kl[has_budget] = solve_kl_budget(
            base[bounded], direction[bounded], strength[has_budget], params["kl_budget"][has_budget], shard
        )
        strength[has_budget] = a
        scores[has_budget] = torch.addcmul(base[bounded], direction[bounded], a[:, None].to(base.dtype))
    return kl


def _add_prev_contrast(
    logits: Tensor,
    layout: RequestLayout,
    params: StateView,
    state: SteeringState,
    steps: Tensor,
    scores: Tensor,
) -> None:
    """OPAD: add g times the previous step's z_1 − z_0 to the scores, and store this step's."""
    prev_contrast = state.reserve_contrast(logits.shape[1])
    for request in (params["prev_contrast_coef"] != 0).nonzero()[:, 0].tolist():
        slot, base_row = int(state.contrast_slot[layout.state_rows[request]]), int(layout.row_start[request])
        if steps[request] > 0:
            scores[request] += params["prev_contrast_coef"][request].to(scores.dtype) * prev_contrast[slot]
        prev_contrast[slot] = logits[base_row + 1] - logits[base_row]


def _logits_finite(logits: Tensor, layout: RequestLayout) -> Tensor:
    """Whether all rows of a request are finite, [requests]."""
    num_nonfinite = torch.zeros(len(layout.state_rows), dtype=torch.int64, device=logits.device)
    return num_nonfinite.index_add_(0, layout.request_of_row, (~logits.sum(-1).isfinite()).long()) == 0


def _apply_nucleus_mask(
    scores: Tensor, logits: Tensor, layout: RequestLayout, params: StateView, state: SteeringState
) -> None:
    """Apply support masks to scores [requests, vocab] in place."""
    masked = (params["mask_top_p"] < 1).nonzero()[:, 0]
    if not len(masked):
        return  # without layout.host_state_rows, features cover requests that are not in this step
    objective_row = (
        layout.row_start[masked] + layout.num_rows[masked] - 1
    )  # one objective: the row after the base
    objective_logits = logits[objective_row] / params["mask_temperature"][masked, None].to(logits.dtype)
    objective_logits[:, state.vocab_size :] = -torch.inf
    outside = objective_logits < state.shard.nucleus_threshold(objective_logits, params["mask_top_p"][masked])
    scores[masked] = scores[masked].masked_fill(outside, -torch.inf)


def _accumulate_rewards(
    layout: RequestLayout, params: StateView, state: SteeringState, branch_logprobs: Tensor
) -> None:
    """Accumulate the chosen token's rewards l_k − l_0 in the state."""
    rewards = state.rewards[layout.state_rows]
    is_objective = layout.branch_of_row > 0
    gains = torch.zeros_like(rewards)
    row_rewards = (branch_logprobs - branch_logprobs[layout.row_start[layout.request_of_row]]).double()
    gains[layout.request_of_row[is_objective], layout.branch_of_row[is_objective] - 1] = row_rewards[
        is_objective
    ]
    num_steps = (state.steps[layout.state_rows] + 1)[:, None]
    decay, mode = params["decay"][:, None], params["accumulate"][:, None]
    new_rewards = torch.where(
        mode == MEAN,
        rewards + (gains - rewards) / num_steps,
        torch.where(mode == EMA, decay * rewards + (1 - decay) * gains, rewards + gains),
    )
    valid = (layout.branch_of_row[layout.row_start] == 0)[:, None] & new_rewards.isfinite()
    state.rewards[layout.state_rows] = torch.where(valid, new_rewards, rewards)


def _nan_rows(rows: Tensor) -> Tensor:
    return rows.new_full((len(rows),), torch.nan)
