"""What is launched before the first request is all that requests launch: without a GPU, launches are noted.

Two launches are one kernel where Triton would compile one; its own rules are asked, where it has them.
"""

from __future__ import annotations

import logging
import os
import re
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled where there is triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process has no kernels to tell apart", allow_module_level=True)

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
from trimtab.engine.execution.cuda_graphs import DecodeGraphs
from trimtab.engine.execution.device import shared
from trimtab.engine.execution.model_runner import plain_tensors
from trimtab.engine.execution.step_input import Order
from trimtab.engine.execution.warmup import orders, warm_up
from trimtab.kernels.backend import PLAIN
from trimtab.kernels.specs.aot_compile import TARGETS, Build, recorded
from trimtab.kernels.triton.backend import INVARIANT, TRITON
from trimtab.kernels.triton.swiglu import swiglu
from trimtab.kernels.triton.tuning import of as launches_of
from triton.compiler import make_backend
from triton.runtime import jit

from ...helpers.compile_only import compile_only
from ...helpers.fake_graph import again
from ...helpers.meta_device import META, opened, steps
from ...helpers.tiny_model import Tiny

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.engine.core.engine_core import Core
    from trimtab.engine.execution.model_runner import Runner
    from trimtab.engine.methods.base import Method

BRANCHES = 82
"""Twice those of a request with forty objectives."""
SHAPES = launches_of(META).head.shapes(BRANCHES)


@pytest.fixture(params=["llama-3.1-8b", "odd"])
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Core:
    """A model of round sizes, and one of whose sizes 16 divides none: a token's heads have 60 numbers."""
    fields: dict[str, Any] = {"max_num_seqs": BRANCHES, "enable_prefix_caching": False}
    if request.param == "odd":
        odd = Tiny(hidden=36, heads=3, kv_heads=1, head_dim=12, dtype=torch.bfloat16)
        return opened(monkeypatch, str(odd.write(tmp_path)), block_size=16, **fields)
    return opened(monkeypatch, request.param, load_format="dummy", **fields)


def variants(builds: list[Build]) -> set[tuple[Any, ...]]:
    return {build.variant for build in builds}


def some_method(random: Random) -> Method:
    wishes = [Objective(f"wish {n}", 1.0 + n) for n in range(random.choice([1, 2, 3, 5, 8, 15, 31, 40]))]
    one, budget = wishes[:1], random.choice([None, 0.2])
    return random.choice(
        [
            Base(),
            Prompt(one),
            LinearAlignment(one, mask_top_p=0.9 if budget is None else None, kl_budget=budget),
            ContextSteering(wishes, kl_budget=budget),
            Guidance(one, kl_budget=budget),
            Opad(one),
            Amulet(one, kl_budget=budget),
            Mato(wishes, kl_budget=budget),
            Mixture(wishes),
        ]
    )


def some_request(random: Random) -> Request:
    method = some_method(random)
    lengths = (random.choice([1, 2, 16, 17, 33, 100]) for _ in range(1 + len(method.branches())))
    changes = [{}, {"logit_bias": {3: 1.0}}, {"repetition_penalty": 1.1}, {"frequency_penalty": 0.5}]
    sampling = SamplingParams(
        temperature=random.choice([0.0, 0.7]),
        top_k=random.choice([0, 5]),
        top_p=random.choice([1.0, 0.9]),
        min_p=random.choice([0.0, 0.1]),
        logprobs=random.choice([None, None, 2]),
        max_tokens=20,
        ignore_eos=True,
        **random.choice(changes),
    )
    return Request(
        branch_token_ids=[[7] * length for length in lengths],
        steering=method,
        sampling=sampling,
        trace=random.random() < 0.3,
    )


def serve(core: Core, random: Random, batches: int) -> None:
    """Batches, their prompts and two more tokens of each, and texts to score.

    One of as many plain requests as there may be, others of one request to nine of all kinds.
    """
    pages = 15 * core.config.block_size  # with the spare one a multiple of 16
    plain = [Request(branch_token_ids=[[7]], trace=False)] * BRANCHES
    mixed = [[some_request(random) for _ in range(random.choice([1, 1, 2, 3, 5, 9]))] for _ in range(batches)]
    for requests in (plain, *mixed):
        steps(core, requests, 3)
        core.runner.follow(Order(scored=[5] * random.choice([1, 2, 3, 16, 40, pages])))
        for group in list(core.scheduler.running):
            core.scheduler.remove(group)


@pytest.mark.parametrize("replayed", [False, True])
def test_requests_launch_no_kernel_that_the_warm_up_did_not(core: Core, replayed: bool) -> None:
    runner = core.runner
    with recorded() as ready:
        if replayed:
            with plain_tensors():
                runner.graphs = DecodeGraphs(runner.model, runner.cache, 16, 512, again)  # type: ignore[arg-type]
        warm_up(runner, SHAPES)
    with recorded() as launched:
        serve(core, Random(1), 30)
    late = {build.variant: f"{build.kernel} {build.name}" for build in launched}
    assert {late[variant] for variant in late.keys() - variants(ready)} == set()
    assert len(variants(launched)) > 40, "the requests are alike"
    assert len(variants(ready)) < 200, "a start takes long"


