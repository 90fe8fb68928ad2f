"""Decode fixed logits with the steering step, without a model, and record every step's outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from trimtab.engine.methods.builtin import (
    Amulet,
    Base,
    ContextSteering,
    Guidance,
    LinearAlignment,
    Mato,
    Method,
    Mixture,
    Opad,
    Prompt,
)
from trimtab.engine.methods.objective import Objective
from trimtab.engine.methods.trim import Trim
from trimtab.kernels.steering.layout import LogitEdits, RequestLayout
from trimtab.kernels.steering.sampling import RowSampling
from trimtab.kernels.steering.state import SteeringState
from trimtab.kernels.steering.step import steer

if TYPE_CHECKING:
    from collections.abc import Sequence

GREEDY = RowSampling()
SAMPLED = RowSampling(temperature=0.8, top_k=30, top_p=0.95, min_p=0.01, seed=-7)
VOCAB = 1031  # larger than TOP_P_WINDOW, so that a flat row is fully sorted


def make_objectives(*weights: float) -> tuple[Objective, ...]:
    return tuple(Objective(f"objective {index}", weight) for index, weight in enumerate(weights))


@dataclass(frozen=True)
class SteeringCase:
    """One request: its branch logits [steps, branches, vocab], and the indices of those branches."""

    method: Method
    logits: Tensor
    sampling: RowSampling = GREEDY
    branch_ids: list[int] = field(default_factory=list)

    @property
    def branch_indices(self) -> list[int]:
        start = 0 if self.method.coefficients().needs_base else 1
        return self.branch_ids or list(range(start, start + self.logits.shape[1]))


class StepResult(NamedTuple):
    """The outputs of one step for one request."""

    token: int
    failed: bool
    logprob: float
    weights: list[float]
    rewards: list[float]
    fulfilment: list[float]
    strength: float
    kl: float
    branches: list[float]
    top: list[tuple[int, float]]


def decode(
    *requests: SteeringCase,
    vocab: int | None = None,
    edits: LogitEdits | None = None,
    trace: bool = True,
    top_k: bool = True,
    start_steps: Sequence[int] = (),
    state: SteeringState | None = None,
) -> list[list[StepResult]]:
    """Decode all requests in one batch, the r-th from step `start_steps[r]` on; return their step results.

    Requests are added to the state in reverse order, so that a state row differs from the batch index.
    """
    state = state or SteeringState(vocab or requests[0].logits.shape[-1])
    start_steps = start_steps or [0] * len(requests)
    results: list[list[StepResult]] = [[] for _ in requests]
    for step in range(max(start + len(r.logits) for r, start in zip(requests, start_steps, strict=True))):
        active = [i for i, r in enumerate(requests) if 0 <= step - start_steps[i] < len(r.logits)]
        for i in active:
            if step == start_steps[i]:
                method = requests[i].method
                state.add_request(
                    len(requests) - 1 - i, method.cached_coefficients, method.weights(), requests[i].sampling
                )
        layout = RequestLayout.from_branches(
            [(len(requests) - 1 - i, requests[i].branch_indices) for i in active]
        )
        logits = torch.cat([requests[i].logits[step - start_steps[i]] for i in active])
        output = steer(logits, layout, state, edits, trace=trace, top=top_k)
        for position, i in enumerate(active):
            num_objectives = len(requests[i].method.weights())
            row_start = int(layout.row_start[position])
            top_tokens = (
                [(columns[position].tolist()) for columns in output.top_logprobs]
                if output.top_logprobs
                else [[], []]
            )
            results[i].append(
                StepResult(
                    token=int(output.tokens[position]),
                    failed=bool(output.failed[position]),
                    logprob=float(output.logprob[position]),
                    weights=output.weights[position, :num_objectives].tolist(),
                    rewards=output.rewards[position, :num_objectives].tolist(),
                    fulfilment=output.fulfilment[position, :num_objectives].tolist(),
                    strength=float(output.strength[position]),
                    kl=float(output.kl[position]),
                    branches=output.branch_logprobs[
                        row_start : row_start + len(requests[i].branch_indices)
                    ].tolist(),
                    top=list(zip(top_tokens[1], top_tokens[0], strict=True)),
                )
            )
    return results


def bitwise_equal(a: object, b: object) -> bool:
    """Whether two results are bitwise equal, including NaN."""
    return repr(a) == repr(b)


def token_ids(results: list[StepResult]) -> list[int]:
    return [step.token for step in results]


def random_logits(
    seed: int, num_steps: int, num_branches: int, vocab: int, spread: float = 3, branch_spread: float = 1
) -> Tensor:
    """Logits [steps, branches, vocab] float32 of branches that differ by noise of scale `branch_spread`."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(num_steps, 1, vocab, generator=generator)
    per_branch = torch.randn(num_steps, num_branches, vocab, generator=generator)
    return (
        spread * shared
        + branch_spread * per_branch
        + 10 * torch.randn(num_steps, num_branches, 1, generator=generator)
    )


