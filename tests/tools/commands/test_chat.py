"""`trimtab chat`, over a scripted input and an engine that says what it is told to."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable

import pytest
from trimtab.engine.methods.builtin import Amulet, Base, Mato
from trimtab.engine.methods.objective import Objective

from ..conftest import FakeEngine, Ran

Say = Callable[..., Ran]
A, B = Objective("Be brief.", 1.0), Objective("Be kind.", 0.5)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran], engine: FakeEngine) -> Say:
    """Chats with these lines as the input."""

    def chat(*lines: str, flags: tuple[str, ...] = ()) -> Ran:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", *flags)

    return chat


def test_a_piped_chat_prints_answers_alone(say: Say) -> None:
    assert say("hi", "", "again") == Ran(0, "Rain is water.\nRain is water.\n", "")


def test_a_turn_sees_what_was_said_before(say: Say, engine: FakeEngine) -> None:
    say("hi", "again", flags=("--system", "Speak Latin."))
    assert engine.asked[1].messages == [
        {"role": "system", "content": "Speak Latin."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Rain is water."},
        {"role": "user", "content": "again"},
    ]


def test_reset_forgets_the_conversation_and_keeps_the_wishes(say: Say, engine: FakeEngine) -> None:
    say("hi", "/reset", "again", flags=("--prefer", "Be brief."))
    assert engine.asked[1].messages == [{"role": "user", "content": "again"}]
    assert engine.asked[1].steering == Mato((A,))


def test_wishes_may_change_between_turns(say: Say, engine: FakeEngine) -> None:
    say(
        "1", "/prefer Be brief.", "2", "/prefer Be kind.=0.5", "3", "/prefer Be brief.=2", "4", "/drop 1", "5"
    )
    assert [request.steering for request in engine.asked] == [
        Base(),
        Mato((A,)),
        Mato((A, B)),
        Mato((Objective("Be brief.", 2.0), B)),
        Mato((B,)),
    ]


def test_a_wish_is_dropped_by_its_text_too(say: Say, engine: FakeEngine) -> None:
    say("/drop Be kind.", "hi", flags=("--prefer", "Be brief.", "--prefer", "Be kind."))
    assert engine.asked[0].steering == Mato((A,))


def test_prefer_alone_lists_the_wishes(say: Say) -> None:
    assert say("/prefer", "/prefer Be kind.=0.5", "/prefer").out == (
        "no wishes; /prefer TEXT=WEIGHT adds one\n1. Be kind. = 0.5\n1. Be kind. = 0.5\n"
    )


def test_the_method_may_change_between_turns(say: Say, engine: FakeEngine) -> None:
    ran = say(
        "/method amulet iterations=5 kl_budget=0.2", "1", "/method base", "2", flags=("--prefer", "Be brief.")
    )
    assert [r.steering for r in engine.asked] == [Amulet((A,), iterations=5, kl_budget=0.2), Base()]
    assert "method: amulet:iterations=5:kl_budget=0.2\n" in ran.out


def test_flags_choose_the_first_method_even_before_there_are_wishes(say: Say, engine: FakeEngine) -> None:
    say("1", "/prefer Be brief.", "2", flags=("--tau", "5"))
    assert [r.steering for r in engine.asked] == [Base(), Mato((A,), tau=5.0)]


def test_the_system_text_may_change_between_turns(say: Say, engine: FakeEngine) -> None:
    say("/system Speak Latin.", "1", "/system", "2")
    assert engine.asked[0].messages[0] == {"role": "system", "content": "Speak Latin."}
    assert engine.asked[1].messages[0]["role"] == "user"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/prefer x=-1", "the weight of objective 'x' is -1.0; it must be a finite number ≥ 0"),
        ("/prefer Be brief.=0", "the weights of all objectives are 0; at least one must be above 0"),
        ("/drop 2", "there is no wish '2' to drop; /prefer lists them"),
        ("/drop", "there is no wish '' to drop; /prefer lists them"),
        ("/drop " + "9" * 5000, "there is no wish '9999"),
        ("/method mato tau=1 tau=2", "tau of mato is set twice; once is enough"),
        ("/method mto", "there is no method 'mto'; methods are "),
        ("/method amulet tau=1", "'tau' belongs to mato, not to amulet"),
        ("/method mato tau=-1", "tau of mato is -1.0; it must be a finite number above 0"),
        ("/nonsense", "there is no command '/nonsense'; /help lists them"),
    ],
)
def test_a_mistake_is_a_sentence_changes_nothing_and_the_chat_goes_on(
    say: Say, engine: FakeEngine, line: str, sentence: str
) -> None:
    ran = say(line, "hi", flags=("--prefer", "Be brief."))
    assert ran.err.startswith(f"trimtab: {sentence}")
    assert (ran.status, ran.err.count("\n"), ran.out) == (0, 1, "Rain is water.\n")
    assert engine.asked[0].steering == Mato((A,))


def test_a_failed_answer_is_a_sentence_and_is_not_remembered(say: Say, engine: FakeEngine) -> None:
    def fails_once(index: int) -> None:
        engine.fails = "the prompt is too long" if len(engine.asked) == 1 else None

    engine.before_piece = fails_once
    ran = say("hi", "again")
    assert (ran.status, ran.err) == (0, "trimtab: the prompt is too long\n")
    assert engine.asked[1].messages == [{"role": "user", "content": "again"}]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(say: Say, engine: FakeEngine) -> None:
    engine.before_piece = lambda i: (
        signal.raise_signal(signal.SIGINT) if (i, len(engine.asked)) == (1, 1) else None
    )
    ran = say("hi", "again")
    assert (ran.status, ran.out) == (0, "Rain is\nRain is water.\n")
    assert engine.closed == 2, "the stopped request was given back to the engine"
    assert engine.asked[1].messages[1] == {"role": "assistant", "content": "Rain is"}


def test_ctrl_c_twice_leaves_the_chat(say: Say, engine: FakeEngine) -> None:
    def press(index: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    engine.before_piece = press
    before = signal.getsignal(signal.SIGINT)
    assert say("hi", "again").status == 130
    assert len(engine.asked) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_quit_leaves_and_help_lists_the_commands(say: Say, engine: FakeEngine) -> None:
    ran = say("/help", "/quit", "hi")
    assert (ran.status, engine.asked) == (0, [])
    commands = ("/prefer", "/drop", "/method", "/system", "/reset", "/help", "/quit", "Ctrl-D", "Ctrl-C")
    assert [c for c in commands if c not in ran.out] == []


def test_generated_escape_codes_do_not_reach_the_reader(say: Say, engine: FakeEngine) -> None:
    engine.pieces = ["\x1b[31m[red]"]
    assert say("hi").out == "\\x1b[31m[red]\n"