def test_with_batch_invariant_few_kernels_are_enough_for_any_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "backend_of", lambda *_: INVARIANT)
    fields: dict[str, Any] = {
        "max_num_seqs": BRANCHES,
        "enable_prefix_caching": False,
        "load_format": "dummy",
    }
    core = opened(monkeypatch, "llama-3.1-8b", **fields)
    assert INVARIANT.warm_shapes is not None
    with recorded() as ready:
        warm_up(core.runner, INVARIANT.warm_shapes(META, BRANCHES))
    with recorded() as launched:
        serve(core, Random(2), 10)
    assert variants(launched) <= variants(ready)
    assert len(variants(ready)) < 35


@pytest.mark.long
def test_triton_itself_compiles_nothing_after_the_warm_up(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_only(monkeypatch)
    compiles = core.runner.compiles
    assert compiles
    warm_up(core.runner, SHAPES)
    ready = compiles.count
    serve(core, Random(2), 30)
    assert compiles.count == ready > 60
    assert core.stats.late_compiles == 0


def test_most_steps_of_the_warm_up_are_needed(core: Core) -> None:
    """They launch a kernel that none before them does."""
    seen, needed = set[tuple[Any, ...]](), list[bool]()
    for order in orders(core.runner.cache.spare, *SHAPES):  # type: ignore[attr-defined]
        with recorded() as builds:
            core.runner.follow(order)
        needed.append(not variants(builds) <= seen)
        seen |= variants(builds)
    assert sum(needed) > 0.6 * len(needed)


def test_nothing_of_the_warm_up_stays(core: Core) -> None:
    runner, table = core.runner, core.runner.table
    columns = [*table.columns.values(), table.asked, table.rewards, table.steps, table.slot, table.contrast]
    stats = core.stats
    with recorded():
        warm_up(runner, SHAPES)
    after = [*table.columns.values(), table.asked, table.rewards, table.steps, table.slot, table.contrast]
    assert runner.table is table
    assert all(one is other for one, other in zip(columns, after, strict=True))
    assert (table.admitted, core.stats) == ({}, stats)


def test_a_compile_after_the_warm_up_is_in_the_engines_numbers(
    core: Core, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runner = core.runner
    with caplog.at_level(logging.INFO, "trimtab.engine"), recorded():
        warm_up(runner, SHAPES)
    begun, ended = (record.getMessage() for record in caplog.records)
    assert "every kernel once" in begun
    assert re.fullmatch(r"every kernel was launched in \d+\.\d seconds, and 0 were made ready", ended)
    assert core.stats.late_compiles == 0
    compile_only(monkeypatch)
    with runner.on_device():
        swiglu(torch.zeros(3, 46))
    assert core.stats.late_compiles == 1
    assert "the kernel swiglu_kernel was made ready" in caplog.text


@pytest.mark.parametrize(
    ("fields", "made"),
    [
        ({}, ["captured", "warm"]),
        ({"enforce_eager": True}, []),
        ({"tensor_parallel_size": 2}, ["warm"]),
        ({"kernels": "torch"}, []),
    ],
)
def test_steps_are_captured_and_kernels_launched_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], made: list[str]
) -> None:
    found = list[str]()
    monkeypatch.setattr(builder, "warm_up", lambda *_: found.append("warm"))
    captured = SimpleNamespace(device=META, capture=lambda *_: found.append("captured"))
    runner = cast("Runner", captured)
    backend = PLAIN if fields.get("kernels") == "torch" else TRITON
    backend = shared(backend) if "tensor_parallel_size" in fields else backend
    builder.get_ready(runner, backend, EngineConfig(**fields), 512)
    assert found == made


def test_launches_are_told_apart_as_triton_tells_them(core: Core) -> None:
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("this triton has its rules elsewhere")
    backend = make_backend(TARGETS["sm_90"])
    own: dict[tuple[Any, ...], set[str]] = {}
    launch = jit.JITFunction.run

    def note(function: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        with recorded() as builds:
            jit.JITFunction.run(function, *args, grid=grid, warmup=warmup, **more)
        bind = jit.create_function_from_signature(function.signature, function.params, backend)
        _, specialization, options = bind(*args, **more)
        own.setdefault(builds[0].variant, set()).add(f"{function.__name__} {specialization} {options}")

    jit.JITFunction.run = note
    try:
        for request in range(20):
            steps(core, [some_request(Random(request))], 1)
    finally:
        jit.JITFunction.run = launch
    assert all(len(keys) == 1 for keys in own.values())
    assert len(set.union(*own.values())) == len(own) > 20
