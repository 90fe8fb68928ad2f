"""`trimtab compare` with a fake engine."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from rich.console import Console
from trimtab.engine.methods.builtin import Amulet, Base, Mato, Prompt
from trimtab.engine.methods.objective import Objective
from trimtab.engine.methods.trim import Trim
from trimtab.tools.cli import display, terminal

from ..conftest import CommandResult, FakeEngine

Run = Callable[..., CommandResult]
OBJECTIVES = (Objective("Be brief.", 1.0),)


def test_the_published_methods_are_compared_by_default(run: Run, engine: FakeEngine) -> None:
    assert run("compare", "hi", "--prefer", "Be brief.").status == 0
    methods = [request.steering for request in engine.requests]
    assert methods == [
        Base(),
        Prompt(OBJECTIVES),
        Amulet(OBJECTIVES),
        Mato(OBJECTIVES),
        Trim(OBJECTIVES),
    ]


def test_a_pipe_gets_plain_sections(run: Run, engine: FakeEngine) -> None:
    engine.deltas = ["[bold]Rain", "\x1b[0m"]
    ran = run("compare", "hi", "--prefer", "Be brief.", "--methods", "base,mato:tau=5")
    assert ran.stdout == (
        "--- base ---\n[bold]Rain\\x1b[0m\n(2 tokens · 15.0 tok/s · stop)\n\n"
        "--- mato:tau=5 ---\n[bold]Rain\\x1b[0m\n(a = 1.50 · 2 tokens · 15.0 tok/s · stop)\n\n"
    )


def test_json_is_one_line_with_a_column_per_method(run: Run, engine: FakeEngine) -> None:
    ran = run("compare", "hi", "--prefer", "Be brief.=2", "--methods", "base,mato:tau=5", "--json")
    assert ran.stdout.count("\n") == 1
    comparison = json.loads(ran.stdout)
    assert (comparison["prompt"], comparison["objectives"]) == ("hi", [{"text": "Be brief.", "weight": 2.0}])
    assert [(c["label"], c["method"]) for c in comparison["columns"]] == [
        ("base", "base"),
        ("mato:tau=5", "mato"),
    ]
    assert {c["text"] for c in comparison["columns"]} == {"Rain is water."}
    assert comparison["columns"][1]["weights"] == [[1.0]] * 3


def test_all_methods_sample_with_the_seed_of_the_first(run: Run, engine: FakeEngine) -> None:
    run("compare", "hi", "--prefer", "x", "--temperature", "1")
    assert [request.sampling.seed for request in engine.requests] == [None, 1000, 1000, 1000, 1000]


def test_a_failed_column_is_named_and_the_others_are_shown(run: Run, engine: FakeEngine) -> None:
    engine.error = "every token was masked"
    ran = run("compare", "hi", "--prefer", "x", "--methods", "base,mato")
    assert ran.status == 1
    assert ran.stderr == "trimtab: base: every token was masked\ntrimtab: mato: every token was masked\n"
    assert ran.stdout.count("--- ") == 2


@pytest.mark.parametrize(("width", "is_table"), [(100, True), (99, False)])
def test_a_wide_terminal_gets_columns_and_a_narrow_one_sections(
    run: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, width: int, is_table: bool
) -> None:
    monkeypatch.setattr(terminal, "is_tty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(display, "make_console", lambda: Console(force_terminal=True, width=width, height=30))
    out = run("compare", "hi", "--prefer", "x", "--methods", "base,mato").stdout
    assert ("--- base ---" in out) is not is_table
    assert ("┃" in out) is is_table
    assert "a = 1.50" in out
