"""Small models decoded on the device and, in float32, on the CPU: do they say the same, and how near?"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ...engine.engine import Engine
from ...engine.methods.base import Method
from ...engine.methods.builtin import (
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
from ...engine.methods.objective import Objective
from ...engine.request import Request
from ...engine.sampling_params import SamplingParams
from . import tiny_models
from .compare_outputs import MOST, compared, told_nothing
from .open_engine import opened

if TYPE_CHECKING:
    from pathlib import Path

    from ...engine.outputs import Output
    from .report import Report

NEAR = {torch.float32: 1e-3, torch.bfloat16: 1.0}
"""Nats that a branch's log-probability of a token may be off, by the type that a model is held in: on a CPU
that rounds every activation to bfloat16 the worst of these is 0.4, and the mean 0.09."""
SMALL: dict[str, Any] = {"kv_cache_memory": "64MiB", "block_size": 16}
"""A cache for small models."""
ALONE = 3
"""Each third request is decoded alone, too."""
ONE, TWO, THREE = Objective("1"), Objective("2", 2.0), Objective("3", 0.5)
METHODS: tuple[Method, ...] = (
    Base(),
    Prompt((ONE,)),
    LinearAlignment((ONE,)),
    ContextSteering((ONE, TWO), strength=0.5),
    Guidance((ONE,), guidance_scale=1.5, kl_budget=0.3),
    Opad((ONE,)),
    Amulet((ONE,), kl_budget=0.2),
    Mato((ONE, TWO)),
    Mato((ONE, TWO, THREE), kl_budget=0.2),
    Mixture((ONE, TWO)),
)


@dataclass(frozen=True)
class Plan:
    """How much is decoded: models and their size, methods, longest prompt, tokens of an answer, types."""

    size: tiny_models.Size
    kinds: tuple[str, ...]
    methods: tuple[Method, ...]
    longest: int
    tokens: int
    dtypes: tuple[torch.dtype, ...]


FULL = Plan(tiny_models.SMALL, tuple(tiny_models.KINDS), METHODS, 300, 24, (torch.bfloat16, torch.float32))
LITTLE = Plan(tiny_models.TINY, ("mistral",), (Mato((ONE, TWO), kl_budget=0.2),), 20, 2, (torch.float32,))


def check(report: Report, device: str, plan: Plan, folder: Path) -> None:
    """A row for each question asked of each model; in other types than the first only of the first model."""
    for dtype in plan.dtypes:
        for kind in plan.kinds if dtype == plan.dtypes[0] else plan.kinds[:1]:
            name = f"{kind} in {str(dtype).removeprefix('torch.')}"
            if report.leaves_out("decode", name):
                continue
            with report.part("decode", f"{name}: the CPU's engine opens") as row:
                where = str(tiny_models.write(folder / f"{kind}-{dtype}", kind, plan.size, dtype))
                exact = answers(where, plan, "cpu", dtype="float32", kernels="torch")
                row["answers"] = len(exact)
            if not report.rows[-1].get("wrong"):
                _check_model(report, name, where, device, plan, dtype, exact)


def _check_model(
    report: Report, name: str, where: str, device: str, plan: Plan, dtype: torch.dtype, exact: list[Output]
) -> None:
    asked, near = requests(plan), NEAR[dtype]
    with report.part("decode", f"{name}: as on the CPU in float32") as row:
        engine = opened(where, device, kernels="triton", **SMALL)
        found = engine.generate(asked)
        row.update(compared(found, exact, near))
        row["captured_sizes"] = engine.stats.captured
    if "captured_sizes" not in row:
        return  # the engine does not even open
    with report.part("decode", f"{name}: alone as in the crowd") as row:
        row.update(compared([engine.generate(one) for one in asked[::ALONE]], found[::ALONE], near))
    with report.part("decode", f"{name}: with nothing told of the answers") as row:
        greedy = slice(len(plan.methods))  # what is told decides which kernels choose
        row.update(told_nothing([engine.generate(bare(one)) for one in asked[greedy]], exact[greedy], near))
    with report.part("decode", f"{name}: each step awaited before the next") as row:
        engine._core.looks_ahead = False
        row.update(compared(engine.generate(asked), found, near))
    with report.part("decode", f"{name}: scores of a text") as row:
        ids = prompt(0, 0, min(plan.longest, 100), plan.size.vocab)
        exactly = opened(where, "cpu", dtype="float32", kernels="torch", **SMALL).score(ids)
        apart = (engine.score(ids) - exactly).abs()
        row.update(largest=float(apart.max()), mean=float(apart.mean()))
        # over all the vocabulary: unlikely tokens are further off than those that are chosen
        row["wrong"] = "" if row["mean"] <= near else f"scores are {near:g} off in the mean, or more"
    for what, more in (
        ("without captured steps", {"kernels": "triton", "captured": False}),
        ("with torch's operations", {"kernels": "torch"}),
    ):
        with report.part("decode", f"{name}: {what}") as row:
            row.update(compared(answers(where, plan, device, **more), exact, near))


def check_served(report: Report, device: str, plan: Plan, folder: Path) -> None:
    """A row: as the first model is opened to serve, nothing is compiled after its start.

    In a process of its own: what another engine has launched before would not be compiled again.
    """
    name = "no kernel is compiled after the start"
    if report.leaves_out("served", name):
        return
    with report.part("served", name) as row:
        where = str(tiny_models.write(folder / "served", plan.kinds[0], plan.size, plan.dtypes[0]))
        start = time.monotonic()
        engine = Engine.from_pretrained(where, device=device, kernels="triton", **SMALL)
        row["start_seconds"] = time.monotonic() - start
        engine.generate(requests(plan))
        row["late_compiles"] = late = engine.stats.late_compiles
        row["wrong"] = f"{late} kernels were compiled" if late else ""


def answers(where: str, plan: Plan, device: str, **fields: Any) -> list[Output]:
    """Those of one engine to all requests, decoded together."""
    return opened(where, device, **SMALL, **fields).generate(requests(plan))


def requests(plan: Plan) -> list[Request]:
    """Every method greedily, each with draws, and one with edits; prompts of many lengths."""
    greedy: dict[str, Any] = {"max_tokens": plan.tokens, "ignore_eos": True, "logprobs": MOST}
    drawn = greedy | {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
    edited = greedy | {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {5: 1.0}}
    asked: list[tuple[Method, dict[str, Any]]] = [(method, greedy) for method in plan.methods]
    asked += [(method, drawn | {"seed": seed}) for seed, method in enumerate(plan.methods)]
    found = []
    for index, (method, sampling) in enumerate((*asked, (Base(), edited))):
        branches = range(1 + len(method.branches()))
        lengths = [1 + (37 * index + 61 * branch) % plan.longest for branch in branches]
        ids = [prompt(index, branch, length, plan.size.vocab) for branch, length in enumerate(lengths)]
        found.append(Request(branch_token_ids=ids, steering=method, sampling=SamplingParams(**sampling)))
    return found


def bare(request: Request) -> Request:
    """The same with neither a trace nor log-probabilities."""
    return replace(request, trace=False, sampling=replace(request.sampling, logprobs=None))


def prompt(index: int, branch: int, length: int, vocab: int) -> list[int]:
    """Ids that no other branch has."""
    return [(13 + 31 * index + 101 * branch + 7 * at * at) % vocab for at in range(length)]
