"""The warm-up launches every kernel variant that requests launch; launches are recorded, without a GPU.

Two launches are the same variant if Triton would compile one kernel for both; a test compares with Triton.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

pytest.importorskip("triton", reason="needs triton to compile kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process compiles no kernels", allow_module_level=True)

from trimtab.engine import (
    Amulet,
    Base,
    ContextSteering,
    EngineConfig,
    Guidance,
    LinearAlignment,
    Mato,
    Mixture,
    Objective,
    Opad,
    Prompt,
    Request,
    SamplingParams,
)
from trimtab.engine.core import builder
from trimtab.engine.execution.cuda_graphs import CUDAGraphRunner
from trimtab.engine.execution.device import make_distributed
from trimtab.engine.execution.model_runner import inference_context
from trimtab.engine.execution.step_input import StepInput
from trimtab.engine.execution.warmup import warm_up, warmup_steps
from trimtab.kernels.backend import REFERENCE_BACKEND
from trimtab.kernels.specs.aot_compile import TARGETS, KernelVariant, record_launches
from trimtab.kernels.triton.backend import INVARIANT, TRITON
from trimtab.kernels.triton.swiglu import swiglu
from trimtab.kernels.triton.tuning import get_launch_configs
from triton.compiler import make_backend
from triton.runtime import jit

from ...helpers.compile_only import compile_only
from ...helpers.fake_graph import fake_capture
from ...helpers.meta_device import META, make_core, run_steps
from ...helpers.tiny_model import TinyModel

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.engine.core.engine_core import EngineCore
    from trimtab.engine.execution.model_runner import ModelRunner
    from trimtab.engine.methods.base import Method

MAX_BRANCHES = 82
"""Twice the branches of a request with forty objectives."""
SHAPES = get_launch_configs(META).head.warmup_shapes(MAX_BRANCHES)


@pytest.fixture(params=["llama-3.1-8b", "odd"])
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EngineCore:
    """A model of round sizes, and one with no size divisible by 16: the heads of a token have 60 numbers."""
    fields: dict[str, Any] = {"max_num_seqs": MAX_BRANCHES, "enable_prefix_caching": False}
    if request.param == "odd":
        odd = TinyModel(hidden=36, heads=3, kv_heads=1, head_dim=12, dtype=torch.bfloat16)
        return make_core(monkeypatch, str(odd.write(tmp_path)), block_size=16, **fields)
    return make_core(monkeypatch, request.param, load_format="dummy", **fields)


def variant_keys(builds: list[KernelVariant]) -> set[tuple[Any, ...]]:
    return {build.cache_key for build in builds}


def random_method(rng: Random) -> Method:
    objectives = [
        Objective(f"objective {n}", 1.0 + n) for n in range(rng.choice([1, 2, 3, 5, 8, 15, 31, 40]))
    ]
    one, budget = objectives[:1], rng.choice([None, 0.2])
    method: Method = rng.choice(
        [
            Base(),
            Prompt(one),
            LinearAlignment(one, mask_top_p=0.9 if budget is None else None, kl_budget=budget),
            ContextSteering(objectives, kl_budget=budget),
            Guidance(one, kl_budget=budget),
            Opad(one),
            Amulet(one, kl_budget=budget),
            Mato(objectives, kl_budget=budget),
            Mixture(objectives),
        ]
    )
    return replace(method, relative_top=rng.choice([None, None, 0.1]))


def random_request(rng: Random) -> Request:
    method = random_method(rng)
    lengths = (rng.choice([1, 2, 16, 17, 33, 100]) for _ in range(1 + len(method.branch_objectives())))
    changes = [{}, {"logit_bias": {3: 1.0}}, {"repetition_penalty": 1.1}, {"frequency_penalty": 0.5}]
    sampling = SamplingParams(
        temperature=rng.choice([0.0, 0.7]),
        top_k=rng.choice([0, 5]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.1]),
        logprobs=rng.choice([None, None, 2]),
        max_tokens=20,
        ignore_eos=True,
        **rng.choice(changes),
    )
    return Request(
        branch_token_ids=[[7] * length for length in lengths],
        steering=method,
        sampling=sampling,
        trace=rng.random() < 0.3,
    )


def run_batches(core: EngineCore, rng: Random, batches: int) -> None:
    """Run batches: prefill, two decode steps, and a text to score after each.

    The first has MAX_BRANCHES plain requests, the others one to nine random requests.
    """
    cache_tokens = 15 * core.config.block_size  # with the padding block a multiple of 16
    plain = [Request(branch_token_ids=[[7]], trace=False)] * MAX_BRANCHES
    mixed = [[random_request(rng) for _ in range(rng.choice([1, 1, 2, 3, 5, 9]))] for _ in range(batches)]
    for requests in (plain, *mixed):
        run_steps(core, requests, 3)
        core.runner.execute_as_worker(
            StepInput(score_token_ids=[5] * rng.choice([1, 2, 3, 16, 40, cache_tokens]))
        )
        for group in list(core.scheduler.running):
            core.scheduler.remove(group)


@pytest.mark.parametrize("replayed", [False, True])
def test_requests_launch_only_kernels_that_the_warm_up_launched(core: EngineCore, replayed: bool) -> None:
    runner = core.runner
    with record_launches() as ready:
        if replayed:
            with inference_context():
                runner.cuda_graphs = CUDAGraphRunner(runner.model, runner.cache, 16, 512, fake_capture)  # type: ignore[arg-type]
        warm_up(runner, SHAPES)
    with record_launches() as launched:
        run_batches(core, Random(1), 30)
    late = {build.cache_key: f"{build.kernel_name} {build.label}" for build in launched}
    assert {late[variant] for variant in late.keys() - variant_keys(ready)} == set()
    assert len(variant_keys(launched)) > 40, "the requests are too uniform"
    assert len(variant_keys(ready)) < 200, "the start would take long"


def test_the_batch_invariant_backend_warms_up_with_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "select_backend", lambda *_: INVARIANT)
    fields: dict[str, Any] = {
        "max_num_seqs": MAX_BRANCHES,
        "enable_prefix_caching": False,
        "load_format": "dummy",
    }
    core = make_core(monkeypatch, "llama-3.1-8b", **fields)
    assert INVARIANT.warmup_shapes is not None
    with record_launches() as ready:
        warm_up(core.runner, INVARIANT.warmup_shapes(META, MAX_BRANCHES))
    with record_launches() as launched:
        run_batches(core, Random(2), 10)
    assert variant_keys(launched) <= variant_keys(ready)
    assert len(variant_keys(ready)) < 35


@pytest.mark.long
def test_triton_itself_compiles_nothing_after_the_warm_up(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_only(monkeypatch)
    compiles = core.runner.jit_monitor
    assert compiles
    warm_up(core.runner, SHAPES)
    ready = compiles.count
    run_batches(core, Random(2), 30)
    assert compiles.count == ready > 60
    assert core.stats.late_compiles == 0


def test_most_steps_of_the_warm_up_are_needed(core: EngineCore) -> None:
    """A needed step launches a kernel variant that no earlier one launches."""
    seen_variants, needed = set[tuple[Any, ...]](), list[bool]()
    for order in warmup_steps(core.runner.cache.padding_block, *SHAPES):  # type: ignore[attr-defined]
        with record_launches() as builds:
            core.runner.execute_as_worker(order)
        needed.append(not variant_keys(builds) <= seen_variants)
        seen_variants |= variant_keys(builds)
    assert sum(needed) > 0.6 * len(needed)


def test_the_warm_up_leaves_no_state_behind(core: EngineCore) -> None:
    runner, table = core.runner, core.runner.steering_state
    columns = [
        table.params,
        table.seeds,
        table.prior_weights,
        table.rewards,
        table.steps,
        table.contrast_slot,
        table.prev_contrast,
    ]
    stats = core.stats
    with record_launches():
        warm_up(runner, SHAPES)
    after = [
        table.params,
        table.seeds,
        table.prior_weights,
        table.rewards,
        table.steps,
        table.contrast_slot,
        table.prev_contrast,
    ]
    assert runner.steering_state is table
    assert all(one is other for one, other in zip(columns, after, strict=True))
    assert (table.host_params, core.stats) == ({}, stats)


def test_a_compile_after_the_warm_up_is_counted_in_the_stats(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner = core.runner
    with caplog.at_level(logging.INFO, "trimtab.engine"), record_launches():
        warm_up(runner, SHAPES)
    begun, ended = (record.getMessage() for record in caplog.records)
    assert "every kernel once" in begun
    assert re.fullmatch(r"launched every kernel in \d+\.\d seconds; 0 were compiled or loaded", ended)
    assert core.stats.late_compiles == 0
    compile_only(monkeypatch)
    with runner.on_device():
        swiglu(torch.zeros(3, 46))
    assert core.stats.late_compiles == 1
    assert "kernel swiglu_kernel was compiled or loaded" in caplog.text


@pytest.mark.parametrize(
    ("fields", "expected_calls"),
    [
        ({}, ["captured", "warm"]),
        ({"enforce_eager": True}, []),
        ({"tensor_parallel_size": 2}, ["warm"]),
        ({"kernels": "torch"}, []),
    ],
)
def test_the_warm_up_captures_graphs_and_launches_kernels_where_supported(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], expected_calls: list[str]
) -> None:
    calls = list[str]()
    monkeypatch.setattr(builder, "warm_up", lambda *_: calls.append("warm"))
    captured = SimpleNamespace(device=META, capture_graphs=lambda *_: calls.append("captured"))
    runner = cast("ModelRunner", captured)
    backend = REFERENCE_BACKEND if fields.get("kernels") == "torch" else TRITON
    backend = make_distributed(backend) if "tensor_parallel_size" in fields else backend
    builder.warm_up_and_capture(runner, backend, EngineConfig(**fields), 512)
    assert calls == expected_calls


def test_kernel_variants_are_distinguished_as_triton_does(core: EngineCore) -> None:
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("this triton version has another specialization API")
    backend = make_backend(TARGETS["sm_90"])
    keys_by_variant: dict[tuple[Any, ...], set[str]] = {}
    launch = jit.JITFunction.run

    def record(function: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        with record_launches() as builds:
            jit.JITFunction.run(function, *args, grid=grid, warmup=warmup, **more)
        bind = jit.create_function_from_signature(function.signature, function.params, backend)
        _, specialization, options = bind(*args, **more)
        keys_by_variant.setdefault(builds[0].cache_key, set()).add(
            f"{function.__name__} {specialization} {options}"
        )

    jit.JITFunction.run = record
    try:
        for request in range(20):
            run_steps(core, [random_request(Random(request))], 1)
    finally:
        jit.JITFunction.run = launch
    assert all(len(keys) == 1 for keys in keys_by_variant.values())
    assert len(set.union(*keys_by_variant.values())) == len(keys_by_variant) > 20
