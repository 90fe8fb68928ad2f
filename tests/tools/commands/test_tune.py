"""`trimtab tune`: what it finds by the times it is told, and the table that kernels are launched by."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from trimtab.kernels.common.errors import InputError
from trimtab.kernels.triton import tuning
from trimtab.kernels.triton.configs import SHIPPED, Attention, Tile, Tuning
from trimtab.tools.commands import tune

from ..conftest import Ran

GPU = "NVIDIA H200 (a test's)"


def apart(one: object, other: object) -> int:
    """In how many numbers they differ."""
    return sum(a != b for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


class Told:
    """Times as a GPU might have them: best at one place, and beyond some rows better apart."""

    best = Attention(split=512, keys=32, warps=8, prompt_warps=4, stages=3)
    tile = Tile(tokens=64, depth=128, warps=8, stages=2)

    def __init__(self) -> None:
        self.asked: list[Attention] = []

    def attention(self, tuned: Attention) -> float:
        self.asked.append(tuned)
        if tuned.keys == 128:
            return math.inf  # it does not fit
        return 1e-6 * (1 + apart(tuned, self.best))

    def fused(self, rows: int, tuned: Tuning) -> float:
        return 1e-6 * (rows + apart(tuned.tiles[rows], self.tile))

    def apart(self, rows: int) -> float:
        return 40e-6


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))


def test_the_quickest_of_every_number_is_found_each_measured_once() -> None:
    clock = Told()
    found = tune.tuned(SHIPPED, clock)
    assert found.launches.attention == clock.best
    assert set(found.launches.head.tiles.values()) == {clock.tile}
    assert len(clock.asked) == len(set(clock.asked))
    assert found.microseconds["attention"] == pytest.approx((6, 1))


def test_the_product_is_fused_up_to_the_rows_where_it_is_no_slower() -> None:
    assert tune.tuned(SHIPPED, Told()).launches.head.most_rows == 32  # with 64 rows it takes 64, apart 40


def test_what_was_measured_is_what_gpus_of_that_name_are_launched_by() -> None:
    assert tuning.named(GPU) is SHIPPED
    found = tune.tuned(SHIPPED, Told())
    path = tuning.file_of(GPU)
    tune.write(path, found, GPU)
    assert [file.name for file in path.parent.iterdir()] == ["nvidia-h200-a-test-s.json"]
    assert tuning.named(GPU) == found.launches
    assert tuning.named("NVIDIA H100") is SHIPPED
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
def test_a_table_that_is_none_is_refused_by_its_name(wrong: Callable[[dict[str, object]], str]) -> None:
    path = tuning.file_of(GPU)
    path.parent.mkdir()
    path.write_text(wrong(tuning.written(SHIPPED)))
    with pytest.raises(InputError, match=r"nvidia-h200-a-test-s.json' holds no launches .*trimtab tune"):
        tuning.named(GPU)


def test_without_a_gpu_one_sentence_says_so(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ran = run("tune")
    assert (ran.status, ran.out) == (2, "")
    assert ran.err == (
        "trimtab: there is no GPU to measure on; without a table the shipped launches are used\n"
    )


def test_all_that_is_tried_can_be_kept() -> None:
    for name, values in tune.ATTENTION.items():
        for value in values:
            kept = replace(SHIPPED, attention=replace(SHIPPED.attention, **{name: value}))
            assert tuning.parsed(json.loads(json.dumps(tuning.written(kept)))) == kept
