"""The steering step: from the logits of a request's branches to its next token.

For each request, over branch logits z_b, with its `SteeringCoefficients` and weights w (base, scale and g are
base_coef, objective_coef and prev_contrast_coef):

    w_k ∝ w⁰_k exp(−(β/τ) R_k)                                MATO's weights; w⁰ without rewards
    scale · w_k = clamp(S i_k + κ [P_k + i_k (E_k − P_k) − R_k], 0, G)    with gains; base is then 1 − scale
    s = base · z_0 + scale · Σ_k w_k z_k  [+ g (z_1 − z_0) of the previous step]        the steered scores
    s = b + a* (m − b),  b = z_0,  m = Σ_k w_k z_k            instead, with a KL budget: KL(π_a* ‖ π_m) ≤ ε
    support mask → bias and bans → repetition → temperature → top-k → top-p → min-p → argmax or sample
    R_k ← R_k + l_k(y) − l_0(y)                               for the chosen token y, l = log-softmax of z
    E_k ← E_k + KL(π_k ‖ π_0),  P_k ← P_k − KL(π_0 ‖ π_k)

One call handles any mixture of methods and branch counts. Requests share only elementwise operations and
reductions along the vocabulary, so none depends on the others, and a row that is not finite fails only its
request.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.vocab_parallel import UNSHARDED, UnshardedVocab
from .feature import MaskInput, StepFeatures
from .gains import GAINS, accumulate_expected, compute_gains, fulfilment
from .gumbel import gumbel
from .layout import LogitEdits, RequestLayout
from .masks import MASKS
from .prev_contrast import PREV_CONTRAST, add_prev_contrast
from .rewards import REWARDS, accumulate_rewards, reweight
from .sampling import GREEDY_BELOW
from .state import StateView, SteeringState
from .top_k_top_p import truncation_threshold
from .trust_region import KL_BUDGET, apply_trust_region

TOP_LOGPROBS = 20


@dataclass(frozen=True)
class SamplerOutput:
    """Results of a steering step; [requests] each unless noted.

    failed:           logits were not finite or no token was allowed; the token is 0 and has no meaning.
    logprob:          of the token under the steered scores, before support mask, edits and temperature.
    weights, rewards: [requests, K], as used for this token; rewards include β.
    fulfilment:       (R_k − P_k) / (E_k − P_k) after this token, [requests, K]; NaN where it is unknown.
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
    fulfilment: Tensor
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
    features, params = state.features(layout), StateView(state, layout.state_rows)
    steps = state.steps[layout.state_rows]
    rewards, branch_rewards, base_rewards = (
        x[layout.state_rows] for x in (state.rewards, state.branch_rewards, state.base_rewards)
    )
    weights, strength, base_coef = _compute_weights(
        state.prior_weights[layout.state_rows], rewards, branch_rewards, base_rewards, params, steps, features
    )
    row_weight = torch.where(
        layout.branch_of_row > 0, weights[layout.request_of_row, (layout.branch_of_row - 1).clamp(min=0)], 0.0
    )

    coefs = torch.where(
        layout.branch_of_row > 0,
        strength[layout.request_of_row] * row_weight,
        base_coef[layout.request_of_row],
    )
    scores = layout.combine(logits, coefs)
    mask_input = MaskInput(logits, coefs, layout, params, state.vocab_size, shard)
    forbidden = {mask: mask.find_forbidden(mask_input) for mask in MASKS if mask in features}
    kl = torch.full_like(strength, torch.nan)
    if KL_BUDGET in features or trace:
        outside = _union([forbidden[mask] for mask in forbidden if mask.in_trust_region], scores)
        kl = apply_trust_region(
            logits, layout, params, row_weight, scores, strength, outside, shard, measure_kl=trace
        )
    if PREV_CONTRAST in features:
        prev_contrast, slots = state.reserve_contrast(logits.shape[1]), state.contrast_slot[layout.state_rows]
        add_prev_contrast(logits, layout, params, prev_contrast, slots, steps, scores)
    failed = shard.any(~(scores.sum(-1).isfinite() & _logits_finite(logits, layout)))

    logprobs = shard.log_softmax(scores) if trace or top else None
    if bool(failed.any()):
        scores.masked_fill_(failed[:, None], 0.0)
    for requests, tokens in forbidden.values():
        if len(requests) == len(scores):
            scores.masked_fill_(tokens, -torch.inf)
        else:
            scores[requests] = scores[requests].masked_fill(tokens, -torch.inf)
    scores[:, state.vocab_size :] = -torch.inf
    if edits is not None:
        edits.apply(scores)
    failed |= shard.amax(scores) == -torch.inf
    tokens = sample(scores, params, steps, shard).masked_fill(failed, 0)

    branch_logprobs, reached = _nan_rows(logits), torch.full_like(rewards, torch.nan)
    if trace or features.branch_logprobs:
        all_logprobs = shard.log_softmax(logits)
        branch_logprobs = shard.gather_token(all_logprobs, tokens[layout.request_of_row])
        new_rewards = accumulate_rewards(rewards, layout, params, steps, branch_logprobs)
        state.rewards[layout.state_rows] = new_rewards
        if trace or GAINS in features:
            expected = accumulate_expected(branch_rewards, base_rewards, layout, all_logprobs, shard)
            state.branch_rewards[layout.state_rows], state.base_rewards[layout.state_rows] = expected
            reached = fulfilment(new_rewards, *expected, params)
    state.steps[layout.state_rows] = steps + 1
    return SamplerOutput(
        tokens=tokens,
        failed=failed,
        logprob=shard.gather_token(logprobs, tokens) if logprobs is not None else _nan_rows(scores),
        weights=weights,
        rewards=rewards * params["beta"][:, None],
        fulfilment=reached,
        strength=strength,
        kl=kl,
        branch_logprobs=branch_logprobs,
        top_logprobs=shard.topk(logprobs, TOP_LOGPROBS) if top and logprobs is not None else None,
    )


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


