"""`tools/gpu_check` runs tiny without a GPU, detects wrong results, and continues after failures."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trimtab.engine.engine import Engine
from trimtab.engine.outputs import Output, Timings, TokenLogprobs, Trace
from trimtab.tools.gpu import check, invariance, step_benchmark
from trimtab.tools.gpu.check import main
from trimtab.tools.gpu.compare_outputs import compare_outputs, compare_untraced
from trimtab.tools.gpu.decode import TINY_PLAN
from trimtab.tools.gpu.report import CheckReport
from trimtab.tools.gpu.tolerances import compare_tensors, to_float64

from ...harness import get_runner
from ...helpers.tiny_model import is_idle

ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
CHECK_ARGS = ("--device", "cpu", "--seconds", "3000")
SCRIPT = Path(__file__).parents[3] / "tools" / "gpu_check"


def test_every_section_runs_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environ = {**ENVIRONMENT, "OUT": str(tmp_path)}
    process = subprocess.run([SCRIPT, *CHECK_ARGS], env=environ, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert (report["failures"], report["skipped"]) == ([], [])
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert {row["section"] for row in rows} == {"kernels", "steps", "bench", "invariance", "decode", "served"}
    assert all(row["p50_us"] > 0 for row in rows if "p50_us" in row)
    assert [row for row in rows if "times_floor" in row]


def test_an_absent_device_and_an_unknown_section_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--device", "cuda:99"]) == 2
    assert "gpu_check: device is 'cuda:99'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["everything"])
    assert "choose from kernels, bench, invariance, decode" in capsys.readouterr().err


def test_a_failing_check_is_reported_and_stops_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    report = CheckReport(time.monotonic() + 100)
    with report.record("kernels", "one"):
        raise RuntimeError("no such kernel")
    with report.record("kernels", "two") as row:
        row["error_share"], row["wrong"] = 3.0, "three times the tolerance"
    with report.record("kernels", "three") as row:
        row["error_share"] = 0.5
    assert [failure["name"] for failure in report.failures] == ["one", "two"]
    assert "RuntimeError: no such kernel" in report.failures[0]["wrong"]
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert not report.should_skip("kernels", "four")
    assert replace(report, deadline=time.monotonic()).should_skip("kernels", "four")
    assert report.skipped == ["kernels: four"]


def test_a_section_continues_in_a_new_process_after_a_lost_gpu_or_a_crash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = [(3, 2, True), (-11, 4, False), (0, 5, False)]
    calls = []

    def run_process(args: list[str], seconds: float) -> int:
        status, sections, broken = ends[len(calls)]
        calls.append(args[3])
        wrong = [{"name": f"part {sections}"}] if broken else []
        results = {
            "rows": [{"name": str(sections)}],
            "failures": wrong,
            "seen": sections,
            "broken": broken,
            "gpu": "one",
        }
        Path(args[-1]).write_text(json.dumps(results))
        return status

    monkeypatch.setattr(check, "_run_process", run_process)
    results: dict[str, Any] = {name: [] for name in check.REPORT_LISTS}
    check._run_section("kernels", "cuda", time.monotonic() + 9, results)
    assert calls == ["0", "2", "4"]
    assert [row["name"] for row in results["rows"]] == ["2", "4", "5"]
    assert [failure["name"] for failure in results["failures"]] == ["part 2", "all parts"]
    assert "ended with status -11 in part 4" in results["failures"][1]["wrong"]
    assert results.keys() == {"rows", "failures", "skipped", "gpu"}
    ends, calls = [(1, 0, False)], []
    check._run_section("kernels", "cuda", time.monotonic() + 9, results)
    assert calls == ["0"], "a process that fails before its first part must not be restarted"
    check._run_section("bench", "cuda", time.monotonic(), results)
    assert calls == ["0"], "no process may start after the deadline"
    assert results["skipped"] == ["bench: all parts"]


def test_the_time_is_divided_among_sections_and_results_are_written_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, limits, written = [0.0], [], []

    def run_section(section: str, device: str, deadline: float, results: dict[str, Any]) -> None:
        path = tmp_path / "gpu_check.json"
        written.append(len(json.loads(path.read_text())["rows"]) if path.exists() else None)
        limits.append((section, round(deadline - now[0])))
        results["rows"].append({"section": section})
        now[0] = deadline if section == "kernels" else now[0] + 10

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(check, "_run_section", run_section)
    monkeypatch.setattr(check.time, "monotonic", lambda: now[0])
    assert main(["--device", "cpu", "--seconds", "170"]) == 0
    assert [name for name, _ in limits] == ["kernels", "steps", "bench", "invariance", "decode", "served"]
    assert limits[0] == ("kernels", 60)
    assert limits[-1] == ("served", 70)
    assert written == [None, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("error", [0.0, 1e-2, math.nan])
def test_a_wrong_result_is_detected(error: float) -> None:
    exact = torch.randn(3, 5, dtype=torch.float64)
    rough, got = exact.float(), exact.float()
    got[1, 2] += error
    share, wrong = compare_tensors((got, None), (rough, None), to_float64((exact, None)))
    assert (share <= 1, wrong == "") == ((True, True) if error == 0 else (False, False))


def make_output(
    tokens: list[int], logprob: float = -1.0, likeliest: float = -1.0, rewards: float = 0.0
) -> Output:
    timings = Timings(queue=0.0, prefill=0.0, decode=0.0, tokens_per_second=0.0)
    length = len(tokens)
    trace = Trace(
        strength=[1.0] * length, branch_logprobs=[[logprob, -2.0]] * length, rewards=[[rewards]] * length
    )
    logprobs = [TokenLogprobs(token, -1.0, {1: likeliest, 2: -1.5}) for token in tokens]
    return Output("", tokens, "length", [], trace, logprobs, timings, seed=0)


def test_answers_agree_up_to_a_near_tie_and_no_further() -> None:
    exact = make_output([1, 2, 3])
    assert compare_outputs([exact], [exact], 1e-3) == {
        "same": "1 of 1",
        "worst": 0.0,
        "mean": 0.0,
        "wrong": "",
    }
    near = compare_outputs([make_output([1, 3, 3], likeliest=-1.002)], [exact], 1e-3)
    assert (near["same"], near["wrong"]) == ("0 of 1", "")
    far = compare_outputs([make_output([1, 3, 3], likeliest=-1.2)], [exact], 1e-3)
    assert "diverges at token 1" in far["wrong"]
    for rewards, wrong in ((0.0, True), (0.5, False)):  # rewards accumulate the errors of sixteen tokens
        diverged = make_output([1] * 16 + [3], likeliest=-1.006, rewards=rewards)
        same = make_output([1] * 17, rewards=rewards)
        assert bool(compare_outputs([diverged], [same], 1e-3)["wrong"]) is wrong
    assert "off by 0.5" in compare_outputs([make_output([1, 2, 3], logprob=-1.5)], [exact], 1e-3)["wrong"]
    assert "off by inf" in compare_outputs([make_output([1, 2, 3], logprob=math.nan)], [exact], 1e-3)["wrong"]
    failed = replace(exact, error="no finite score")
    assert "no finite score" in compare_outputs([failed], [exact], 1e-3)["wrong"]


def test_untraced_answers_agree_up_to_a_near_tie_and_no_further() -> None:
    traced = make_output([1, 2, 1])  # token 1 is half a nat likelier than 2
    bare = [
        replace(make_output(tokens), trace=None, logprobs=None)
        for tokens in ([1, 2, 1], [1, 2, 2], [1, 2, 3])
    ]
    assert compare_untraced(bare[:1], [traced], 1e-3) == {"same": "1 of 1", "wrong": ""}
    assert compare_untraced(bare[1:2], [traced], 0.1) == {"same": "0 of 1", "wrong": ""}
    for one, near in ((bare[1], 0.05), (bare[2], 10.0)):  # 3 is not among the top tokens
        assert "diverges at token 2" in compare_untraced([one], [traced], near)["wrong"]
    assert (
        "no finite" in compare_untraced([replace(bare[0], error="no finite score")], [traced], 1e-3)["wrong"]
    )


def test_differing_outputs_are_a_failure_only_with_batch_invariant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariance, "count_matches", lambda *_: {"alone": (3, 3), "in pieces": (2, 3)})
    report = CheckReport(time.monotonic() + 100)
    invariance.check_invariance(report, "cuda:0", TINY_PLAN, tmp_path)
    assert [(row["in pieces"], row["wrong"]) for row in report.rows] == [
        ("2 of 3 the same", "numbers differ in pieces"),
        ("2 of 3 the same", ""),
    ]


def test_answers_count_as_equal_only_if_bitwise_equal() -> None:
    one, other = make_output([3, 4]), make_output([3, 4])
    assert invariance.count_equal([one], [other]) == 1
    assert invariance.count_equal([make_output([3, 4], logprob=math.nextafter(-1.0, 0.0))], [other]) == 0
    assert invariance.count_equal([make_output([3, 5])], [other]) == 0
    assert invariance.count_equal([replace(one, error="x")], [replace(other, error="x")]) == 0


def test_a_request_that_fails_at_its_first_token_ends_its_measurement(tiny: Engine) -> None:
    def fail_all(*args: Any, **kwargs: Any) -> Any:
        output = default_sample(*args, **kwargs)
        return replace(output, failed=torch.ones_like(output.failed))

    default_sample, get_runner(tiny).sample = get_runner(tiny).sample, fail_all
    try:
        with pytest.raises(RuntimeError, match="no finite"):
            step_benchmark.time_steps(tiny, step_benchmark.SMALL_LOAD, 1)
    finally:
        get_runner(tiny).sample = default_sample
    assert is_idle(tiny)
