"""Outputs of the engine: text, tokens, prompts of the branches, trace and log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..models.chat.prompts import BranchPrompt

__all__ = ["BranchPrompt", "Delta", "Output", "Timings", "TokenLogprobs", "Trace"]


@dataclass
class Trace:
    """How each token was chosen; every list has one entry per token.

    weights:          w(t) used for it, [tokens][K].
    rewards:          R_k before it, accumulated over the tokens so far, [tokens][K].
    strength:         a, or a* of the trust region, [tokens].
    kl:               KL(π_a ‖ π_m) in nats; None for a method without base and merged policy, [tokens].
    branch_logprobs:  log-probability of the chosen token in each branch, base first, [tokens][K+1].
    fulfilment:       what each objective has reached with it: 0 as plain decoding, 1 as its branch alone.
                      None while that is unknown, see `kernels.steering.gains`, [tokens][K].
    """

    weights: list[list[float]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    strength: list[float] = field(default_factory=list)
    kl: list[float | None] = field(default_factory=list)
    branch_logprobs: list[list[float]] = field(default_factory=list)
    fulfilment: list[list[float | None]] = field(default_factory=list)

    def tail(self, start: int) -> Trace:
        """The part from token `start` on."""
        return Trace(
            weights=self.weights[start:],
            rewards=self.rewards[start:],
            strength=self.strength[start:],
            kl=self.kl[start:],
            branch_logprobs=self.branch_logprobs[start:],
            fulfilment=self.fulfilment[start:],
        )


@dataclass(frozen=True)
class TokenLogprobs:
    """The chosen and the likeliest tokens of the steered distribution before temperature and truncation."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class Timings:
    """Seconds in the queue, in prefill and in decoding; tokens per second while decoding."""

    queue: float
    prefill: float
    decode: float
    tokens_per_second: float


@dataclass(frozen=True)
class Output:
    """One answer. `token_ids` includes the stop token, `text` does not.

    finish_reason is "stop", "length", "abort" or "error"; for the last two `error` gives the reason.
    `fulfilment` [K] is that of the whole answer, see `Trace`. Without a trace only `Trim` knows it.
    `notes` are sentences about the settings and about objectives that the model does not react to.
    In the result of `generate`, `outputs` has all n answers of the request, this one first.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    branches: list[BranchPrompt]
    trace: Trace | None
    logprobs: list[TokenLogprobs] | None
    timings: Timings
    seed: int
    error: str | None = None
    outputs: list[Output] = field(default_factory=list, repr=False)
    fulfilment: list[float | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Delta:
    """An increment of a streamed answer: new text, new tokens, and in the last one the complete `output`.

    `index` is the answer's number among the n of its request; trace and logprobs, if requested, cover the new
    tokens. Text may come later than its tokens.
    """

    index: int
    text: str
    token_ids: list[int]
    trace: Trace | None = None
    logprobs: list[TokenLogprobs] | None = None
    output: Output | None = None


@dataclass(frozen=True)
class SampledToken:
    """The token chosen for a group and its trace values, see `Trace`.

    failed: no allowed token had a finite score. weights, rewards and fulfilment have one entry per objective,
    branch_logprobs one per decoded branch. top_logprobs: the likeliest tokens with their
    log-probabilities, if requested.
    """

    token_id: int
    failed: bool
    logprob: float
    weights: list[float]
    rewards: list[float]
    strength: float
    kl: float | None
    branch_logprobs: list[float]
    top_logprobs: list[tuple[int, float]]
    fulfilment: list[float | None] = field(default_factory=list)
