"""Literal implementations of the published decoding methods: full vectors and loops, one token at a time.

No code is shared with the engine. The logits come from transformers; the arithmetic after them is float64.
`check_greedy` compares each token of an engine's answer with the literal method's choice.
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

TIE_TOLERANCE = 1e-4
"""Scores closer than this, relative to the method's scale, are a tie in float32."""


def load_reference(folder: Path) -> LlamaForCausalLM:
    """Load the model with transformers in float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def load_float64(folder: Path) -> LlamaForCausalLM:
    """Load the model in float64, with RoPE in float64, which transformers always computes in float32."""
    model = load_reference(folder).double()
    config: Any = model.config
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = config.rope_parameters["rope_theta"] ** -exponents

    def rotary_forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None] * frequencies
        return torch.cat((angles.cos(), angles.cos()), -1), torch.cat((angles.sin(), angles.sin()), -1)

    model.model.rotary_emb.forward = rotary_forward
    return model


class StepwiseLogprobs:
    """Log-probabilities of a request's branches from transformers, with one KV cache for each branch."""

    def __init__(self, model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], vocab: int) -> None:
        self._model, self._vocab = model, vocab
        self._new_ids = [list(prompt) for prompt in prompts]
        self._caches = [DynamicCache() for _ in prompts]

    @torch.inference_mode()
    def logprobs(self) -> Tensor:
        """[branches, vocab] float64, of the next token."""
        rows = []
        for cache, ids in zip(self._caches, self._new_ids, strict=True):
            output: Any = self._model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            rows.append(output.logits[0, -1].double().log_softmax(-1))
        return torch.stack(rows)[:, : self._vocab]

    def append(self, token: int) -> None:
        self._new_ids = [[token] for _ in self._new_ids]


class TeacherForcedLogprobs:
    """Like `StepwiseLogprobs` for a known answer: one forward pass over prompt and answer for each branch."""

    @torch.inference_mode()
    def __init__(self, model: LlamaForCausalLM, output: Output, vocab: int) -> None:
        rows = []
        for branch in output.branches:
            ids = torch.tensor([branch.prompt_token_ids + output.token_ids[:-1]])
            logits = model(ids, logits_to_keep=len(output.token_ids)).logits[0]
            rows.append(logits.double().log_softmax(-1)[:, :vocab])
        self._logprobs = torch.stack(rows, 1)  # [tokens, branches, vocab]
        self._position = 0

    def logprobs(self) -> Tensor:
        """[branches, vocab] float64, of the next token."""
        return self._logprobs[self._position]

    def append(self, token: int) -> None:
        self._position += 1


@dataclass
class NaiveDecoder:
    """The state of a method. `scores` maps log-probabilities [branches, vocab] to steered scores [vocab].

    scale: Σ |c_b|, by which an error of the logits is amplified. weights: MATO's, one entry for each token.
    """

    scores: Callable[[Tensor], Tensor]
    scale: float
    on_token: Callable[[Tensor, int], None] = lambda z, token: None
    weights: list[list[float]] = field(default_factory=list)


def ftrl_loop(base: Tensor, target: Tensor, alpha: float, lam: float, eta: float, steps: int) -> Tensor:
    """Follow-the-Regularised-Leader on token log-probabilities, normalised in every step."""
    policy, utilities = target, torch.zeros_like(target)
    for t in range(1, steps + 1):
        utilities += alpha * (policy - base)
        policy = (lam * target + utilities / t + policy / (eta * t)) / (lam + 1 / (eta * t))
        policy = policy.log_softmax(-1)
    return policy


