"""Every kernel compiles for every target, as it is launched for real models, without spills."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled where there is triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

from trimtab.kernels.gpu import SPECS, ahead
from trimtab.kernels.gpu.ahead import TARGETS, Build, builds_of, compile_for, recorded
from trimtab.kernels.gpu.attention import paged_attention
from trimtab.kernels.gpu.layer_cases import ATTENTION
from trimtab.kernels.gpu.lm_head_steer import lm_head_steer
from trimtab.kernels.gpu.lm_head_steer_cases import AMULET, GREEDY, LLAMA, deciding
from trimtab.kernels.gpu.tuning import SHIPPED
from trimtab.tools import tune

BUILDS = [build for spec in SPECS for build in builds_of(spec)]


LONG = {"sm_100"}  # half a minute each where nothing is kept, and its code is the nearest to another's
ARCHS = [pytest.param(arch, marks=[pytest.mark.long] if arch in LONG else []) for arch in TARGETS]


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(arch: str) -> None:
    found = {f"{build.kernel} {build.name}": compile_for(build, arch) for build in BUILDS}
    assert {name: code.spills for name, code in found.items() if code.spills} == {}
    assert all(0 < code.registers <= (512 if arch == "gfx942" else 255) for code in found.values())
    assert all(0 < code.occupancy <= 1 for code in found.values())


def test_what_is_compiled_is_what_is_launched() -> None:
    from trimtab.kernels.gpu.literal import iterate  # noqa: PLC0415

    x = torch.zeros(3, 41)
    with recorded() as builds:
        iterate(x, x, 2.0, 2.0, 10.0, 60)
    (build,) = builds
    assert (build.kernel, build.warps) == ("iterate", 4)
    assert build.types == {
        **dict.fromkeys(("base", "anchor", "loop", "out"), "*fp32"),
        **dict.fromkeys(("size", "iterations"), "i32"),
    }
    assert build.constants == {"BLOCK": 1024}
    assert build.aligned == {"base", "anchor", "loop", "out"}  # lengths are not specialised


def test_a_kernel_that_spills_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same search with a sixteenth of the threads has more numbers than registers."""
    build = next(build for build in BUILDS if build.kernel == "search" and build.constants["OUTER"])
    crowded = Build(build.function, build.types, build.constants, build.aligned, 1, build.stages)
    assert compile_for(crowded, "sm_90").spills > 0
    assert ahead._occupancy("sm_90", 255, 0, 1) < ahead._occupancy("sm_90", 32, 0, 1)


@pytest.mark.long
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_all_that_tune_tries_compiles(arch: str) -> None:
    """One number after another is changed from what is shipped; what spills or does not fit is only slow."""
    builds: list[Build] = []
    for name, values in tune.ATTENTION.items():
        for case in ATTENTION.cases[:2]:
            arguments = case.make(torch.device("cpu"), torch.Generator().manual_seed(0))
            for value in values:
                with recorded() as made:
                    paged_attention(*arguments, tuned=replace(SHIPPED.attention, **{name: value}))
                builds += made
    case = deciding(LLAMA, 16, 1, AMULET, GREEDY)
    *given, trace = case.make(torch.device("cpu"), torch.Generator().manual_seed(0))
    for name, values in tune.TILE.items():
        for value in values:
            tile = replace(SHIPPED.head.tiles[16], **{name: value})
            with recorded() as made:
                lm_head_steer(*given, trace=trace, tuning=replace(SHIPPED.head, tiles={16: tile}))
            builds += [build for build in made if build.kernel == "project"]
    assert len(builds) > 40
    assert all(compile_for(build, arch).registers > 0 for build in builds)
