"""Every kernel compiles for every target at the launches of real models, without register spills."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

from trimtab.kernels.attention_metadata import SequenceChunk
from trimtab.kernels.specs import aot_compile
from trimtab.kernels.specs.aot_compile import (
    TARGETS,
    KernelVariant,
    compile_resources,
    record_launches,
    variants_of,
)
from trimtab.kernels.specs.layers import ATTENTION, INVARIANT_ATTENTION
from trimtab.kernels.specs.lm_head import (
    AMULET,
    GREEDY,
    KL_BOUNDED,
    LLAMA,
    MATO,
    SAMPLED,
    TRUNCATED,
    fused_case,
)
from trimtab.kernels.specs.registry import SPECS
from trimtab.kernels.steering.coefficients import SteeringCoefficients
from trimtab.kernels.steering.layout import RequestLayout
from trimtab.kernels.steering.state import SteeringState
from trimtab.kernels.triton import backend
from trimtab.kernels.triton.attention import paged_attention
from trimtab.kernels.triton.backend import INVARIANT
from trimtab.kernels.triton.configs import DEFAULT_CONFIGS
from trimtab.kernels.triton.lm_head.launch import lm_head_steer
from trimtab.models.config import ModelConfig
from trimtab.models.decoder import Decoder, param_shapes
from trimtab.models.forward import forward
from trimtab.models.weights.dummy import DummyWeights
from trimtab.tools.commands import tune

from ...helpers.tiny_model import TinyModel

CPU = torch.device("cpu")
VARIANTS = [build for spec in SPECS for build in variants_of(spec)]


LONG_ARCHS = {"sm_100"}  # half a minute without a cache, and its code is the most similar to another's
ARCHS = [pytest.param(arch, marks=[pytest.mark.long] if arch in LONG_ARCHS else []) for arch in TARGETS]


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(arch: str) -> None:
    resources = {f"{build.kernel_name} {build.label}": compile_resources(build, arch) for build in VARIANTS}
    assert {name: code.spills for name, code in resources.items() if code.spills} == {}
    assert all(0 < code.registers <= (512 if arch == "gfx942" else 255) for code in resources.values())
    assert all(0 < code.occupancy <= 1 for code in resources.values())


def test_every_kernel_is_launched_by_a_registered_case() -> None:
    """So a kernel without a registration, or with a branch that no case takes, is noticed."""
    folder = Path(backend.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    kernels = {
        name for source in sources for name in re.findall(r"^def (\w+)_kernel\(", source, re.MULTILINE)
    }
    assert kernels == {build.kernel_name for build in VARIANTS}


def test_the_compiled_variants_are_the_launched_ones() -> None:
    from trimtab.kernels.triton.unrolled_loop import unrolled_loop  # noqa: PLC0415

    x = torch.zeros(3, 41)
    with record_launches() as builds:
        unrolled_loop(x, x, 2.0, 2.0, 10.0, 60)
    (build,) = builds
    assert (build.kernel_name, build.num_warps) == ("unrolled_loop", 4)
    assert build.types == {
        **dict.fromkeys(("base_ptr", "anchor_ptr", "params_ptr", "out_ptr"), "*fp32"),
        **dict.fromkeys(("num_elements", "iterations"), "i32"),
    }
    assert build.constants == {"BLOCK": 1024}
    assert build.aligned == {"base_ptr", "anchor_ptr", "params_ptr", "out_ptr"}  # lengths are not specialised


def test_a_spilling_kernel_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same search kernel with a sixteenth of the threads needs more registers than there are."""
    build = next(
        build for build in VARIANTS if build.kernel_name == "count_ge" and build.constants["HAS_PRIOR"]
    )
    crowded = KernelVariant(build.function, build.types, build.constants, build.aligned, 1, build.num_stages)
    assert compile_resources(crowded, "sm_90").spills > 0
    assert aot_compile._occupancy("sm_90", 255, 0, 1) < aot_compile._occupancy("sm_90", 32, 0, 1)


