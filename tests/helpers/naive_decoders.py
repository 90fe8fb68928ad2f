"""Published decoding methods as their papers write them: whole vectors and loops, one token at a time.

Nothing here is shared with the engine. The logits come from transformers; arithmetic after them is float64.
`follow` walks along an answer of the engine and asks at every token what the literal method would choose.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, LlamaForCausalLM
from trimtab.engine.methods.builtin import (
    Amulet,
    Base,
    ContextSteering,
    Guidance,
    LinearAlignment,
    Mato,
    Mixture,
    Opad,
    Prompt,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor
    from trimtab.engine.methods.base import Method
    from trimtab.engine.outputs import Output

TIE = 1e-4
"""Scores nearer than this, relative to the method's scale, are a tie in float32."""


def reference(folder: Path) -> LlamaForCausalLM:
    """The model as transformers computes it, in float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def exact(folder: Path) -> LlamaForCausalLM:
    """The model in float64, its rotations too, which transformers always computes in float32."""
    model = reference(folder).double()
    config: Any = model.config
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = config.rope_parameters["rope_theta"] ** -exponents

    def rotation(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None] * frequencies
        return torch.cat((angles.cos(), angles.cos()), -1), torch.cat((angles.sin(), angles.sin()), -1)

    model.model.rotary_emb.forward = rotation
    return model


class Branches:
    """Log-probabilities of a request's branches from transformers, each branch with its own cache."""

    def __init__(self, model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], vocab: int) -> None:
        self._model, self._vocab = model, vocab
        self._new = [list(prompt) for prompt in prompts]
        self._caches = [DynamicCache() for _ in prompts]

    @torch.inference_mode()
    def logprobs(self) -> Tensor:
        """[branches, vocab] float64, of the next token."""
        rows = []
        for cache, new in zip(self._caches, self._new, strict=True):
            found: Any = self._model(torch.tensor([new]), past_key_values=cache, use_cache=True)
            rows.append(found.logits[0, -1].double().log_softmax(-1))
        return torch.stack(rows)[:, : self._vocab]

    def append(self, token: int) -> None:
        self._new = [[token] for _ in self._new]


class Known:
    """As `Branches`, for an answer that is known: one forward a branch over its prompt and the answer."""

    @torch.inference_mode()
    def __init__(self, model: LlamaForCausalLM, output: Output, vocab: int) -> None:
        rows = []
        for branch in output.branches:
            ids = torch.tensor([branch.prompt_token_ids + output.token_ids[:-1]])
            logits = model(ids, logits_to_keep=len(output.token_ids)).logits[0]
            rows.append(logits.double().log_softmax(-1)[:, :vocab])
        self._logprobs = torch.stack(rows, 1)  # [tokens, branches, vocab]
        self._at = 0

    def logprobs(self) -> Tensor:
        """[branches, vocab] float64, of the next token."""
        return self._logprobs[self._at]

    def append(self, token: int) -> None:
        self._at += 1


@dataclass
class Literal:
    """A method at work. `scores` maps log-probabilities [branches, vocab] to steered scores [vocab].

    scale: Σ |c_b|, by which an error of the logits is amplified. weights: MATO's, one entry a token.
    """

    scores: Callable[[Tensor], Tensor]
    scale: float
    took: Callable[[Tensor, int], None] = lambda z, token: None
    weights: list[list[float]] = field(default_factory=list)


def regularised_leader(
    base: Tensor, anchor: Tensor, alpha: float, lam: float, eta: float, steps: int
) -> Tensor:
    """Follow-the-Regularised-Leader over the token distribution: every step a vector, normalised."""
    policy, utilities = anchor, torch.zeros_like(anchor)
    for t in range(1, steps + 1):
        utilities += alpha * (policy - base)
        policy = (lam * anchor + utilities / t + policy / (eta * t)) / (lam + 1 / (eta * t))
        policy = policy.log_softmax(-1)
    return policy


