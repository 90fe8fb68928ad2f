from __future__ import annotations

import json
import os

import pytest
from trimtab.tools.cli import main

compiling = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")


@compiling
def test_profile_kernels_ends_with_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert main(["profile", "kernels", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert {row["arch"] for row in found["kernels"]} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert all(row["registers"] > 0 and row["spills"] == 0 for row in found["kernels"])
    steer = found["cases"][0]
    assert steer["bytes"] == 5 * 128_256 * 4
    assert steer["H200"] == pytest.approx(steer["bytes"] / 4800e9 * 1e6, abs=0.01)


@compiling
def test_profile_kernels_is_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert main(["profile", "kernels"]) == 0
    said = capsys.readouterr().out
    assert "steer.mix" in said
    assert "MI300X" in said


def test_what_cannot_be_profiled_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["profile", "weather"]) == 2
    assert "'weather'; known are kernels" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["profile", "kernels"]) == 2
    assert "TRITON_INTERPRET is 1" in capsys.readouterr().err
