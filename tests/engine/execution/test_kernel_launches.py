"""What an engine launches on a GPU, without one: tensors have no numbers, and launches are noted, not made.

Host and device are told apart by torch itself, which mixes no tensors of two devices.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("triton", reason="kernels are compiled where there is triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

from trimtab.engine import Amulet, Base, Mato, Objective, Opad, Request, SamplingParams
from trimtab.engine.execution.cuda_graphs import DecodeGraphs
from trimtab.engine.execution.kv_cache_size import rehearse
from trimtab.engine.execution.model_runner import plain_tensors
from trimtab.kernels.specs.aot_compile import Build, compile_for, recorded
from trimtab.kernels.triton.backend import TRITON

from ...helpers.fake_graph import again
from ...helpers.meta_device import META, opened, steps

if TYPE_CHECKING:
    from trimtab.engine import Method
    from trimtab.engine.core.engine_core import Core

ONE, TWO = Objective("a", 0.7), Objective("b", 0.3)
SEARCH = ("survey", "gather", "halve")
EDITED = SamplingParams(
    temperature=0.8, top_k=5, top_p=0.9, min_p=0.1, logit_bias={3: 1.0}, repetition_penalty=1.1, logprobs=2
)
REQUESTS = [
    Request(branch_token_ids=[[1, 2, 3]] * 3, steering=Mato([ONE, TWO], kl_budget=0.2), sampling=EDITED),
    Request(branch_token_ids=[[1, 2, 3] * 30, [4]], steering=Opad([ONE])),
    Request(branch_token_ids=[[5]], steering=Base(), trace=False),
]


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    """Llama 3.1 8B, whose chosen tokens stay where they are."""
    return opened(monkeypatch, "llama-3.1-8b", load_format="dummy", max_num_seqs=8)


def names(builds: list[Build]) -> set[str]:
    return {build.kernel for build in builds}


def test_a_step_mixes_nothing_of_host_and_device_and_its_kernels_compile_for_hopper(core: Core) -> None:
    with recorded() as builds:
        steps(core, REQUESTS, 2)
    layers = {"norm", "rope", "attend", "merge", "swiglu"}
    assert names(builds) >= layers | {"weigh", "mix", "refine", *SEARCH, "score", "choose", "finish"}
    found: dict[Any, Build] = {}
    for build in builds:
        if build.kernel in layers:  # the others are compiled with their cases
            found.setdefault((build.kernel, *build.types.items(), *build.constants.items()), build)
    spilled = {f"{key[0]} {build.name}": compile_for(build, "sm_90").spills for key, build in found.items()}
    assert set(spilled.values()) == {0}, spilled


def test_captured_steps_launch_what_a_step_launches_and_nothing_of_prompts(core: Core) -> None:
    runner = core.runner
    with plain_tensors(), recorded() as builds:
        runner.graphs = DecodeGraphs(runner.model, runner.cache, 8, 4096, again)  # type: ignore[arg-type]
        assert runner.graphs.count == 4 * 2
        builds.clear()
        steps(core, REQUESTS, 1)  # prompts
        prompts = len([build for build in builds if build.kernel == "attend"])
        builds.clear()
        runner.launch(core.scheduler.plan()).land()
    attends = [build for build in builds if build.kernel == "attend"]
    assert prompts == 2 * len(attends) == 2 * core.model_config.num_layers
    assert {build.constants["SPLIT"] for build in attends} == {256}


@pytest.mark.parametrize("captured", [True, False])
def test_a_step_follows_another_whose_tokens_only_the_device_has(core: Core, captured: bool) -> None:
    runner, scheduler = core.runner, core.scheduler
    if captured:
        with plain_tensors(), recorded():
            runner.graphs = DecodeGraphs(runner.model, runner.cache, 8, 4096, again)  # type: ignore[arg-type]
    for ids, method in (([[1, 2, 3]] * 3, Mato([ONE, TWO])), ([[5]], Base())):
        scheduler.add(*core.admit(Request(branch_token_ids=ids, steering=method)))
    with recorded():
        flight = runner.launch(scheduler.plan())
        assert len(flight.plan.ready) == 2
        for _ in range(2):
            scheduler.commit(flight.plan)
            ahead = scheduler.ahead(flight.plan)
            assert ahead is not None
            following = runner.launch(ahead)
            choice = flight.land()
            assert choice is not None
            assert choice.tokens.device == META
            for group in flight.plan.ready:
                group.tokens.append(9)
            flight = following


def test_the_largest_step_is_rehearsed_as_it_would_be_made(core: Core) -> None:
    with plain_tensors(), recorded() as builds:
        rehearse(core.config, core.runner.model, TRITON, core.runner.new_cache)
    assert names(builds) >= {"attend", "merge", *SEARCH, "choose", "finish"}


def launched(core: Core, method: Method, trace: bool) -> list[str]:
    """The kernels of a step of one request, in order, of which every branch has one token."""
    ids = [[1]] * (1 + len(method.branches()))
    (group,) = core.admit(Request(branch_token_ids=ids, steering=method, trace=trace))
    core.scheduler.add(group)
    with recorded() as builds:
        core.runner.launch(core.scheduler.plan()).land()
    core.scheduler.remove(group)
    return [build.kernel for build in builds]


def test_amulet_needs_no_more_launches_than_plain_decoding(core: Core) -> None:
    assert launched(core, Amulet([ONE]), trace=False) == launched(core, Base(), trace=False)


def test_a_layer_takes_six_launches_and_a_choice_from_hidden_states_four(core: Core) -> None:
    layer = ["norm", "rope", "attend", "merge", "norm", "swiglu"]  # and four products, the vendor's
    found = launched(core, Mato([ONE, TWO]), trace=False)
    assert found[: 6 * core.model_config.num_layers] == layer * core.model_config.num_layers
    assert found[6 * core.model_config.num_layers :] == ["norm", "weigh", "project", "settle", "finish"]
