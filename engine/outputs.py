"""What comes back: text, tokens, the branches they came from, and the trace of how they were chosen."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..models.chat.prompts import BranchPrompt

__all__ = ["BranchPrompt", "Delta", "Output", "Timings", "TokenLogprobs", "Trace"]


@dataclass
class Trace:
    """How each token was chosen; every list has one entry a token.

    weights:          w(t) that chose it, [tokens][K].
    rewards:          R_k before it, accumulated over the tokens so far, [tokens][K].
    strength:         a, or a* of the trust region, [tokens].
    kl:               KL(π_a ‖ π_m) in nats; None for a method without base and merged policy, [tokens].
    branch_logprobs:  log-probability of the chosen token in each branch, base first, [tokens][K+1].
    """

    weights: list[list[float]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    strength: list[float] = field(default_factory=list)
    kl: list[float | None] = field(default_factory=list)
    branch_logprobs: list[list[float]] = field(default_factory=list)

    def tail(self, start: int) -> Trace:
        """The part from token `start` on."""
        return Trace(
            weights=self.weights[start:],
            rewards=self.rewards[start:],
            strength=self.strength[start:],
            kl=self.kl[start:],
            branch_logprobs=self.branch_logprobs[start:],
        )


@dataclass(frozen=True)
class TokenLogprobs:
    """Of the steered distribution before temperature and truncation: the chosen token and the likeliest."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class Timings:
    """Seconds waiting, computing the prompts, and decoding; tokens per second while decoding."""

    queue: float
    prefill: float
    decode: float
    tokens_per_second: float


@dataclass(frozen=True)
class Output:
    """One answer. `token_ids` includes the stop token, `text` does not.

    finish_reason is "stop", "length", "abort" or "error"; of the last two `error` says why in a sentence.
    `outputs` of what `generate` returns holds all n answers of the request, this one first.
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


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed answer: new text, new tokens, and at the end the whole `output`.

    `index` says which of the n answers it belongs to; trace and logprobs, where asked for, are of the new
    tokens. Text may come later than the tokens that it is made of.
    """

    index: int
    text: str
    token_ids: list[int]
    trace: Trace | None = None
    logprobs: list[TokenLogprobs] | None = None
    output: Output | None = None


@dataclass(frozen=True)
class SampledToken:
    """The token chosen for a group and how; see `Trace` for what the numbers are.

    weights and rewards have one entry an objective, branch_logprobs one a branch that ran. top: the likeliest
    tokens and their log-probabilities, where asked for.
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
