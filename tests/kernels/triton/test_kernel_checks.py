"""The kernel check tool on registered kernels, and graph replay of complete engine steps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from trimtab.engine import Engine, Mato, Objective, Request, SamplingParams
from trimtab.engine.execution.cuda_graphs import CUDAGraphRunner
from trimtab.engine.execution.model_runner import inference_context
from trimtab.kernels.specs.spec import KernelCase, KernelSpec
from trimtab.kernels.specs.steering import (
    GREEDY,
    ITERATE,
    KL_BOUNDED,
    MASKED,
    SAMPLED,
    STEER,
    _steer_case,
    _unrolled_loop_case,
)
from trimtab.kernels.steering.step import SamplerOutput
from trimtab.tools.gpu.kernels import compare_kernel, select_specs

from ...harness import get_runner
from ...helpers.fake_graph import fake_capture
from ...helpers.tiny_model import TinyModel

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.kernels.reference.paged_kv_cache import PagedKVCache

F32, BF16 = torch.float32, torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_replayed_graph_steps_equal_launched_ones_and_stay_on_the_device(tmp_path: Path) -> None:
    """With default device "meta", a tensor created without a device fails in the next operation."""
    folder = TinyModel(hidden=40, heads=4, kv_heads=2, head_dim=12, layers=1).write(tmp_path / "tiny")
    options = {"kv_cache_memory": "100KiB", "block_size": 16, "kernels": "triton", "enforce_eager": True}
    engine = Engine.from_pretrained(str(folder), enable_prefix_caching=False, **options)
    sampling = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=2, repetition_penalty=1.1)
    objectives = [Objective("a"), Objective("b", 2.0)]
    request = Request(
        branch_token_ids=[[5, 6, 7], [8] * 17, [9]], steering=Mato(objectives), sampling=sampling
    )
    with torch.device("meta"):
        launched = engine.generate(request)
    runner = get_runner(engine)
    cache: PagedKVCache = runner.cache  # type: ignore[assignment]
    cache.blocks.fill_(torch.nan)  # blocks without an owner must not be read
    with inference_context():
        runner.cuda_graphs = CUDAGraphRunner(runner.model, cache, 4, 48, fake_capture)
    replayed = engine.generate(request)
    assert launched.error is None
    assert replayed.token_ids == launched.token_ids
    assert replayed.trace == launched.trace


def with_small_cases(spec: KernelSpec, *cases: KernelCase) -> KernelSpec:
    """The same kernel spec with other cases."""
    return replace(spec, cases=cases)


SMALL_SPECS = [
    with_small_cases(
        STEER,
        _steer_case(2, 2, 97, KL_BOUNDED, GREEDY, torch.float32),
        _steer_case(3, 1, 97, MASKED, SAMPLED, BF16),
    ),
    with_small_cases(
        ITERATE, _unrolled_loop_case(2, 97, torch.float32), _unrolled_loop_case(1, 97, torch.float64)
    ),
]


@pytest.mark.parametrize("spec", select_specs(torch.device("cpu")), ids=lambda spec: spec.name)
def test_every_registered_kernel_matches_its_reference(spec: KernelSpec) -> None:
    """At its smallest case, if the interpreter is fast enough for it."""
    for case in spec.cases:
        error_ratio, message = compare_kernel(spec, case, DEVICE)
        assert (error_ratio <= 1, message) == (True, "")


@pytest.mark.parametrize("spec", SMALL_SPECS, ids=lambda spec: spec.name)
def test_kernel_checks_pass_correct_kernels_and_detect_a_wrong_one(spec: KernelSpec) -> None:
    for case in spec.cases:
        error_ratio, message = compare_kernel(spec, case, DEVICE)
        assert (error_ratio <= 1, message) == (True, "")

    def broken(*arguments: Any) -> Any:
        outputs = spec.launch(*arguments)
        if isinstance(outputs, SamplerOutput):
            return replace(outputs, weights=outputs.weights + 0.01)
        outputs[0, 5] += 0.1
        return outputs

    share, wrong = compare_kernel(replace(spec, triton=broken), spec.cases[0], DEVICE)
    assert share > 1
    assert "times the tolerance" in wrong