def plain_decode(logits: Tensor, sampling: RowSampling) -> list[int]:
    """Plain decoding of one branch's logits [steps, vocab]."""
    return token_ids(decode(SteeringCase(Base(), logits[:, None], sampling))[0])


def all_method_cases() -> list[SteeringCase]:
    """Every method, greedy and sampled, with one to forty objectives, sharp and flat rows."""
    hot_sampling = RowSampling(temperature=1.3, top_p=0.99999, seed=2**63 + 5)
    cases = [
        (Base(), GREEDY),
        (Mato(make_objectives(*[1.0 + index for index in range(40)]), tau=5.0), SAMPLED),
        (Base(), hot_sampling),
        (Prompt(make_objectives(1.0)), RowSampling(0.7, top_k=3, seed=3)),
        (LinearAlignment(make_objectives(1.0)), GREEDY),
        (LinearAlignment(make_objectives(1.0), mask_temperature=2.0), SAMPLED),
        (
            ContextSteering(make_objectives(0.5, 0.0, 2.0), strength=-1.5),
            RowSampling(0.9, min_p=0.1, seed=-4),
        ),
        (Guidance(make_objectives(1.0), kl_budget=0.3), hot_sampling),
        (Opad(make_objectives(1.0)), GREEDY),
        (Opad(make_objectives(1.0), gain=0.5), SAMPLED),
        (Amulet(make_objectives(1.0)), GREEDY),
        (Amulet(make_objectives(1.0), kl_budget=0.05), RowSampling(0.6, top_p=0.9, seed=11)),
        (Mato(make_objectives(1.0, 3.0)), SAMPLED),
        (Mato(make_objectives(*[1.0] * 7), accumulate="mean", tau=0.2, kl_budget=0.1), GREEDY),
        (Mato(make_objectives(0.1, 0.0, 0.3), accumulate="ema", utility="reward"), hot_sampling),
        (Mixture(make_objectives(0.5, 0.2, 0.3)), SAMPLED),
        (Base(relative_top=0.2), hot_sampling),
        (ContextSteering(make_objectives(0.3, 0.7), relative_top=0.05), GREEDY),
        (Mato(make_objectives(1.0, 3.0), kl_budget=0.1, relative_top=0.3), hot_sampling),
        (LinearAlignment(make_objectives(1.0), relative_top=0.1), SAMPLED),
        (Trim(make_objectives(0.5)), GREEDY),
        (Trim(make_objectives(0.7, 0.0, 1.2), control_rate=0.5, max_gain=1.5), SAMPLED),
        (Trim(make_objectives(*[0.01 * index for index in range(40)]), relative_top=None), hot_sampling),
    ]
    result = []
    for seed, (method, draw) in enumerate(cases):
        rows = len(method.weights()) + method.coefficients().needs_base if method.objectives else 1
        spread = 0.3 if draw is hot_sampling else 3
        result.append(SteeringCase(method, random_logits(seed, 7, rows, VOCAB, spread), draw))
    return result


def nucleus_by_sorting(scores: Tensor, top_p: float) -> set[int]:
    """The smallest set of likeliest tokens whose mass reaches top_p, by sorting."""
    mass, token_ids = 0.0, set()
    probabilities = scores.softmax(-1)
    for token in probabilities.argsort(descending=True).tolist():
        token_ids.add(token)
        mass += float(probabilities[token])
        if mass >= top_p:
            break
    return token_ids


def float64_tensor(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
