"""What a step launches around the layers' kernels gives what torch gives; and whole steps on a device."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from trimtab.engine import Engine, Mato, Objective, Request, SamplingParams
from trimtab.engine.execution.cuda_graphs import DecodeGraphs
from trimtab.engine.execution.model_runner import plain_tensors
from trimtab.kernels.specs.spec import Case, KernelSpec
from trimtab.kernels.specs.steering import GREEDY, ITERATE, MASKED, NEAR, SAMPLED, STEER, _loop, _steering
from trimtab.kernels.steering.step import Choice
from trimtab.tools.gpu.kernels import compared

from ...helpers.fake_graph import again
from ...helpers.tiny_model import Tiny

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.kernels.reference.paged_kv_cache import DeviceKV

F32, BF16 = torch.float32, torch.bfloat16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_replayed_steps_say_what_launched_ones_say_and_make_nothing_on_another_device(tmp_path: Path) -> None:
    """A tensor made without a device is one without numbers, which no other operation takes."""
    folder = Tiny(hidden=40, heads=4, kv_heads=2, head_dim=12, layers=1).write(tmp_path / "tiny")
    options = {"kv_cache_memory": "100KiB", "block_size": 16, "kernels": "triton", "enforce_eager": True}
    engine = Engine.from_pretrained(str(folder), enable_prefix_caching=False, **options)
    sampling = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=2, repetition_penalty=1.1)
    wishes = [Objective("a"), Objective("b", 2.0)]
    request = Request(branch_token_ids=[[5, 6, 7], [8] * 17, [9]], steering=Mato(wishes), sampling=sampling)
    with torch.device("meta"):
        launched = engine.generate(request)
    runner = engine._core.runner
    cache: DeviceKV = runner.cache  # type: ignore[assignment]
    cache.pages.fill_(torch.nan)  # what no branch owns is seen by none
    with plain_tensors():
        runner.graphs = DecodeGraphs(runner.model, cache, 4, 48, again)
    replayed = engine.generate(request)
    assert launched.error is None
    assert replayed.token_ids == launched.token_ids
    assert replayed.trace == launched.trace


def small(spec: KernelSpec, *cases: Case) -> KernelSpec:
    """The same kernel at other sizes."""
    return replace(spec, cases=cases)


SMALL = [
    small(
        STEER, _steering(2, 2, 97, NEAR, GREEDY, torch.float32), _steering(3, 1, 97, MASKED, SAMPLED, BF16)
    ),
    small(ITERATE, _loop(2, 97, torch.float32), _loop(1, 97, torch.float64)),
]


@pytest.mark.parametrize("spec", SMALL, ids=lambda spec: spec.name)
def test_a_kernel_is_checked_by_its_cases_and_a_wrong_one_found(spec: KernelSpec) -> None:
    for case in spec.cases:
        share, wrong = compared(spec, case, DEVICE)
        assert (share <= 1, wrong) == (True, "")

    def broken(*arguments: Any) -> Any:
        found = spec.launch(*arguments)
        if isinstance(found, Choice):
            return replace(found, weights=found.weights + 0.01)
        found[0, 5] += 0.1
        return found

    share, wrong = compared(replace(spec, launch=broken), spec.cases[0], DEVICE)
    assert share > 1
    assert "times as far off as is allowed" in wrong
