"""`trimtab chat` with scripted input and a fake engine."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable

import pytest
from trimtab.engine.methods.builtin import Amulet, Base
from trimtab.engine.methods.objective import Objective
from trimtab.engine.methods.trim import Trim

from ..conftest import CommandResult, FakeEngine

Say = Callable[..., CommandResult]
BRIEF, KIND = Objective("Be brief.", 1.0), Objective("Be kind.", 0.5)


@pytest.fixture
def run_chat(monkeypatch: pytest.MonkeyPatch, run: Callable[..., CommandResult], engine: FakeEngine) -> Say:
    """Run a chat with these lines as stdin."""

    def chat(*lines: str, flags: tuple[str, ...] = ()) -> CommandResult:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", *flags)

    return chat


def test_a_piped_chat_prints_answers_only(run_chat: Say) -> None:
    assert run_chat("hi", "", "again") == CommandResult(0, "Rain is water.\nRain is water.\n", "")


def test_a_turn_includes_the_previous_messages(run_chat: Say, engine: FakeEngine) -> None:
    run_chat("hi", "again", flags=("--system", "Speak Latin."))
    assert engine.requests[1].messages == [
        {"role": "system", "content": "Speak Latin."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Rain is water."},
        {"role": "user", "content": "again"},
    ]


def test_reset_clears_the_conversation_and_keeps_the_objectives(run_chat: Say, engine: FakeEngine) -> None:
    run_chat("hi", "/reset", "again", flags=("--prefer", "Be brief."))
    assert engine.requests[1].messages == [{"role": "user", "content": "again"}]
    assert engine.requests[1].steering == Trim((BRIEF,))


def test_objectives_may_change_between_turns(run_chat: Say, engine: FakeEngine) -> None:
    run_chat(
        "1", "/prefer Be brief.", "2", "/prefer Be kind.=0.5", "3", "/prefer Be brief.=2", "4", "/drop 1", "5"
    )
    assert [request.steering for request in engine.requests] == [
        Base(),
        Trim((BRIEF,)),
        Trim((BRIEF, KIND)),
        Trim((Objective("Be brief.", 2.0), KIND)),
        Trim((KIND,)),
    ]


def test_an_objective_is_dropped_by_its_text_too(run_chat: Say, engine: FakeEngine) -> None:
    run_chat("/drop Be kind.", "hi", flags=("--prefer", "Be brief.", "--prefer", "Be kind."))
    assert engine.requests[0].steering == Trim((BRIEF,))


def test_prefer_alone_lists_the_objectives(run_chat: Say) -> None:
    assert run_chat("/prefer", "/prefer Be kind.=0.5", "/prefer").stdout == (
        "no objectives; /prefer TEXT=WEIGHT adds one\n1. Be kind. = 0.5\n1. Be kind. = 0.5\n"
    )


def test_the_method_may_change_between_turns(run_chat: Say, engine: FakeEngine) -> None:
    ran = run_chat(
        "/method amulet iterations=5 kl_budget=0.2", "1", "/method base", "2", flags=("--prefer", "Be brief.")
    )
    assert [r.steering for r in engine.requests] == [Amulet((BRIEF,), iterations=5, kl_budget=0.2), Base()]
    assert "method: amulet:iterations=5:kl_budget=0.2\n" in ran.stdout


def test_method_flags_apply_once_objectives_are_added(run_chat: Say, engine: FakeEngine) -> None:
    run_chat("1", "/prefer Be brief.", "2", flags=("--max-gain", "5"))
    assert [r.steering for r in engine.requests] == [Base(), Trim((BRIEF,), max_gain=5.0)]


def test_the_system_prompt_may_change_between_turns(run_chat: Say, engine: FakeEngine) -> None:
    run_chat("/system Speak Latin.", "1", "/system", "2")
    assert engine.requests[0].messages[0] == {"role": "system", "content": "Speak Latin."}
    assert engine.requests[1].messages[0]["role"] == "user"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/prefer x=-1", "the weight of objective 'x' is -1.0; it must be a finite number ≥ 0"),
        ("/drop 2", "unknown objective '2'; /prefer lists them"),
        ("/drop", "unknown objective ''; /prefer lists them"),
        ("/drop " + "9" * 5000, "unknown objective '9999"),
        ("/method mato tau=1 tau=2", "tau of mato is set twice; it may be set once"),
        ("/method mto", "unknown method 'mto'; methods are "),
        ("/method amulet tau=1", "'tau' belongs to mato, not to amulet"),
        ("/method mato tau=-1", "tau of mato is -1.0; it must be a finite number above 0"),
        ("/nonsense", "unknown command '/nonsense'; /help lists them"),
    ],
)
def test_an_invalid_command_prints_one_error_line_and_changes_nothing(
    run_chat: Say, engine: FakeEngine, line: str, message: str
) -> None:
    ran = run_chat(line, "hi", flags=("--prefer", "Be brief."))
    assert ran.stderr.startswith(f"trimtab: {message}")
    assert (ran.status, ran.stderr.count("\n"), ran.stdout) == (0, 1, "Rain is water.\n")
    assert engine.requests[0].steering == Trim((BRIEF,))


def test_a_failed_answer_is_reported_and_left_out_of_the_history(run_chat: Say, engine: FakeEngine) -> None:
    def fails_once(index: int) -> None:
        engine.error = "the prompt is too long" if len(engine.requests) == 1 else None

    engine.before_delta = fails_once
    ran = run_chat("hi", "again")
    assert (ran.status, ran.stderr) == (0, "trimtab: the prompt is too long\n")
    assert engine.requests[1].messages == [{"role": "user", "content": "again"}]


def test_ctrl_c_stops_the_answer_and_keeps_its_text(run_chat: Say, engine: FakeEngine) -> None:
    engine.before_delta = lambda i: (
        signal.raise_signal(signal.SIGINT) if (i, len(engine.requests)) == (1, 1) else None
    )
    ran = run_chat("hi", "again")
    assert (ran.status, ran.stdout) == (0, "Rain is\nRain is water.\n")
    assert engine.num_closed == 2, "the stopped request was aborted"
    assert engine.requests[1].messages[1] == {"role": "assistant", "content": "Rain is"}


def test_a_second_ctrl_c_quits_the_chat(run_chat: Say, engine: FakeEngine) -> None:
    def press(index: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    engine.before_delta = press
    before = signal.getsignal(signal.SIGINT)
    assert run_chat("hi", "again").status == 130
    assert len(engine.requests) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_quit_ends_the_chat_and_help_lists_the_commands(run_chat: Say, engine: FakeEngine) -> None:
    ran = run_chat("/help", "/quit", "hi")
    assert (ran.status, engine.requests) == (0, [])
    commands = ("/prefer", "/drop", "/method", "/system", "/reset", "/help", "/quit", "Ctrl-D", "Ctrl-C")
    assert [c for c in commands if c not in ran.stdout] == []


def test_generated_escape_codes_are_escaped_in_a_chat(run_chat: Say, engine: FakeEngine) -> None:
    engine.deltas = ["\x1b[31m[red]"]
    assert run_chat("hi").stdout == "\\x1b[31m[red]\n"