def _compute_weights(
    prior: Tensor,
    rewards: Tensor,
    branch_rewards: Tensor,
    base_rewards: Tensor,
    params: StateView,
    steps: Tensor,
    features: StepFeatures,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights [requests, K], the strength that they share, and the base's coefficient, [requests] each.

    OPAD's first step takes z_1 alone.
    """
    base_coef, strength = params["base_coef"], params["objective_coef"]
    weights = reweight(prior, rewards, params["reward_rate"]) if REWARDS in features else prior
    if GAINS in features:
        has_gains = params["max_gain"] > 0
        gain_weights, gain_strength = compute_gains(prior, rewards, branch_rewards, base_rewards, params)
        weights = gain_weights.where(has_gains[:, None], weights)
        base_coef = torch.where(has_gains, 1 - gain_strength, base_coef)
        strength = gain_strength.where(has_gains, strength)
    if PREV_CONTRAST in features:
        first_step = (params["prev_contrast_coef"] != 0) & (steps == 0)
        base_coef, strength = (
            torch.where(first_step, 0.0, base_coef),
            torch.where(first_step, 1.0, strength),
        )
    return weights, strength, base_coef


def _union(masks: list[tuple[Tensor, Tensor]], scores: Tensor) -> Tensor | None:
    """Tokens [requests, vocab] that some of these masks forbid; None without masks."""
    if not masks:
        return None
    if len(masks) == 1 and len(masks[0][0]) == len(scores):
        return masks[0][1]
    union = torch.zeros_like(scores, dtype=torch.bool)
    for requests, tokens in masks:
        union[requests] |= tokens
    return union


def _logits_finite(logits: Tensor, layout: RequestLayout) -> Tensor:
    """Whether all rows of a request are finite, [requests]."""
    num_nonfinite = torch.zeros(len(layout.state_rows), dtype=torch.int64, device=logits.device)
    return num_nonfinite.index_add_(0, layout.request_of_row, (~logits.sum(-1).isfinite()).long()) == 0


def _nan_rows(rows: Tensor) -> Tensor:
    return rows.new_full((len(rows),), torch.nan)
