"""Kernel launches of an engine on a GPU, tested without one: meta tensors, and recorded launches.

Torch itself refuses to mix host and meta tensors in one operation.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("triton", reason="needs triton to compile kernels")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

from trimtab.engine import Amulet, Base, Mato, Objective, Opad, Request, SamplingParams
from trimtab.engine.execution.cuda_graphs import CUDAGraphRunner
from trimtab.engine.execution.kv_cache_size import profile_run
from trimtab.engine.execution.model_runner import inference_context
from trimtab.kernels.specs.aot_compile import KernelVariant, compile_resources, record_launches
from trimtab.kernels.triton.backend import TRITON

from ...helpers.fake_graph import fake_capture
from ...helpers.meta_device import META, make_core, run_steps

if TYPE_CHECKING:
    from trimtab.engine import Method
    from trimtab.engine.core.engine_core import EngineCore

OBJECTIVE_A, OBJECTIVE_B = Objective("a", 0.7), Objective("b", 0.3)
SEARCH_KERNELS = ("count_ge", "compact", "bisect")
EDITED = SamplingParams(
    temperature=0.8, top_k=5, top_p=0.9, min_p=0.1, logit_bias={3: 1.0}, repetition_penalty=1.1, logprobs=2
)
REQUESTS = [
    Request(
        branch_token_ids=[[1, 2, 3]] * 3,
        steering=Mato([OBJECTIVE_A, OBJECTIVE_B], kl_budget=0.2),
        sampling=EDITED,
    ),
    Request(branch_token_ids=[[1, 2, 3] * 30, [4]], steering=Opad([OBJECTIVE_A])),
    Request(branch_token_ids=[[5]], steering=Base(), trace=False),
]


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> EngineCore:
    """Llama 3.1 8B on the meta device."""
    return make_core(monkeypatch, "llama-3.1-8b", load_format="dummy", max_num_seqs=8)


def kernel_names(builds: list[KernelVariant]) -> set[str]:
    return {build.kernel_name for build in builds}


def test_a_step_keeps_all_tensors_on_the_device_and_its_kernels_compile_for_hopper(core: EngineCore) -> None:
    with record_launches() as builds:
        run_steps(core, REQUESTS, 2)
    layers = {"rms_norm", "rope_and_write_kv", "attention", "combine_splits", "swiglu"}
    assert kernel_names(builds) >= layers | {
        "reweight",
        "mix_logits",
        "kl_bracket",
        *SEARCH_KERNELS,
        "score",
        "sample_truncated",
        "finalize",
    }
    layer_builds: dict[Any, KernelVariant] = {}
    for build in builds:
        if build.kernel_name in layers:  # other kernels have their own compile tests
            layer_builds.setdefault(
                (build.kernel_name, *build.types.items(), *build.constants.items()), build
            )
    spilled = {
        f"{key[0]} {build.label}": compile_resources(build, "sm_90").spills
        for key, build in layer_builds.items()
    }
    assert set(spilled.values()) == {0}, spilled


def test_captured_steps_launch_the_decode_kernels_and_no_prefill_kernel(core: EngineCore) -> None:
    runner = core.runner
    with inference_context(), record_launches() as builds:
        runner.cuda_graphs = CUDAGraphRunner(runner.model, runner.cache, 8, 4096, fake_capture)  # type: ignore[arg-type]
        assert runner.cuda_graphs.num_graphs == 4 * 2
        builds.clear()
        run_steps(core, REQUESTS, 1)  # prefill
        prompts = len([build for build in builds if build.kernel_name == "attention"])
        builds.clear()
        runner.execute(core.scheduler.schedule()).result()
    attends = [build for build in builds if build.kernel_name == "attention"]
    assert prompts == 2 * len(attends) == 2 * core.model_config.num_layers
    assert {build.constants["KV_SPLIT"] for build in attends} == {256}


@pytest.mark.parametrize("captured", [True, False])
def test_a_step_can_use_the_previous_steps_tokens_on_the_device(core: EngineCore, captured: bool) -> None:
    runner, scheduler = core.runner, core.scheduler
    if captured:
        with inference_context(), record_launches():
            runner.cuda_graphs = CUDAGraphRunner(runner.model, runner.cache, 8, 4096, fake_capture)  # type: ignore[arg-type]
    for ids, method in (([[1, 2, 3]] * 3, Mato([OBJECTIVE_A, OBJECTIVE_B])), ([[5]], Base())):
        scheduler.add(*core.create_groups(Request(branch_token_ids=ids, steering=method)))
    with record_launches():
        flight = runner.execute(scheduler.schedule())
        assert len(flight.scheduler_output.to_sample) == 2
        for _ in range(2):
            scheduler.mark_computed(flight.scheduler_output)
            ahead = scheduler.schedule_ahead(flight.scheduler_output)
            assert ahead is not None
            following = runner.execute(ahead)
            choice = flight.result()
            assert choice is not None
            assert choice.tokens.device == META
            for group in flight.scheduler_output.to_sample:
                group.output_ids.append(9)
            flight = following


def test_the_profile_run_launches_what_the_largest_step_launches(core: EngineCore) -> None:
    with inference_context(), record_launches() as builds:
        profile_run(core.config, core.runner.model, TRITON, core.runner.make_cache)
    assert kernel_names(builds) >= {
        "attention",
        "combine_splits",
        *SEARCH_KERNELS,
        "sample_truncated",
        "finalize",
    }


def launched_kernels(core: EngineCore, method: Method, trace: bool) -> list[str]:
    """Names of the kernels of a decode step of one request, in launch order."""
    ids = [[1]] * (1 + len(method.branch_objectives()))
    (group,) = core.create_groups(Request(branch_token_ids=ids, steering=method, trace=trace))
    core.scheduler.add(group)
    with record_launches() as builds:
        core.runner.execute(core.scheduler.schedule()).result()
    core.scheduler.remove(group)
    return [build.kernel_name for build in builds]


def test_amulet_needs_no_more_launches_than_plain_decoding(core: EngineCore) -> None:
    assert launched_kernels(core, Amulet([OBJECTIVE_A]), trace=False) == launched_kernels(
        core, Base(), trace=False
    )


def test_a_layer_takes_six_launches_and_sampling_from_hidden_states_four(core: EngineCore) -> None:
    layer = [
        "rms_norm",
        "rope_and_write_kv",
        "attention",
        "combine_splits",
        "rms_norm",
        "swiglu",
    ]  # and four vendor matmuls
    launched = launched_kernels(core, Mato([OBJECTIVE_A, OBJECTIVE_B]), trace=False)
    assert launched[: 6 * core.model_config.num_layers] == layer * core.model_config.num_layers
    assert launched[6 * core.model_config.num_layers :] == [
        "rms_norm",
        "reweight",
        "lm_head",
        "reduce_tiles",
        "finalize",
    ]
