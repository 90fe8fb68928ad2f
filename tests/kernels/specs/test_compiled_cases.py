"""Kernels compiled for sm_90 at the shapes of real models match the references, within instruction budgets.

`tools/test --long tests/kernels/specs/test_compiled_cases.py -s` prints launches and instructions per kernel.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

from trimtab.kernels.specs import spec as specs
from trimtab.kernels.specs.registry import SPECS
from trimtab.kernels.specs.spec import KernelCase, KernelSpec
from trimtab.kernels.specs.steering import LLAMA, MASKED, SAMPLED, STEER, _steer_case
from trimtab.tools.gpu.kernels import compare_kernel

from ...emulator.launch import emulate

MAX_SMALL_BYTES = 8 << 20
"""Maximum bytes of a case that takes seconds; the largest takes three minutes and 5 GB."""
CYCLES = 132 * 4 * 1.7e3
"""Maximum instructions that an H100 issues in a microsecond."""
MAX_CYCLES = {
    "mix_logits": 2 * 21,
    "count_ge": 3 * 200,
    "compact": 3 * 60,
    "score": 80,
    "sample_truncated": 110,
}
"""Warp instructions per 32 tokens of a request with two branches, all filters and a support mask."""
TOO_SLOW = {("matmul", "Llama 3.1 8B, 5 rows, 4096 to 128256")}
"""Its 1 GB of weights is compared in float64 as a possible output, which needs more than 24 GB."""
CASES = [
    pytest.param(
        spec,
        case,
        id=f"{spec.name}: {case.name}",
        marks=[pytest.mark.long] if case.bytes > MAX_SMALL_BYTES else [],
    )
    for spec in SPECS
    for case in spec.cases
    if (spec.name, case.name) not in TOO_SLOW
]


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_emulated_compiled_code_matches_the_reference(
    spec: KernelSpec, case: KernelCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specs, "MAX_INIT_NUMEL", 1 << 40)  # initialise weights of any size
    with emulate("sm_90") as emulator:
        share, wrong = compare_kernel(spec, case, torch.device("cpu"))
    assert not wrong
    assert share <= 1
    print(f"\n{spec.name}, {case.name}: {share:.3f} of the tolerance")
    for kernel, issued in emulator.instructions.items():
        min_us = issued / CYCLES
        print(
            f"  {kernel:14} {emulator.launches[kernel]:3} launches {issued:12,} instructions {min_us:8.2f} us"
        )


def test_steering_kernels_stay_within_their_instruction_budget() -> None:
    case = _steer_case(1, 1, LLAMA, MASKED, SAMPLED, torch.bfloat16)
    with emulate("sm_90") as emulator:
        compare_kernel(STEER, case, torch.device("cpu"))
    per_warp = {kernel: emulator.instructions[kernel] / (LLAMA / 32) for kernel in MAX_CYCLES}
    assert {kernel: issued for kernel, issued in per_warp.items() if issued > MAX_CYCLES[kernel]} == {}
    assert emulator.instructions["bisect"] < 3 * 10_000, "a single program executes all of it"
