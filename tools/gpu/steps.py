"""A decoding step of Llama 3.1 8B with random weights, beside the least time that its bytes take."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ...engine.engine import Engine
from ...engine.methods import Base, Mato, Method
from ...engine.objective import Objective
from ...engine.request import Request
from ...engine.sampling import SamplingParams
from ..bench import roof
from .timing import Spread

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...engine.graphs import DecodeGraphs
    from ...kernels.steer import Choice
    from .report import Report
    from .timing import Rates

SETTLING, STEPS = 5, 40
"""Steps that are not counted, and those that are."""
WISHES = tuple(Objective(str(index), 1.0 + index) for index in range(4))


@dataclass(frozen=True)
class Load:
    """So many requests of one method, each branch with a prompt of so many tokens of its own."""

    requests: int
    method: Method
    context: int

    @property
    def name(self) -> str:
        branches = 1 + len(self.method.branches())
        return f"{self.requests} x {branches} branches at {self.context} tokens, {self.method.name}"


@dataclass(frozen=True)
class Plan:
    """Which model is decoded, with what, and which loads."""

    model: str
    fields: dict[str, Any]
    loads: tuple[Load, ...]
    steps: int


FULL = Plan(
    "llama-3.1-8b",
    {"dtype": "bfloat16", "max_num_seqs": 80, "max_model_len": 4096, "max_num_batched_tokens": 8192},
    (
        Load(1, Base(), 512),
        Load(1, Mato(WISHES), 512),
        Load(1, Mato(WISHES), 1024),
        Load(1, Mato(WISHES), 2048),
        Load(16, Base(), 512),
        Load(16, Mato(WISHES), 512),
    ),
    STEPS,
)
LITTLE = Plan("", {"dtype": "float32", "kv_cache_memory": "1MiB"}, (Load(1, Mato(WISHES[:2]), 20),), 2)


def with_model(plan: Plan, model: str) -> Plan:
    """The same loads on another model."""
    return replace(plan, model=model)


def measure(report: Report, device: str, plan: Plan, rates: Rates) -> None:
    """A row for opening the model, then four a load: as shipped, without captured steps, without those that
    are launched before the one before them is read, and with the last product apart from the steering."""
    gc.collect()  # engines of before: this one takes what memory is left
    if device != "cpu":
        torch.cuda.empty_cache()
    engine: Engine | None = None
    with report.part("steps", f"{plan.model or 'the model'} opens with random weights") as row:
        engine = Engine.from_pretrained(
            plan.model,
            device=device,
            load_format="dummy",
            kernels="triton",
            enable_prefix_caching=False,
            **plan.fields,
        )
        graphs = engine._core.runner.graphs
        row.update({"pages": engine.stats.pages, "captured_sizes": graphs.count if graphs else 0})
        row["weight_gigabytes"] = roof.weight_bytes(engine) / 1e9
    for load in plan.loads if engine else ():
        if engine and not report.leaves_out("steps", load.name):
            _measure(report, engine, load, plan.steps, rates)


def _measure(report: Report, engine: Engine, load: Load, steps: int, rates: Rates) -> None:
    from ...kernels.gpu.backend import choose_apart  # noqa: PLC0415 - triton has been told what it is to do

    core, runner = engine._core, engine._core.runner
    graphs, ahead, choose = shipped = runner.graphs, core.looks_ahead, runner.choose
    ways: dict[str, tuple[DecodeGraphs | None, bool, Callable[..., Choice]]] = {
        "": shipped,
        ", launched one by one": (None, ahead, choose),
        ", each awaited": (graphs, False, choose),
        ", product and steering apart": (graphs, ahead, choose_apart),
    }
    for name, way in ways.items():
        if name and way == shipped:
            continue  # that is how it is done here anyway
        runner.graphs, core.looks_ahead, runner.choose = way
        with report.part("steps", load.name + name) as row:
            tokens = load.context + SETTLING + steps // 2
            rows = load.requests * (1 + len(load.method.branches()))
            spread = Spread.of(times(engine, load, steps))
            moved = roof.weight_bytes(engine) + roof.kv_bytes(engine, rows, tokens)
            floor = 1e6 * moved / rates.bandwidth
            row.update({"p20_us": spread.p20, "p50_us": spread.p50, "p80_us": spread.p80})
            row.update({"floor_us": floor, "times_floor": spread.p50 / floor, "rows": rows})
            row["tokens_per_second"] = 1e6 * load.requests / spread.p50
    runner.graphs, core.looks_ahead, runner.choose = shipped


def times(engine: Engine, load: Load, steps: int) -> list[float]:
    """Seconds of each of some steps in which every branch decodes; the host has read each step's tokens."""
    core, vocab = engine._core, engine.model_config.vocab_size
    generator = torch.Generator().manual_seed(3)
    sampling = SamplingParams(max_tokens=SETTLING + steps + 1, ignore_eos=True)
    groups = []
    for _ in range(load.requests):
        branches = 1 + len(load.method.branches())
        ids = torch.randint(0, vocab, (branches, load.context), generator=generator).tolist()
        asked = Request(branch_token_ids=ids, steering=load.method, sampling=sampling, trace=False)
        groups += core.admit(asked)
    found = []
    try:
        for group in groups:
            core.scheduler.add(group)
        while any(not group.tokens for group in groups):
            core.step()
        for at in range(SETTLING + steps):
            start = time.perf_counter()
            core.step()
            if at >= SETTLING:
                found.append(time.perf_counter() - start)
            failed = next((group for group in groups if group.answer.error), None)
            if failed is not None:
                raise RuntimeError(failed.answer.error)
            if any(group.ended for group in groups):
                break  # those whose prompts were first end first
    finally:
        for group in groups:
            core.scheduler.remove(group)
    return found
