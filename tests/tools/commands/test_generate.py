"""`trimtab generate` with a fake engine."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable

import pytest
from rich.console import Console
from trimtab.engine.methods.builtin import Base
from trimtab.engine.methods.objective import Objective
from trimtab.engine.methods.trim import Trim
from trimtab.tools.cli import display
from trimtab.tools.cli import terminal as plain

from ..conftest import CommandResult, FakeEngine

Run = Callable[..., CommandResult]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """The output on a simulated terminal."""
    screen = io.StringIO()
    console = Console(
        file=screen, force_terminal=True, width=60, height=20, highlight=False, color_system=None
    )
    monkeypatch.setattr(plain, "is_tty", lambda: True)
    monkeypatch.setattr(display, "make_console", lambda: console)
    return screen


def test_a_pipe_gets_the_text_and_a_newline_and_nothing_else(run: Run, engine: FakeEngine) -> None:
    assert run("generate", "What is rain?") == CommandResult(0, "Rain is water.\n", "")


def test_an_answer_that_ends_with_a_newline_gets_no_second_one(run: Run, engine: FakeEngine) -> None:
    engine.deltas = ["Rain.", "\n"]
    assert run("generate", "What is rain?").stdout == "Rain.\n"


def test_without_objectives_the_method_is_base(run: Run, engine: FakeEngine) -> None:
    run("generate", "hi")
    assert engine.requests[0].steering == Base()


def test_with_objectives_the_method_is_trim(run: Run, engine: FakeEngine) -> None:
    run("generate", "hi", "--prefer", "Be brief.=0.3", "--prefer", "Be kind.", "--max-gain", "5")
    objectives = (Objective("Be brief.", 0.3), Objective("Be kind.", 1.0))
    assert engine.requests[0].steering == Trim(objectives, max_gain=5.0)


def test_flags_set_the_config_and_the_sampling_params(run: Run, engine: FakeEngine) -> None:
    run("generate", "hi", "--model", "folder", "--dtype", "float32", "--max-tokens", "5", "--seed", "3")
    assert (engine.configs[0].model, engine.configs[0].dtype) == ("folder", "float32")
    assert (engine.requests[0].sampling.max_tokens, engine.requests[0].sampling.seed) == (5, 3)


def test_the_system_prompt_is_the_first_message(run: Run, engine: FakeEngine) -> None:
    run("generate", "hi", "--system", "Speak Latin.")
    assert engine.requests[0].messages == [
        {"role": "system", "content": "Speak Latin."},
        {"role": "user", "content": "hi"},
    ]


def test_a_dash_reads_the_prompt_from_stdin(
    run: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\nsecond\n"))
    run("generate", "-")
    assert engine.requests[0].prompt == "first\nsecond"


def test_stdin_that_is_not_utf8_is_refused(
    run: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="utf-8"))
    ran = run("generate", "-")
    assert ran == CommandResult(
        2, "", "trimtab: standard input is not valid UTF-8 (invalid start byte at byte 2)\n"
    )


def test_json_is_one_line_with_every_field_of_the_output(run: Run, engine: FakeEngine) -> None:
    ran = run("generate", "hi", "--prefer", "a", "--prefer", "b=3", "--json", "--logprobs", "1")
    assert (ran.status, ran.stderr, ran.stdout.count("\n")) == (0, "", 1)
    result = json.loads(ran.stdout, parse_constant=_refuse)
    assert result["text"] == "Rain is water."
    assert result["token_ids"] == [0, 1, 2]
    assert (result["finish_reason"], result["method"], result["error"]) == ("stop", "trim", None)
    assert [b["name"] for b in result["branches"]] == ["base", "a", "b"]
    assert result["branches"][1] == {"name": "a", "prompt": "<a>", "prompt_token_ids": [1, 2]}
    assert result["weights"] == [[1.0, 3.0]] * 3
    assert result["fulfilment"] == [0.5, 0.5]
    assert result["branch_logprobs"] == [[-1.0, -1.0, -1.0]] * 3
    assert result["timings"]["tokens_per_second"] == 15.0
    assert result["strength"] == [None, 1.5, 1.5], "NaN and infinities are null in JSON"
    assert result["logprobs"] == [{"token_id": 0, "logprob": -0.5, "top": {"0": -0.5}}]
    assert "outputs" not in result


def test_json_without_a_trace_has_null_fields(run: Run, engine: FakeEngine) -> None:
    result = json.loads(run("generate", "hi", "--prefer", "a", "--json", "--no-trace").stdout)
    assert engine.requests[0].trace is False
    assert [
        result[key] for key in ("weights", "branch_logprobs", "rewards", "strength", "kl", "logprobs")
    ] == [None] * 6


def test_json_escapes_control_characters_in_a_single_line(run: Run, engine: FakeEngine) -> None:
    engine.deltas = ["a\x1b[31m", "\n\u2028\x9b é"]
    out = run("generate", "hi", "--json").stdout
    assert out.isascii()
    assert not any(c < " " for c in out[:-1])
    assert json.loads(out)["text"] == "a\x1b[31m\n\u2028\x9b é"


def test_json_of_several_answers_lists_them_all(run: Run, engine: FakeEngine) -> None:
    result = json.loads(run("generate", "hi", "--n", "3", "--seed", "5", "--json").stdout)
    assert [each["seed"] for each in result["outputs"]] == [5, 6, 7]
    assert result["seed"] == 5
    assert "outputs" not in result["outputs"][0]


def test_several_answers_are_printed_one_after_another(run: Run, engine: FakeEngine) -> None:
    ran = run("generate", "hi", "--n", "2")
    assert ran == CommandResult(0, "Rain is water.\n\nRain is water.\n", "")


@pytest.mark.parametrize("flags", [[], ["--n", "2"]])
def test_a_failed_answer_is_one_error_line_and_status_1(
    run: Run, engine: FakeEngine, flags: list[str]
) -> None:
    engine.error = "every token was masked"
    ran = run("generate", "hi", *flags)
    assert (ran.status, ran.stderr) == (1, "trimtab: every token was masked\n")


def test_a_failed_answer_in_json_is_still_printed(run: Run, engine: FakeEngine) -> None:
    engine.error = "every token was masked"
    ran = run("generate", "hi", "--json")
    assert (ran.status, ran.stderr) == (1, "trimtab: every token was masked\n")
    assert json.loads(ran.stdout)["error"] == "every token was masked"


def test_ctrl_c_during_an_answer_aborts_the_request_and_exits(run: Run, engine: FakeEngine) -> None:
    engine.before_delta = lambda index: signal.raise_signal(signal.SIGINT) if index == 1 else None
    ran = run("generate", "hi")
    assert (ran.status, ran.stdout, engine.num_closed) == (130, "Rain", 1)


def test_generated_escape_codes_are_escaped_in_a_pipe(run: Run, engine: FakeEngine) -> None:
    engine.deltas = ["\x1b[2J", "[bold]x[/bold]", "\x07\u202e\x9b\r\n"]
    assert run("generate", "hi").stdout == "\\x1b[2J[bold]x[/bold]\\x07\\u202e\\x9b\n"


def test_generated_escape_codes_and_markup_are_shown_literally(
    run: Run, engine: FakeEngine, terminal: io.StringIO
) -> None:
    engine.deltas = ["\x1b]0;pwned\x07", "[bold red]x[/bold red] [/nothing]", " :smile:"]
    assert run("generate", "hi").status == 0
    output = terminal.getvalue()
    assert "\x1b]" not in output
    assert "\x07" not in output
    assert r"\x1b]0;pwned\x07[bold red]x[/bold red] [/nothing] :smile:" in output


def test_a_terminal_shows_the_fulfilment_and_the_caption(
    run: Run, engine: FakeEngine, terminal: io.StringIO
) -> None:
    run("generate", "hi", "--prefer", "Be brief.=0.3", "--prefer", "[bold]=0.7", "--temperature", "1")
    last = terminal.getvalue().rpartition("Rain is water.")[2]
    for text, numbers in (("Be brief.", "asked 0.30, reached 0.50"), ("[bold]", "asked 0.70, reached 0.50")):
        assert [line.rstrip().endswith(numbers) for line in last.splitlines() if text in line] == [True]
    assert "3 tokens · 15.0 tok/s · stop · seed 1000" in last


@pytest.mark.parametrize(
    "flags", [[], ["--prefer", "Be brief.", "--no-trace"], ["--prefer", "Be brief.", "--method", "amulet"]]
)
def test_no_bars_are_drawn_for_uninformative_weights(
    run: Run, engine: FakeEngine, terminal: io.StringIO, flags: list[str]
) -> None:
    run("generate", "hi", *flags)
    assert "Be brief." not in terminal.getvalue()
    assert "seed" not in terminal.getvalue(), "a greedy answer has no seed"


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not valid JSON")
