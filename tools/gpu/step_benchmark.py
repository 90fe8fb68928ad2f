"""Benchmark decode steps of Llama 3.1 8B with random weights against the memory roofline, also with
batch_invariant.
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
from ..common.timing import TimeSpread
from .open_engine import open_engine

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...engine.engine import Engine
    from ...engine.execution.cuda_graphs import CUDAGraphRunner
    from ...engine.sequence.sequence import SequenceGroup
    from ...kernels.steering.step import SamplerOutput
    from ..common.machine_peaks import MachinePeaks
    from .report import CheckReport

WARMUP_STEPS, NUM_STEPS = 5, 40
"""Warm-up steps and measured steps."""
OBJECTIVES = tuple(Objective(str(index), 1.0 + index) for index in range(4))


@dataclass(frozen=True)
class StepLoad:
    """`num_requests` requests of one method, each branch with its own prompt of `context_len` tokens."""

    num_requests: int
    method: Method
    context_len: int

    @property
    def name(self) -> str:
        num_branches = 1 + len(self.method.branch_objectives())
        return (
            f"{self.num_requests} x {num_branches} branches at {self.context_len} tokens, {self.method.name}"
        )


@dataclass(frozen=True)
class StepPlan:
    """The model, engine options and loads of a benchmark; `invariant_loads` also run with batch_invariant."""

    model: str
    engine_options: dict[str, Any]
    loads: tuple[StepLoad, ...]
    num_steps: int
    invariant_loads: tuple[StepLoad, ...]


FULL_PLAN = StepPlan(
    "llama-3.1-8b",
    {"dtype": "bfloat16", "max_num_seqs": 80, "max_model_len": 4096, "max_num_batched_tokens": 8192},
    (
        StepLoad(1, Base(), 512),
        StepLoad(1, Mato(OBJECTIVES), 512),
        StepLoad(1, Mato(OBJECTIVES), 1024),
        StepLoad(1, Mato(OBJECTIVES), 2048),
        StepLoad(16, Base(), 512),
        StepLoad(16, Mato(OBJECTIVES), 512),
    ),
    NUM_STEPS,
    (StepLoad(1, Mato(OBJECTIVES), 2048), StepLoad(16, Mato(OBJECTIVES), 512)),
)
SMALL_LOAD = StepLoad(1, Mato(OBJECTIVES[:2]), 20)
TINY_PLAN = StepPlan("", {"dtype": "float32", "kv_cache_memory": "1MiB"}, (SMALL_LOAD,), 2, (SMALL_LOAD,))


def with_model(plan: StepPlan, model: str) -> StepPlan:
    """Copy the plan for another model."""
    return replace(plan, model=model)


def measure_steps(report: CheckReport, device: str, plan: StepPlan, peaks: MachinePeaks) -> None:
    """Record a row for opening the model, then four per load: as shipped, without CUDA graphs, without async
    scheduling, and with an unfused LM head. Then as shipped with batch_invariant, and the ratio of the times.
    """
    baseline: dict[str, dict[str, Any]] = {}
    for invariant, loads in ((False, plan.loads), (True, plan.invariant_loads)):
        gc.collect()  # free earlier engines: the next one takes the remaining memory
        if device != "cpu":
            torch.cuda.empty_cache()
        _measure_all(report, device, plan, loads, invariant, peaks, baseline)


def _measure_all(
    report: CheckReport,
    device: str,
    plan: StepPlan,
    loads: tuple[StepLoad, ...],
    invariant: bool,
    peaks: MachinePeaks,
    baseline: dict[str, dict[str, Any]],
) -> None:
    """baseline: rows without batch_invariant by load; filled, or compared with if `invariant`."""
    suffix = ", batch_invariant" if invariant else ""
    engine: Engine | None = None
    if invariant and report.should_skip("steps", f"the model opens{suffix}"):
        return
    with report.record("steps", f"{plan.model or 'the model'} opens with random weights{suffix}") as row:
        engine = open_engine(
            plan.model,
            device,
            load_format="dummy",
            kernels="triton",
            enable_prefix_caching=False,
            batch_invariant=invariant,
            **plan.engine_options,
        )
        row.update({"pages": engine.stats.pages, "captured_sizes": engine.stats.captured})
        row["weight_gigabytes"] = roofline.weight_bytes(engine) / 1e9
    for load in loads if engine else ():
        if engine and not report.should_skip("steps", load.name + suffix):
            rows = _measure_load(report, engine, load, plan.num_steps, peaks, suffix)
            if not invariant:
                baseline[load.name] = rows
            elif load.name in baseline:
                _compare_invariant(report, load.name, rows, baseline[load.name])


def _compare_invariant(
    report: CheckReport, name: str, result: dict[str, Any], baseline: dict[str, Any]
) -> None:
    with report.record("steps", f"{name}: cost of batch_invariant") as row:
        for key in ("p50_us", "prompts_us"):
            row[f"times_{key.removesuffix('_us')}"] = result[key] / baseline[key]


def _measure_load(
    report: CheckReport, engine: Engine, load: StepLoad, num_steps: int, peaks: MachinePeaks, suffix: str = ""
) -> dict[str, Any]:
    """Record a row per variant of a load; return that of the engine as shipped."""
    from ...kernels.triton.backend import sample_unfused  # noqa: PLC0415 - after TRITON_INTERPRET is set

    core, runner = engine._core, engine._core.runner
    graphs, lookahead, sample_fn = default = runner.cuda_graphs, core.async_scheduling, runner.sample
    variants: dict[str, tuple[CUDAGraphRunner | None, bool, Callable[..., SamplerOutput]]] = {
        "": default,
        ", without CUDA graphs": (None, lookahead, sample_fn),
        ", without async scheduling": (graphs, False, sample_fn),
        ", unfused LM head": (graphs, lookahead, sample_unfused),
    }
    rows: list[dict[str, Any]] = []
    for name, variant in variants.items():
        if name and (variant == default or suffix):
            continue  # the same as the default, or already measured without batch_invariant
        runner.cuda_graphs, core.async_scheduling, runner.sample = variant
        with report.record("steps", load.name + name + suffix) as row:
            rows.append(row)
            mean_context = load.context_len + WARMUP_STEPS + num_steps // 2
            num_branches = load.num_requests * (1 + len(load.method.branch_objectives()))
            time_steps(engine, load, 1)  # warm-up: compile time must not count as prefill time
            prefill_time, step_times = time_steps(engine, load, num_steps)
            spread = TimeSpread.from_seconds(step_times)
            num_bytes = roofline.weight_bytes(engine) + roofline.kv_bytes(engine, num_branches, mean_context)
            floor_us = 1e6 * num_bytes / peaks.bandwidth
            row.update({"p20_us": spread.p20, "p50_us": spread.p50, "p80_us": spread.p80})
            row.update({"floor_us": floor_us, "times_floor": spread.p50 / floor_us, "rows": num_branches})
            row.update(
                {"tokens_per_second": 1e6 * load.num_requests / spread.p50, "prompts_us": 1e6 * prefill_time}
            )
    runner.cuda_graphs, core.async_scheduling, runner.sample = default
    return rows[0]


def time_steps(engine: Engine, load: StepLoad, num_steps: int) -> tuple[float, list[float]]:
    """Seconds of prefill until all requests have a token, and of each step in which all branches decode.

    Each time includes reading the step's tokens on the host.
    """
    core, vocab_size = engine._core, engine.model_config.vocab_size
    generator = torch.Generator().manual_seed(3)
    sampling = SamplingParams(max_tokens=WARMUP_STEPS + num_steps + 1, ignore_eos=True)
    groups = []
    for _ in range(load.num_requests):
        num_branches = 1 + len(load.method.branch_objectives())
        ids = torch.randint(0, vocab_size, (num_branches, load.context_len), generator=generator).tolist()
        request = Request(branch_token_ids=ids, steering=load.method, sampling=sampling, trace=False)
        groups += core.create_groups(request)
    step_times = []
    try:
        for group in groups:
            core.scheduler.add(group)
        start = time.perf_counter()
        while any(not group.output_ids for group in groups):
            core.step()
            _check_errors(groups)
        prefill_time = time.perf_counter() - start
        for index in range(WARMUP_STEPS + num_steps):
            start = time.perf_counter()
            core.step()
            if index >= WARMUP_STEPS:
                step_times.append(time.perf_counter() - start)
            _check_errors(groups)
            if any(group.is_finished for group in groups):
                break  # requests whose prefill was first finish first
    finally:
        for group in groups:
            core.scheduler.remove(group)
    return prefill_time, step_times


def _check_errors(groups: list[SequenceGroup]) -> None:
    """Raise RuntimeError if a request failed, since it gets no more tokens."""
    for group in groups:
        if group.output_state.error:
            raise RuntimeError(group.output_state.error)
