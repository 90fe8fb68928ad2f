"""`trimtab tune`: the search with simulated times, and the config file that the kernels load."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from trimtab.kernels.common.errors import InputError
from trimtab.kernels.triton import tuning
from trimtab.kernels.triton.configs import DEFAULT_CONFIGS, AttentionConfig, LMHeadConfig, LMHeadTile
from trimtab.tools.commands import tune

from ..conftest import CommandResult

GPU = "NVIDIA H200 (a test's)"


def num_differences(one: object, other: object) -> int:
    """Number of fields in which the two configs differ."""
    return sum(a != b for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


class FakeTimer:
    """Simulated times with one optimum; beyond some rows the unfused LM head is faster."""

    best = AttentionConfig(split=512, keys=32, warps=8, prompt_warps=4, stages=3)
    tile = LMHeadTile(tokens=64, depth=128, warps=8, stages=2)

    def __init__(self) -> None:
        self.configs: list[AttentionConfig] = []

    def attention(self, tuned: AttentionConfig) -> float:
        self.configs.append(tuned)
        if tuned.keys == 128:
            return math.inf  # the device cannot launch it
        return 1e-6 * (1 + num_differences(tuned, self.best))

    def fused(self, rows: int, tuned: LMHeadConfig) -> float:
        return 1e-6 * (rows + num_differences(tuned.tiles[rows], self.tile))

    def apart(self, rows: int) -> float:
        return 40e-6


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="records launches")
def test_the_clock_times_the_launches_of_registered_cases() -> None:
    from trimtab.kernels.specs.aot_compile import record_launches  # noqa: PLC0415
    from trimtab.tools.common.launch_timer import DeviceClock  # noqa: PLC0415

    with record_launches() as launches:
        seconds = DeviceClock(torch.device("cpu")).attention(DEFAULT_CONFIGS.attention)
    assert 0 < seconds < math.inf
    assert {launch.kernel_name for launch in launches} == {"attention", "combine_splits"}


def test_the_search_finds_the_fastest_config_and_measures_each_once() -> None:
    clock = FakeTimer()
    result = tune.tune_launches(DEFAULT_CONFIGS, clock)
    assert result.launches.attention == clock.best
    assert set(result.launches.head.tiles.values()) == {clock.tile}
    assert len(clock.configs) == len(set(clock.configs))
    assert result.microseconds["attention"] == pytest.approx((6, 1))


def test_the_product_is_fused_up_to_the_rows_where_it_is_no_slower() -> None:
    assert (
        tune.tune_launches(DEFAULT_CONFIGS, FakeTimer()).launches.head.max_rows == 32
    )  # with 64 rows: fused 64 µs, separate 40 µs


def test_tuned_configs_are_used_for_gpus_of_that_name() -> None:
    assert tuning.load_for_gpu(GPU) is DEFAULT_CONFIGS
    result = tune.tune_launches(DEFAULT_CONFIGS, FakeTimer())
    path = tuning.config_path(GPU)
    tune.write_result(path, result, GPU)
    assert [file.name for file in path.parent.iterdir()] == ["nvidia-h200-a-test-s.json"]
    assert tuning.load_for_gpu(GPU) == result.launches
    assert tuning.load_for_gpu("NVIDIA H100") is DEFAULT_CONFIGS
    assert json.loads(path.read_text())["gpu"] == GPU


@pytest.mark.parametrize(
    "wrong",
    [
        lambda data: "{",
        lambda data: json.dumps([]),
        lambda data: json.dumps({**data, "attention": {"split": 256, "kyes": 64}}),
        lambda data: json.dumps({**data, "attention": {**data["attention"], "warps": 0}}),
        lambda data: json.dumps({**data, "attention": {**data["attention"], "split": 100}}),
        lambda data: json.dumps({**data, "head": {**data["head"], "most_rows": 65}}),
    ],
)
def test_an_invalid_config_file_is_refused_by_its_name(wrong: Callable[[dict[str, object]], str]) -> None:
    path = tuning.config_path(GPU)
    path.parent.mkdir()
    path.write_text(wrong(tuning.to_json(DEFAULT_CONFIGS)))
    with pytest.raises(InputError, match=r"nvidia-h200-a-test-s.json' is not a tuning file .*trimtab tune"):
        tuning.load_for_gpu(GPU)


def test_tune_without_a_gpu_is_one_error_line(
    run: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ran = run("tune")
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr == ("trimtab: no GPU found to tune for; untuned GPUs use the shipped launch configs\n")


def test_every_tried_config_can_be_saved() -> None:
    for name, values in tune.ATTENTION_CHOICES.items():
        for value in values:
            config = replace(DEFAULT_CONFIGS, attention=replace(DEFAULT_CONFIGS.attention, **{name: value}))
            assert tuning.from_json(json.loads(json.dumps(tuning.to_json(config)))) == config