def naive_decoder(method: Method) -> NaiveDecoder:
    """The literal implementation of the method; z: the branches' log-probabilities, base first."""
    strength = method.coefficients().objective_coef
    scale = abs(1 - strength) + abs(strength)
    weights = normalize([objective.weight for objective in method.objectives])
    match method:
        case Base():
            decoder = NaiveDecoder(lambda z: z[0], 1.0)
        case Prompt():
            decoder = NaiveDecoder(lambda z: z[1], 1.0)
        case Mixture():
            decoder = NaiveDecoder(lambda z: weights @ z[1:], 1.0)
        case Guidance():
            decoder = NaiveDecoder(lambda z: z[0] + method.guidance_scale * (z[1] - z[0]), scale)
        case ContextSteering():
            decoder = NaiveDecoder(lambda z: z[0] + method.strength * (weights @ (z[1:] - z[0])), scale)
        case LinearAlignment():
            decoder = NaiveDecoder(lambda z: linear_alignment(z, method), scale)
        case Amulet():
            loop_args = (method.alpha, method.lam, method.eta, method.iterations)
            decoder = NaiveDecoder(lambda z: ftrl_loop(z[0], z[1], *loop_args), scale)
        case Opad():
            decoder = opad(method)
        case Mato():
            decoder = mato(method, weights, scale)
        case _:
            raise NotImplementedError(method.name)
    return decoder


def normalize(weights: Sequence[float]) -> Tensor:
    values = torch.tensor(weights, dtype=torch.float64)
    return values / values.sum()


def linear_alignment(z: Tensor, method: LinearAlignment) -> Tensor:
    scores = (1 + method.ratio) * z[1] - method.ratio * z[0]
    if method.mask_top_p is None:
        return scores
    probabilities, ids = (z[1] / method.mask_temperature).softmax(-1).sort(descending=True)
    mass_before = probabilities.cumsum(0) - probabilities
    return scores.index_fill(0, ids[mass_before >= method.mask_top_p], -torch.inf)


def opad(method: Opad) -> NaiveDecoder:
    prev_contrasts: list[Tensor] = []

    def scores(z: Tensor) -> Tensor:
        if not prev_contrasts:
            return z[1]
        return (1 + method.gain) * z[1] - method.gain * z[0] + method.gain * prev_contrasts[-1]

    return NaiveDecoder(scores, 1 + 4 * method.gain, lambda z, token: prev_contrasts.append(z[1] - z[0]))


def mato(method: Mato, prior_weights: Tensor, scale: float) -> NaiveDecoder:
    rewards = torch.zeros_like(prior_weights)
    loop_args = (method.alpha, method.lam, method.nu, method.iterations)

    def current_weights() -> Tensor:
        unnormalized = prior_weights * (-rewards / method.tau).exp()
        return unnormalized / unnormalized.sum()

    def scores(z: Tensor) -> Tensor:
        decoder.weights.append(current_weights().tolist())
        return ftrl_loop(z[0], current_weights() @ z[1:], *loop_args)

    def on_token(z: Tensor, token: int) -> None:
        rewards.add_(method.beta * (z[1:, token] - z[0, token]))

    decoder = NaiveDecoder(scores, scale, on_token)
    return decoder


@dataclass
class Agreement:
    """Comparison of an answer with the literal method: tokens compared, margins where they differ."""

    tokens: int = 0
    ties: list[float] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every difference is a tie that float32 cannot decide."""
        return self.tokens > 0 and all(margin < TIE_TOLERANCE for margin in self.ties)


def check_greedy(
    output: Output, method: Method, model: LlamaForCausalLM, vocab: int, teacher_forced: bool = False
) -> Agreement:
    """Compare each token of a greedy answer with the literal method's choice.

    Where they differ, continue with the answer's token, so that one tie does not end the comparison. With
    `teacher_forced` the logits come from one forward pass over the answer instead of one for each token.
    """
    prompts = [branch.prompt_token_ids for branch in output.branches]
    source = (
        TeacherForcedLogprobs(model, output, vocab)
        if teacher_forced
        else StepwiseLogprobs(model, prompts, vocab)
    )
    decoder, agreement = naive_decoder(method), Agreement()
    for token in output.token_ids:
        logprobs = source.logprobs()
        scores = decoder.scores(logprobs)
        margin = float(scores.max() - scores[token])
        if int(scores.argmax()) != token:
            agreement.ties.append(margin / decoder.scale)
        agreement.tokens += 1
        decoder.on_token(logprobs, token)
        source.append(token)
    agreement.weights = decoder.weights
    return agreement
