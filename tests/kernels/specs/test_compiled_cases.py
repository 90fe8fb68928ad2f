"""Kernels compiled for sm_90 at the shapes of real models give what the references give, in few instructions.

`tools/test --long tests/kernels/specs/test_compiled_cases.py -s` prints what each launches and carries out.
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled where there is triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

from trimtab.kernels.specs import spec as specs
from trimtab.kernels.specs.registry import SPECS
from trimtab.kernels.specs.spec import Case, KernelSpec
from trimtab.kernels.specs.steering import LLAMA, MASKED, SAMPLED, STEER, _steering
from trimtab.tools.gpu.kernels import compared

from ...emulator.launch import emulated

LITTLE = 8 << 20
"""Bytes of a case that takes seconds; the largest takes three minutes and 5 GB."""
CYCLES = 132 * 4 * 1.7e3
"""Instructions that an H100 issues in a microsecond at most."""
MOST = {"mix": 2 * 20, "survey": 3 * 200, "gather": 3 * 60, "score": 80, "choose": 110}
"""Instructions of a warp for 32 tokens of a request with two branches, all filters and a support mask."""
TOO_MUCH = {("matmul", "Llama 3.1 8B, 5 rows, 4096 to 128256")}
"""Weights of 1 GB, which are compared in float64 as what a kernel may have written: more than 24 GB."""
CASES = [
    pytest.param(
        spec, case, id=f"{spec.name}: {case.name}", marks=[pytest.mark.long] if case.bytes > LITTLE else []
    )
    for spec in SPECS
    for case in spec.cases
    if (spec.name, case.name) not in TOO_MUCH
]


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_compiled_code_gives_what_the_reference_gives(
    spec: KernelSpec, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specs, "HELD", 1 << 40)  # weights have numbers, however many
    with emulated("sm_90") as emulator:
        share, wrong = compared(spec, case, torch.device("cpu"))
    assert not wrong
    assert share <= 1
    print(f"\n{spec.name}, {case.name}: {share:.3f} of the error allowed")
    for kernel, issued in emulator.issued.items():
        least = issued / CYCLES
        print(
            f"  {kernel:14} {emulator.launches[kernel]:3} launches {issued:12,} instructions {least:8.2f} us"
        )


def test_steering_takes_few_instructions() -> None:
    case = _steering(1, 1, LLAMA, MASKED, SAMPLED, torch.bfloat16)
    with emulated("sm_90") as emulator:
        compared(STEER, case, torch.device("cpu"))
    found = {kernel: emulator.issued[kernel] / (LLAMA / 32) for kernel in MOST}
    assert {kernel: issued for kernel, issued in found.items() if issued > MOST[kernel]} == {}
    assert emulator.issued["halve"] < 3 * 10_000, "one program has all of this to do"
