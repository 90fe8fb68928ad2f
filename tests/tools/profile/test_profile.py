"""`trimtab profile`: resources of kernels, and stages of a decoding step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from trimtab.engine.engine import Engine
from trimtab.engine.request import Request
from trimtab.engine.sampling_params import SamplingParams
from trimtab.engine.scheduling.scheduler import SchedulerOutput
from trimtab.tools.cli.main import main
from trimtab.tools.profile import gpu_activity
from trimtab.tools.profile.stages import STAGES, StageTimer, instrument

from ...harness import get_core
from ...helpers.tiny_model import TinyModel, write_json
from ..conftest import CommandResult

Run = Callable[..., CommandResult]

compiling = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")


@compiling
def test_profile_kernels_json_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert main(["profile", "kernels", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert {row["arch"] for row in report["kernels"]} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert all(row["registers"] > 0 and row["spills"] == 0 for row in report["kernels"])
    steer = report["cases"][0]
    assert steer["bytes"] == 5 * 128_256 * 4
    assert steer["H200"] == pytest.approx(steer["bytes"] / 4800e9 * 1e6, abs=0.01)


@compiling
def test_profile_kernels_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert main(["profile", "kernels"]) == 0
    output = capsys.readouterr().out
    assert "steer.mix" in output
    assert "MI300X" in output


def test_an_unknown_subject_and_interpreted_kernels_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["profile", "weather"]) == 2
    assert "unknown subject 'weather'; subjects are kernels, decode" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["profile", "kernels"]) == 2
    assert "TRITON_INTERPRET is 1" in capsys.readouterr().err


TINY = ("--input-len", "9", "--output-len", "8", "--kv-cache-memory", "8MiB", "--num-iters", "2")
OBJECTIVE_FLAGS = ("--prefer", "Be kind.=0.7", "--prefer", "Be brief.=0.3", "--batch-size", "2")


@pytest.mark.usefixtures("fast_machine_peaks")
def test_stage_times_add_up_to_the_step(run: Run, tiny_folder: Path) -> None:
    ran = run("profile", "decode", "--model", str(tiny_folder), *TINY, *OBJECTIVE_FLAGS, "--json")
    assert (ran.status, ran.stderr, ran.stdout.count("\n")) == (0, "", 1)
    report = json.loads(ran.stdout)
    assert (report["rows"], report["steps"]) == (6, 2 * 7)
    *stages, step = report["stages"]
    assert [row["stage"] for row in stages] == list(STAGES)
    assert sum(row["share"] for row in stages) == pytest.approx(1)
    assert step["share"] == 1
    assert step["floor_us"] == pytest.approx(sum(row["floor_us"] for row in stages))
    assert all(0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] for row in report["stages"])


@pytest.mark.usefixtures("fast_machine_peaks")
def test_profile_decode_prints_a_table_for_a_config_without_weights(run: Run, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", TinyModel().config())
    ran = run("profile", "decode", "--model", str(tmp_path), "--load-format", "dummy", *TINY)
    assert (ran.status, ran.stderr) == (0, "")
    assert "1 rows, 14 decoding steps" in ran.stdout
    assert "attention" in ran.stdout


@pytest.mark.usefixtures("fast_machine_peaks")
def test_a_trace_has_each_stage_of_four_steps(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    ran = run("profile", "decode", "--model", str(tiny_folder), *TINY, "--trace", str(file))
    assert ran.status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    names = [event.get("name") for event in json.loads(file.read_text())["traceEvents"]]
    assert names.count("trimtab step") == 4
    assert names.count("trimtab attention") == 4 * TinyModel().layers
    assert names.count("trimtab steer") == 4


def test_profiling_restores_the_engine(tiny: Engine) -> None:
    core = get_core(tiny)
    owners = (core, core.scheduler, core.runner, core.runner.cache, core.runner.model)
    before = [dict(vars(owner)) for owner in owners]
    request = Request(branch_token_ids=[[5, 6, 7]], sampling=SamplingParams(max_tokens=6, ignore_eos=True))
    plain = tiny.generate(request)
    timer = StageTimer(num_rows=1)
    with instrument(tiny, timer):
        profiled = tiny.generate(request)
    assert profiled.token_ids == plain.token_ids
    assert len(timer.steps) == 5
    for owner, attributes in zip(owners, before, strict=True):
        assert vars(owner).keys() == attributes.keys()
        same = [name for name in ("ops", "_layers", "lm_head", "sample", "cache") if name in attributes]
        assert all(vars(owner)[name] is attributes[name] for name in same)


def test_the_time_of_a_nested_stage_is_not_counted_twice() -> None:
    stages = StageTimer(num_rows=0)
    inner = stages.wrap("cache", lambda: time.sleep(0.02))
    outer = stages.wrap("attention", lambda: (time.sleep(0.01), inner()))
    plan = stages.wrap_schedule(SchedulerOutput)
    stages.wrap_step(lambda: (plan(), outer()))()
    (step,) = stages.steps
    assert step["cache"] >= 0.02
    assert step["attention"] >= 0.01
    assert sum(step.values()) < step["cache"] + step["attention"] + 0.01


def test_gpu_time_counts_for_the_innermost_stage_and_idle_time_is_reported() -> None:
    def gpu_event(name: str, start: float, end: float) -> FunctionEvent:
        return FunctionEvent(0, name, 0, start, end, device_type=DeviceType.CUDA)

    events = [
        FunctionEvent(0, "trimtab attention", 0, 0, 100),  # the range on the host, which runs ahead
        gpu_event("trimtab step", 10, 104),
        gpu_event("trimtab mlp", 10, 52),
        gpu_event("gemm", 10, 40),
        gpu_event("_swiglu_kernel", 46, 52),
        gpu_event("copy", 100, 104),
        gpu_event("late", 110, 112),
    ]
    assert gpu_activity.time_by_stage(events, steps=2) == {"mlp": 18, "step": 3}
    assert gpu_activity.gpu_spans(events) == [(10, 40), (46, 52), (100, 104), (110, 112)]
    activity = gpu_activity.measure_activity([(0, 30), (32, 38), (35, 36), (90, 94)], steps=2)
    assert (activity.launches, activity.busy_us, activity.gap_us) == (2, 20, 27)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "SUBJECT is missing; it must be one of kernels, decode"),
        (
            ("decode", "--trace", "/nowhere/x"),
            "--trace is '/nowhere/x'; it must be a file in an existing folder",
        ),
        (
            ("decode", "--trace", "x", "--output-len", "4"),
            "output_len is 4; a trace needs answers of at least 7 tokens",
        ),
        (("decode", "--batch-size", "49"), "batch_size is 49, which makes 49 branches; max_num_seqs allows"),
    ],
)
def test_invalid_input_is_reported_in_one_sentence(run: Run, words: tuple[str, ...], sentence: str) -> None:
    ran = run("profile", *words)
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"trimtab: {sentence}")
    assert ran.stderr.count("\n") == 1
