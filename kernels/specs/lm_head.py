"""The specification of the fused last product, at the heads of Llama 3.1 8B and of the demo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..lm_head import lm_head_steer as reference
from ..steering.coefficients import Program
from ..steering.features import Features
from ..steering.state import Draw, Groups, SteerTable
from ..triton.lm_head.launch import lm_head_steer
from ..triton.lm_head.plan import Plan
from .roofline import Work
from .spec import Case, KernelSpec, weight_of

LLAMA, DEMO = (128_256, 4096), (49_152, 576)
"""Vocabulary and width of a head."""
BASE, AMULET = Program(), Program(base=-4.6487, scale=5.6487)
MATO = Program(base=-0.9347, scale=1.9347, reward=1.0)
NEAR = Program(base=-4.6487, scale=5.6487, reward=1.0, kl_budget=0.2)
GREEDY, DRAWN = Draw(), Draw(temperature=0.8, seed=1)
FILTERED = Draw(temperature=0.8, min_p=0.05, seed=1)


def deciding(
    head: tuple[int, int],
    requests: int,
    objectives: int,
    program: Program,
    draw: Draw,
    *,
    trace: bool = False,
) -> Case:
    """Requests of one method and as many wishes, in bfloat16."""
    vocab, width = head
    rows = requests * (objectives + 1)

    def running(device: torch.device) -> tuple[Groups, SteerTable]:
        table = SteerTable(vocab, device)
        for row in range(requests):
            table.admit(row, program, [1 / objectives for _ in range(objectives)], draw)
        return Groups.of([(row, range(objectives + 1)) for row in range(requests)], device), table

    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        hidden = torch.randn(rows, width, generator=generator)
        weight = weight_of(vocab, width, device, torch.bfloat16)
        return hidden.to(device, torch.bfloat16), weight, *running(device), None, trace

    groups, table = running(torch.device("cpu"))
    plan = Plan.of(Features.of(groups, table), groups, table, trace=trace, top=False, edited=False)
    assert plan is not None, "a case is of what is fused"
    kind = {GREEDY: "greedy", DRAWN: "drawn", FILTERED: "filtered"}[draw]
    name = f"{requests} x {objectives + 1} of {vocab} x {width}, {kind}{', traced' if trace else ''}"
    moved = plan.bytes(rows, vocab, width, torch.bfloat16.itemsize)
    return Case(name, make, Work(moved, plan.flops(rows, vocab, width)))


def _called(how: Callable[..., Any]) -> Callable[..., Any]:
    """The same with `trace` last."""
    return lambda *args: how(*args[:-1], trace=args[-1])


LM_HEAD_STEER = KernelSpec(
    "lm_head_steer",
    _called(reference),
    _called(lm_head_steer),
    (
        deciding(LLAMA, 1, 4, MATO, GREEDY),
        deciding(LLAMA, 1, 4, NEAR, GREEDY, trace=True),
        deciding(LLAMA, 8, 4, MATO, DRAWN),
        deciding(LLAMA, 16, 1, AMULET, DRAWN),
        deciding(LLAMA, 16, 1, AMULET, FILTERED),
        deciding(LLAMA, 64, 1, AMULET, GREEDY),
        deciding(DEMO, 8, 2, MATO, GREEDY),
        deciding(DEMO, 4, 0, BASE, GREEDY, trace=True),
    ),
)
