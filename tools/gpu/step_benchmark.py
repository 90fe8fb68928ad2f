"""Steps of Llama 3.1 8B with random weights, beside the least time that their bytes take; and what
batch_invariant makes of that time.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ...engine.methods.base import Method
from ...engine.methods.builtin import Base, Mato
from ...engine.methods.objective import Objective
from ...engine.request import Request
from ...engine.sampling_params import SamplingParams
from ..common import roofline
from ..common.timing import Spread
from .open_engine import opened

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...engine.engine import Engine
    from ...engine.execution.cuda_graphs import DecodeGraphs
    from ...engine.sequence.sequence import Group
    from ...kernels.steering.step import Choice
    from ..common.machine_peaks import Roof
    from .report import Report

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
    """Which model is decoded, with what, and which loads; `again` of them with batch_invariant, too."""

    model: str
    fields: dict[str, Any]
    loads: tuple[Load, ...]
    steps: int
    again: tuple[Load, ...]


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
    (Load(1, Mato(WISHES), 2048), Load(16, Mato(WISHES), 512)),
)
SMALL_LOAD = Load(1, Mato(WISHES[:2]), 20)
LITTLE = Plan("", {"dtype": "float32", "kv_cache_memory": "1MiB"}, (SMALL_LOAD,), 2, (SMALL_LOAD,))


def with_model(plan: Plan, model: str) -> Plan:
    """The same loads on another model."""
    return replace(plan, model=model)


def measure(report: Report, device: str, plan: Plan, roof: Roof) -> None:
    """A row for opening the model, then four a load: as shipped, without captured steps, without those that
    are launched before the one before them is read, and with the last product apart from the steering. Then
    as shipped with batch_invariant, where times are told as multiples, too.
    """
    usual: dict[str, dict[str, Any]] = {}
    for invariant, loads in ((False, plan.loads), (True, plan.again)):
        gc.collect()  # engines of before: this one takes what memory is left
        if device != "cpu":
            torch.cuda.empty_cache()
        _measure_all(report, device, plan, loads, invariant, roof, usual)


def _measure_all(
    report: Report,
    device: str,
    plan: Plan,
    loads: tuple[Load, ...],
    invariant: bool,
    roof: Roof,
    usual: dict[str, dict[str, Any]],
) -> None:
    """usual: the rows without batch_invariant, by name; they are noted, or compared with."""
    what = ", batch_invariant" if invariant else ""
    engine: Engine | None = None
    if invariant and report.leaves_out("steps", f"the model opens{what}"):
        return
    with report.part("steps", f"{plan.model or 'the model'} opens with random weights{what}") as row:
        engine = opened(
            plan.model,
            device,
            load_format="dummy",
            kernels="triton",
            enable_prefix_caching=False,
            batch_invariant=invariant,
            **plan.fields,
        )
        row.update({"pages": engine.stats.pages, "captured_sizes": engine.stats.captured})
        row["weight_gigabytes"] = roofline.weight_bytes(engine) / 1e9
    for load in loads if engine else ():
        if engine and not report.leaves_out("steps", load.name + what):
            rows = _measure(report, engine, load, plan.steps, roof, what)
            if not invariant:
                usual[load.name] = rows
            elif load.name in usual:
                _compare(report, load.name, rows, usual[load.name])


def _compare(report: Report, name: str, found: dict[str, Any], usual: dict[str, Any]) -> None:
    with report.part("steps", f"{name}: batch_invariant costs") as row:
        for what in ("p50_us", "prompts_us"):
            row[f"times_{what.removesuffix('_us')}"] = found[what] / usual[what]


def _measure(
    report: Report, engine: Engine, load: Load, steps: int, roof: Roof, what: str = ""
) -> dict[str, Any]:
    """The row of the steps as the engine takes them."""
    from ...kernels.triton.backend import choose_apart  # noqa: PLC0415 - triton has been told what it is to do

    core, runner = engine._core, engine._core.runner
    graphs, ahead, choose = shipped = runner.graphs, core.looks_ahead, runner.choose
    ways: dict[str, tuple[DecodeGraphs | None, bool, Callable[..., Choice]]] = {
        "": shipped,
        ", launched one by one": (None, ahead, choose),
        ", each awaited": (graphs, False, choose),
        ", product and steering apart": (graphs, ahead, choose_apart),
    }
    rows: list[dict[str, Any]] = []
    for name, way in ways.items():
        if name and (way == shipped or what):
            continue  # that is how it is done here anyway, or the others are known
        runner.graphs, core.looks_ahead, runner.choose = way
        with report.part("steps", load.name + name + what) as row:
            rows.append(row)
            tokens = load.context + SETTLING + steps // 2
            branches = load.requests * (1 + len(load.method.branches()))
            times(engine, load, 1)  # what it compiles is no prompt's time
            prompts, seconds = times(engine, load, steps)
            spread = Spread.of(seconds)
            moved = roofline.weight_bytes(engine) + roofline.kv_bytes(engine, branches, tokens)
            least = 1e6 * moved / roof.bandwidth
            row.update({"p20_us": spread.p20, "p50_us": spread.p50, "p80_us": spread.p80})
            row.update({"floor_us": least, "times_floor": spread.p50 / least, "rows": branches})
            row.update({"tokens_per_second": 1e6 * load.requests / spread.p50, "prompts_us": 1e6 * prompts})
    runner.graphs, core.looks_ahead, runner.choose = shipped
    return rows[0]


def times(engine: Engine, load: Load, steps: int) -> tuple[float, list[float]]:
    """Seconds until all requests have a token, and of each of some steps in which every branch decodes.

    The host has read each step's tokens.
    """
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
        start = time.perf_counter()
        while any(not group.tokens for group in groups):
            core.step()
            _require_answers(groups)
        prompts = time.perf_counter() - start
        for at in range(SETTLING + steps):
            start = time.perf_counter()
            core.step()
            if at >= SETTLING:
                found.append(time.perf_counter() - start)
            _require_answers(groups)
            if any(group.ended for group in groups):
                break  # those whose prompts were first end first
    finally:
        for group in groups:
            core.scheduler.remove(group)
    return prompts, found


def _require_answers(groups: list[Group]) -> None:
    """Raises RuntimeError where one has failed: it gets no token more."""
    for group in groups:
        if group.answer.error:
            raise RuntimeError(group.answer.error)
