"""Terminal output."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text
from trimtab.engine.outputs import Delta, Trace
from trimtab.tools.cli import display, terminal

if TYPE_CHECKING:
    import pytest


def make_console(width: int = 20, height: int = 10) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        height=height,
        highlight=False,
        color_system=None,
    )


def console_output(screen: Console) -> str:
    """Everything written to the console."""
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


@settings(deadline=None)
@given(st.text(), st.text())
def test_escaped_text_has_no_control_characters_and_keeps_the_rest(left: str, right: str) -> None:
    escaped = terminal.escape(left + "\x1b\x9b\u202e\ud800" + right)
    escaped.encode()
    assert not [
        c
        for c in escaped
        if c not in "\n\t" and (c < " " or "\x7f" <= c < "\xa0" or "\u202a" <= c <= "\u202e")
    ]
    assert "\\x1b\\x9b\\u202e\\ud800" in escaped
    assert terminal.escape("naïve 日本 👍\tx\n") == "naïve 日本 👍\tx\n"


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab \n日", max_size=12), max_size=12))
def test_wrapping_an_answer_in_pieces_drops_only_spaces_at_line_ends(pieces: list[str]) -> None:
    screen, pending, lines = make_console(8), "", []
    for piece in pieces:
        *finished, pending = display.wrap_lines(pending + piece, screen)
        lines += finished
    text = "".join(pieces).replace(" ", "").replace("\n", "")
    assert "".join([*lines, pending]).replace(" ", "") == text
    assert all(Text(line).cell_len <= 8 for line in lines)


@settings(deadline=None)
@given(st.text(alphabet="abcd ", max_size=40), st.integers(0, 40))
def test_wrapping_does_not_join_words(text: str, cut: int) -> None:
    screen = make_console(8)
    *finished, pending = display.wrap_lines(text[:cut], screen)
    output = " ".join([*finished, *display.wrap_lines(pending + text[cut:], screen)]).split()
    assert [word for word in output if word not in text] == []


def test_an_answer_longer_than_the_screen_is_shown_in_full() -> None:
    screen = make_console(width=20, height=5)
    live = display.LiveView(screen)
    live.start()
    for number in range(40):
        live.add(Delta(0, f"line {number}\n", [number]))
    live.finish("the end")
    output = console_output(screen)
    assert all(f"line {number}" in output for number in range(40))
    assert "the end" in output


def test_no_bars_are_drawn_when_fulfilment_and_objectives_differ_in_number() -> None:
    screen = make_console()
    live = display.LiveView(screen, [display.AskedObjective("one", 1.0), display.AskedObjective("two", 0.5)])
    live.start()
    live.add(Delta(0, "text", [1], Trace(fulfilment=[[1.0]])))
    live.finish("end")
    assert "one" not in console_output(screen)


def test_columns_show_markup_and_escape_codes_literally() -> None:
    screen = make_console(width=100, height=30)
    with display.open_columns(screen, ["base", "mato"]) as columns:
        columns.begin("mato")
        columns.add("[red]x[/red] \x1b[")
        columns.add("31m [/]")
        columns.end("a = 1.93")
    output = console_output(screen)
    final = output[output.rindex("base") :]
    assert r"[red]x[/red] \x1b[31m [/]" in final
    assert "a = 1.93" in final


def test_a_table_taller_than_the_screen_is_printed_in_full_at_the_end() -> None:
    screen = make_console(width=100, height=6)
    with display.open_columns(screen, ["base"]) as columns:
        columns.begin("base")
        columns.add("\n".join(f"line {number}" for number in range(30)))
        columns.end("done")
    output = console_output(screen)
    assert all(f"line {number} " in output for number in range(30))


def test_an_interrupted_table_is_printed_with_its_partial_answer() -> None:
    screen = make_console(width=100, height=30)
    with suppress(KeyboardInterrupt), display.open_columns(screen, ["base"]) as columns:
        columns.begin("base")
        columns.add("half an answ")
        raise KeyboardInterrupt
    assert "half an answ" in console_output(screen)


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with display.progress("trimtab: loading demo …") as report:
        assert report is None
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_shows_its_label_and_percentage(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", screen)
    with display.progress("trimtab: loading [bold]demo …") as report:
        assert report is not None
        report(0, 0)
        report(3, 4)
    assert "trimtab: loading [bold]demo …" in screen.getvalue()
    assert "75%" in screen.getvalue()
