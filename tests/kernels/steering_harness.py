"""Decoding of given logits, without a model: requests, and what each step of the steering showed of them."""

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
from trimtab.kernels.steering.state import Draw, Edits, Groups, SteerTable
from trimtab.kernels.steering.step import steer

if TYPE_CHECKING:
    from collections.abc import Sequence

GREEDY = Draw()
SAMPLED = Draw(temperature=0.8, top_k=30, top_p=0.95, min_p=0.01, seed=-7)
VOCAB = 1031  # more than the nucleus looks at first, so that a flat row is sorted in full


def wishes(*weights: float) -> tuple[Objective, ...]:
    return tuple(Objective(f"wish {index}", weight) for index, weight in enumerate(weights))


@dataclass(frozen=True)
class Request:
    """One request: its branch logits [steps, branches, vocab], and which branches those are."""

    method: Method
    logits: Tensor
    draw: Draw = GREEDY
    branches: list[int] = field(default_factory=list)

    @property
    def run(self) -> list[int]:
        first = 0 if self.method.program().needs_base else 1
        return self.branches or list(range(first, first + self.logits.shape[1]))


class Seen(NamedTuple):
    """What one step showed of one request."""

    token: int
    failed: bool
    logprob: float
    weights: list[float]
    rewards: list[float]
    strength: float
    kl: float
    branches: list[float]
    top: list[tuple[int, float]]


def decode(
    *requests: Request,
    vocab: int | None = None,
    edits: Edits | None = None,
    trace: bool = True,
    top: bool = True,
    starts: Sequence[int] = (),
    table: SteerTable | None = None,
) -> list[list[Seen]]:
    """Decodes all requests in one batch, the r-th from step `starts[r]` on; for each what its steps showed.

    Requests are admitted in the last rows first, so that a row of the table is not a place in the batch.
    """
    table = table or SteerTable(vocab or requests[0].logits.shape[-1])
    starts = starts or [0] * len(requests)
    seen: list[list[Seen]] = [[] for _ in requests]
    for step in range(max(start + len(r.logits) for r, start in zip(requests, starts, strict=True))):
        present = [i for i, r in enumerate(requests) if 0 <= step - starts[i] < len(r.logits)]
        for i in present:
            if step == starts[i]:
                method = requests[i].method
                table.admit(len(requests) - 1 - i, method.program(), method.weights(), requests[i].draw)
        groups = Groups.of([(len(requests) - 1 - i, requests[i].run) for i in present])
        logits = torch.cat([requests[i].logits[step - starts[i]] for i in present])
        choice = steer(logits, groups, table, edits, trace=trace, top=top)
        for place, i in enumerate(present):
            objectives = len(requests[i].method.weights())
            first = int(groups.first[place])
            found = [(part[place].tolist()) for part in choice.top] if choice.top else [[], []]
            seen[i].append(
                Seen(
                    token=int(choice.tokens[place]),
                    failed=bool(choice.failed[place]),
                    logprob=float(choice.logprob[place]),
                    weights=choice.weights[place, :objectives].tolist(),
                    rewards=choice.rewards[place, :objectives].tolist(),
                    strength=float(choice.strength[place]),
                    kl=float(choice.kl[place]),
                    branches=choice.branch_logprobs[first : first + len(requests[i].run)].tolist(),
                    top=list(zip(found[1], found[0], strict=True)),
                )
            )
    return seen


def same(one: object, other: object) -> bool:
    """Whether two showings are the same to the last bit, NaN and all."""
    return repr(one) == repr(other)


def tokens(seen: list[Seen]) -> list[int]:
    return [step.token for step in seen]


def random_logits(
    seed: int, steps: int, branches: int, vocab: int, spread: float = 3, apart: float = 1
) -> Tensor:
    """Logits of branches that agree but for `apart`, [steps, branches, vocab] float32."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(steps, 1, vocab, generator=generator)
    own = torch.randn(steps, branches, vocab, generator=generator)
    return spread * common + apart * own + 10 * torch.randn(steps, branches, 1, generator=generator)


def plain(logits: Tensor, draw: Draw) -> list[int]:
    """Plain decoding of one branch's logits [steps, vocab]."""
    return tokens(decode(Request(Base(), logits[:, None], draw))[0])


def mixture_of_requests() -> list[Request]:
    """Every method, greedy and sampled, with one to forty objectives, sharp and flat rows."""
    hot = Draw(temperature=1.3, top_p=0.99999, seed=2**63 + 5)
    made = [
        (Base(), GREEDY),
        (Mato(wishes(*[1.0 + index for index in range(40)]), tau=5.0), SAMPLED),
        (Base(), hot),
        (Prompt(wishes(1.0)), Draw(0.7, top_k=3, seed=3)),
        (LinearAlignment(wishes(1.0)), GREEDY),
        (LinearAlignment(wishes(1.0), mask_temperature=2.0), SAMPLED),
        (ContextSteering(wishes(0.5, 0.0, 2.0), strength=-1.5), Draw(0.9, min_p=0.1, seed=-4)),
        (Guidance(wishes(1.0), kl_budget=0.3), hot),
        (Opad(wishes(1.0)), GREEDY),
        (Opad(wishes(1.0), gain=0.5), SAMPLED),
        (Amulet(wishes(1.0)), GREEDY),
        (Amulet(wishes(1.0), kl_budget=0.05), Draw(0.6, top_p=0.9, seed=11)),
        (Mato(wishes(1.0, 3.0)), SAMPLED),
        (Mato(wishes(*[1.0] * 7), accumulate="mean", tau=0.2, kl_budget=0.1), GREEDY),
        (Mato(wishes(0.1, 0.0, 0.3), accumulate="ema", utility="reward"), hot),
        (Mixture(wishes(0.5, 0.2, 0.3)), SAMPLED),
    ]
    requests = []
    for seed, (method, draw) in enumerate(made):
        rows = len(method.weights()) + method.program().needs_base if method.objectives else 1
        spread = 0.3 if draw is hot else 3
        requests.append(Request(method, random_logits(seed, 7, rows, VOCAB, spread), draw))
    return requests


def nucleus(scores: Tensor, top_p: float) -> set[int]:
    """The smallest set of likeliest tokens whose mass reaches top_p, by sorting."""
    mass, kept = 0.0, set()
    probabilities = scores.softmax(-1)
    for token in probabilities.argsort(descending=True).tolist():
        kept.add(token)
        mass += float(probabilities[token])
        if mass >= top_p:
            break
    return kept


def float64(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
