"""`tools/gpu/probe.py`: every part runs at tiny shapes without a GPU, and the documented commands work."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from trimtab.tools.gpu import check, probe

ROOT = Path(__file__).parents[3]
HOW_TO = ROOT / "docs" / "how-to" / "check-a-gpu.md"
BLOCKS = re.findall(r"^```sh\n(.*?)^```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
LINES = "".join(BLOCKS).replace("\\\n", " ").splitlines()
SPLIT = [shlex.split(line, comments=True) for line in LINES]
ROWS = {"gemm": 28, "attention": 2, "empties": 2, "head": 12, "steps": 2, "hf": 2}
FIGURES = {
    "gemm": {"us", "of_copy"},
    "attention": {"mb", "us", "of_copy"},
    "empties": {"us", "of_copy"},
    "steps": {"us", "floor_us", "times_floor", "tokens_per_s", "captured"},
    "hf": {"us_per_token"},
}


def run_probe(folder: Path, program: list[str], *words: str) -> dict[str, Any]:
    """Run the program with --small, and return the contents of probe.json."""
    package_dir = folder / "shown"
    package_dir.mkdir()
    (package_dir / "trimtab").symlink_to(ROOT)
    overrides = {
        "PYTHONPATH": str(package_dir),
        "OUT": str(folder),
        "SHAPES": "1x20 2x40",
        "OMP_NUM_THREADS": "1",
    }
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | overrides
    command = [sys.executable, *program, *words, "--small"]
    process = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    rows: dict[str, Any] = json.loads((folder / "probe.json").read_text())
    assert "failed" not in rows
    assert rows.pop("roof")["bytes/s"].keys() == {"copy", "read"}
    assert {part: len(rows[part]) for part in rows} == {part: ROWS[part] for part in words}
    for part in rows.keys() & FIGURES.keys():
        assert all(figures.keys() == FIGURES[part] for figures in rows[part].values())
    return rows


def test_every_part_runs_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    parts = [part for part in probe.PARTS if part not in ("roof", "hf")]
    rows = run_probe(tmp_path, ["-m", "trimtab.tools.gpu.probe"], *parts)
    assert list(rows["attention"]) == ["1 rows at 20", "2 rows at 40"]
    assert list(rows["steps"]) == ["1 x 1 at 20", "1 x 5 at 20"]
    assert rows["steps"]["1 x 5 at 20"]["us"] > 0


def test_transformers_is_measured_when_the_file_is_run_by_its_path(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    rows = run_probe(tmp_path, ["tools/gpu/probe.py"], "hf")
    assert list(rows["hf"]) == ["plain", "guidance_scale=1.5"]


def test_a_failing_part_is_reported_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: probe.Probe) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that monkeypatch restores it
    monkeypatch.setitem(probe.PARTS, "head", fail)
    assert probe.main(["head", "gemm", "--small"]) == 1
    rows = json.loads((tmp_path / "probe.json").read_text())
    assert rows["failed"] == {"head": {"error": "RuntimeError: no such kernel"}}
    assert len(rows["gemm"]) == ROWS["gemm"]


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        probe.main(["everything"])
    assert "choose from roof, gemm" in capsys.readouterr().err


def test_figures_are_printed_beside_their_targets() -> None:
    report = probe.Report(None)
    for name, us in (("1 x 1 at 512", 100.0), ("1 x 2 at 512", 105.0), ("1 x 5 at 512", 110.0)):
        report.add("steps", name, us=us, times_floor=1.25)
    probe._add_targets_of_steps(report)
    assert "targets" not in report.rows
    report.add("steps", "16 x 5 at 512", us=200.0, times_floor=1.5)
    report.add("hf", probe.GUIDED, us_per_token=1100.0)
    probe._add_targets_of_steps(report)
    probe._add_targets_of_hf(report)
    ratios = [row["found"] for row in report.rows["targets"].values()]
    assert ratios == pytest.approx([0.8, 1.1, 1.5, 1100 / 105, 10.0])


def test_bandwidth_is_reported_as_a_share_of_copy_speed() -> None:
    report = probe.Report(None)
    report.add("roof", "bytes/s", copy=4e12, read=5e12)
    figures = probe.Probe(torch.device("cpu"), True, report).traffic(2e6, 1.0)
    assert figures == {"us": 1.0, "of_copy": 0.5}


def documented_args(name: str) -> list[list[str]]:
    """The arguments of each call of this program in the how-to."""
    calls = [words[words.index(name) + 1 :] for words in SPLIT if name in words]
    return [list(takewhile(lambda word: ">" not in word, words)) for words in calls]


def test_the_documented_commands_parse() -> None:
    checks, probes = documented_args("tools/gpu_check"), documented_args("trimtab.tools.gpu.probe")
    assert len(checks) >= 1
    assert len(probes) >= 3
    assert [check._parse_args(words).sections for words in checks]
    assert {part for words in probes for part in probe._arguments(words).parts} == probe.PARTS.keys()
    known = {process for processes in check.SECTIONS.values() for process in processes}
    ((section, *args),) = documented_args("trimtab.tools.gpu.run_section")
    assert section in known
    assert len(args) == 4


def test_the_documented_files_exist() -> None:
    text = "\n".join(LINES)
    for path in re.findall(r"(?<![\w./])tools/[\w/.]+", text):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"-m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    for shape in re.findall(r"for shape in ([^;]+);", text)[0].split():
        assert re.fullmatch(r"\d+x\d+", shape)


def test_the_documented_profiler_pattern_matches_the_decode_attention_kernels() -> None:
    source = (ROOT / "kernels" / "triton" / "attention.py").read_text(encoding="utf-8")
    kernels = re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)
    (pattern,) = re.findall(r"-k regex:'([^']+)'", "\n".join(LINES))
    assert len(kernels) == 2
    assert all(re.search(pattern, kernel) for kernel in kernels)