@pytest.mark.long
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_every_config_that_tune_tries_compiles(arch: str) -> None:
    """One field at a time differs from the shipped config; a config that spills is slow but compiles."""
    builds: list[KernelVariant] = []
    for name, values in tune.ATTENTION_CHOICES.items():
        for case in ATTENTION.cases[:2]:
            arguments = case.make_args(torch.device("cpu"), torch.Generator().manual_seed(0))
            for value in values:
                with record_launches() as launches:
                    paged_attention(*arguments, config=replace(DEFAULT_CONFIGS.attention, **{name: value}))
                builds += launches
    case = fused_case(LLAMA, 16, 1, AMULET, GREEDY)
    *inputs, trace = case.make_args(torch.device("cpu"), torch.Generator().manual_seed(0))
    for name, values in tune.TILE_CHOICES.items():
        for value in values:
            tile = replace(DEFAULT_CONFIGS.head.tiles[16], **{name: value})
            with record_launches() as launches:
                lm_head_steer(*inputs, trace=trace, config=replace(DEFAULT_CONFIGS.head, tiles={16: tile}))
            builds += [build for build in launches if build.kernel_name == "lm_head"]
    assert len(builds) > 40
    assert all(compile_resources(build, arch).registers > 0 for build in builds)


def compiled_code(builds: list[KernelVariant]) -> set[tuple[Any, ...]]:
    """Cache keys without alignment: the tensors of a step's layout are aligned on a GPU only."""
    return {replace(build, aligned=frozenset()).cache_key for build in builds}


def test_invariant_prefill_and_decode_attention_run_the_same_code_without_fma() -> None:
    builds = variants_of(INVARIANT_ATTENTION)
    kernels = [kernel for kernel, *_ in compiled_code(builds)]
    assert (kernels.count("invariant_attention"), kernels.count("combine_splits")) == (
        3,
        3,
    )  # with a window, without, demo
    default = [kernel for kernel, *_ in compiled_code(variants_of(ATTENTION))]
    assert default.count("attention") == 5  # the default code differs, so this test can fail
    assert not any(build.fp_fusion for build in builds)


def test_batch_invariant_steps_of_any_shape_launch_the_same_code() -> None:
    """Except `combine_splits`, an extra elementwise launch when a long sequence decodes."""
    config = ModelConfig.from_dict(TinyModel(heads=4, head_dim=12, layers=1, max_length=2048).config())
    weights = DummyWeights(param_shapes(config), torch.float32, CPU)
    model = Decoder(config, weights, torch.float32, CPU, INVARIANT.ops)
    cache = INVARIANT.cache_cls(1, 80, 16, config.num_kv_heads, config.head_dim, torch.float32, CPU)
    state = SteeringState(config.vocab_size, CPU)
    for row, (coefficients, sampling) in enumerate(
        ((SteeringCoefficients(), GREEDY), (KL_BOUNDED, TRUNCATED), (MATO, SAMPLED))
    ):
        state.add_request(row, coefficients, [0.5] * 2, sampling)
    block_table = list(range(40))
    steps = {
        "one token": ([(40, 1)], [0], False),
        "a long and a short sequence": ([(600, 1), (3, 1)], [1], True),
        "a prompt": ([(0, 33)], [2], False),
        "prompts and tokens": ([(0, 5), (7, 16), (300, 1), (2, 70)], [0, 1, 2], True),
    }
    code_by_step = {}
    for name, (counts, rows, top) in steps.items():
        with record_launches() as builds, torch.inference_mode():
            tokens = sum(count for _, count in counts)
            chunks = [SequenceChunk(start, count, block_table) for start, count in counts]
            hidden = forward(model, chunks, [1] * tokens, [1] * tokens, cache)
            layout = RequestLayout.from_branches([(row, range(3)) for row in rows], CPU)
            INVARIANT.sample(model.lm_head, hidden[[0] * (3 * len(rows))], layout, state, top=top)
        code_by_step[name] = compiled_code(
            [build for build in builds if build.kernel_name != "combine_splits"]
        )
        assert len(code_by_step[name]) > 12
    assert all(keys == code_by_step["one token"] for keys in code_by_step.values())
