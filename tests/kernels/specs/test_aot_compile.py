"""Every kernel compiles for every target, as it is launched for real models, without spills."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled where there is triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

from trimtab.kernels.attention_metadata import Segment
from trimtab.kernels.specs import aot_compile
from trimtab.kernels.specs.aot_compile import TARGETS, Build, builds_of, compile_for, recorded
from trimtab.kernels.specs.layers import ATTENTION, INVARIANT_ATTENTION
from trimtab.kernels.specs.lm_head import AMULET, DRAWN, FILTERED, GREEDY, LLAMA, MATO, NEAR, deciding
from trimtab.kernels.specs.registry import SPECS
from trimtab.kernels.steering.coefficients import Program
from trimtab.kernels.steering.state import Groups, SteerTable
from trimtab.kernels.triton.attention import paged_attention
from trimtab.kernels.triton.backend import INVARIANT
from trimtab.kernels.triton.configs import SHIPPED
from trimtab.kernels.triton.lm_head.launch import lm_head_steer
from trimtab.models.config import ModelConfig
from trimtab.models.forward import forward
from trimtab.models.llama import Llama, shapes
from trimtab.models.weights.dummy import DummyWeights
from trimtab.tools.commands import tune

from ...helpers.tiny_model import Tiny

CPU = torch.device("cpu")
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
    from trimtab.kernels.triton.unrolled_loop import iterate  # noqa: PLC0415

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
    build = next(build for build in BUILDS if build.kernel == "survey" and build.constants["OUTER"])
    crowded = Build(build.function, build.types, build.constants, build.aligned, 1, build.stages)
    assert compile_for(crowded, "sm_90").spills > 0
    assert aot_compile._occupancy("sm_90", 255, 0, 1) < aot_compile._occupancy("sm_90", 32, 0, 1)


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


def codes(builds: list[Build]) -> set[tuple[Any, ...]]:
    """What is compiled, wherever its tensors lie: the parts of a step's layout are aligned on a GPU alone."""
    return {replace(build, aligned=frozenset()).variant for build in builds}


def test_decoding_and_prompts_attend_by_the_same_code_which_fuses_nothing() -> None:
    builds = builds_of(INVARIANT_ATTENTION)
    kernels = [kernel for kernel, *_ in codes(builds)]
    assert (kernels.count("attend_splits"), kernels.count("merge")) == (3, 3)  # with a window, without, demo
    usual = [kernel for kernel, *_ in codes(builds_of(ATTENTION))]
    assert usual.count("attend") == 5  # so that it can fail
    assert not any(build.fusion for build in builds)


def test_with_batch_invariant_a_step_launches_the_same_code_whatever_is_in_it() -> None:
    """But for `merge`, an elementwise launch more where a token of a long text decodes."""
    config = ModelConfig.from_dict(Tiny(heads=4, head_dim=12, layers=1, context=2048).config())
    weights = DummyWeights(shapes(config), torch.float32, CPU)
    model = Llama(config, weights, torch.float32, CPU, INVARIANT.ops)
    cache = INVARIANT.cache(1, 80, 16, config.num_kv_heads, config.head_dim, torch.float32, CPU)
    table = SteerTable(config.vocab_size, CPU)
    for row, (program, draw) in enumerate(((Program(), GREEDY), (NEAR, FILTERED), (MATO, DRAWN))):
        table.admit(row, program, [0.5] * 2, draw)
    pages = list(range(40))
    steps = {
        "one token": ([(40, 1)], [0], False),
        "a long text and a short": ([(600, 1), (3, 1)], [1], True),
        "a prompt": ([(0, 33)], [2], False),
        "prompts and tokens": ([(0, 5), (7, 16), (300, 1), (2, 70)], [0, 1, 2], True),
    }
    found = {}
    for name, (counts, rows, top) in steps.items():
        with recorded() as builds, torch.inference_mode():
            tokens = sum(count for _, count in counts)
            segments = [Segment(start, count, pages) for start, count in counts]
            hidden = forward(model, segments, [1] * tokens, [1] * tokens, cache)
            groups = Groups.of([(row, range(3)) for row in rows], CPU)
            INVARIANT.choose(model.head, hidden[[0] * (3 * len(rows))], groups, table, top=top)
        found[name] = codes([build for build in builds if build.kernel != "merge"])
        assert len(found[name]) > 12
    assert all(keys == found["one token"] for keys in found.values())