def literal(method: Method) -> Literal:
    """The method as its paper writes it; z are the branches' log-probabilities, base first."""
    strength = method.program().scale
    scale = abs(1 - strength) + abs(strength)
    shares = normalised([objective.weight for objective in method.objectives])
    match method:
        case Base():
            found = Literal(lambda z: z[0], 1.0)
        case Prompt():
            found = Literal(lambda z: z[1], 1.0)
        case Mixture():
            found = Literal(lambda z: shares @ z[1:], 1.0)
        case Guidance():
            found = Literal(lambda z: z[0] + method.guidance_scale * (z[1] - z[0]), scale)
        case ContextSteering():
            found = Literal(lambda z: z[0] + method.strength * (shares @ (z[1:] - z[0])), scale)
        case LinearAlignment():
            found = Literal(lambda z: linear_alignment(z, method), scale)
        case Amulet():
            loop = (method.alpha, method.lam, method.eta, method.iterations)
            found = Literal(lambda z: regularised_leader(z[0], z[1], *loop), scale)
        case Opad():
            found = opad(method)
        case Mato():
            found = mato(method, shares, scale)
        case _:
            raise NotImplementedError(method.name)
    return found


def normalised(weights: Sequence[float]) -> Tensor:
    found = torch.tensor(weights, dtype=torch.float64)
    return found / found.sum()


def linear_alignment(z: Tensor, method: LinearAlignment) -> Tensor:
    scores = (1 + method.ratio) * z[1] - method.ratio * z[0]
    if method.mask_top_p is None:
        return scores
    probabilities, ids = (z[1] / method.mask_temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    return scores.index_fill(0, ids[before >= method.mask_top_p], -torch.inf)


def opad(method: Opad) -> Literal:
    before: list[Tensor] = []

    def scores(z: Tensor) -> Tensor:
        if not before:
            return z[1]
        return (1 + method.gain) * z[1] - method.gain * z[0] + method.gain * before[-1]

    return Literal(scores, 1 + 4 * method.gain, lambda z, token: before.append(z[1] - z[0]))


def mato(method: Mato, asked: Tensor, scale: float) -> Literal:
    rewards = torch.zeros_like(asked)
    loop = (method.alpha, method.lam, method.nu, method.iterations)

    def weights() -> Tensor:
        tilted = asked * (-rewards / method.tau).exp()
        return tilted / tilted.sum()

    def scores(z: Tensor) -> Tensor:
        found.weights.append(weights().tolist())
        return regularised_leader(z[0], weights() @ z[1:], *loop)

    def took(z: Tensor, token: int) -> None:
        rewards.add_(method.beta * (z[1:, token] - z[0, token]))

    found = Literal(scores, scale, took)
    return found


@dataclass
class Agreement:
    """An answer beside the literal method: tokens compared, and the relative margins where they differ."""

    tokens: int = 0
    ties: list[float] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every difference is a tie that float32 cannot decide."""
        return self.tokens > 0 and all(margin < TIE for margin in self.ties)


def follow(
    output: Output, method: Method, model: LlamaForCausalLM, vocab: int, known: bool = False
) -> Agreement:
    """Walks along a greedy answer, choosing each token anew by the literal method.

    Where the two differ the answer's token is followed, so that one tie does not end the comparison. With
    `known` the logits come from one forward over the whole answer instead of one a token.
    """
    prompts = [branch.prompt_token_ids for branch in output.branches]
    branches = Known(model, output, vocab) if known else Branches(model, prompts, vocab)
    rule, agreement = literal(method), Agreement()
    for token in output.token_ids:
        logprobs = branches.logprobs()
        scores = rule.scores(logprobs)
        margin = float(scores.max() - scores[token])
        if int(scores.argmax()) != token:
            agreement.ties.append(margin / rule.scale)
        agreement.tokens += 1
        rule.took(logprobs, token)
        branches.append(token)
    agreement.weights = rule.weights
    return agreement
