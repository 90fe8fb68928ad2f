"""Errors are one line on stderr and an exit status."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trimtab import __version__
from trimtab.kernels.common.errors import InputError, RunError
from trimtab.tools.cli import main, open_engine

from ..conftest import CommandResult, FakeEngine

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.engine.config import EngineConfig

Run = Callable[..., CommandResult]

TYPED = """hi - -- = -n --n --json --no-json --json=x --prefer a=1 b=x -1 none --seed --stop --logit-bias 5=1
--method mato --tau --kl-budget=1e999 --ignore-eos=1 --methods base,, mato:tau --trace --dtype"""
"""Arguments that are meaningful in some position."""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["gen"], "unknown command 'gen'; commands are "),
        (["generate"], "expected a prompt, or --input FILE and --output FILE"),
        (["generate", "hi", "--temp", "1"], "unrecognized arguments: --temp 1; see trimtab generate --help"),
        (["generate", "hi", "--temperature", "-1"], "temperature is -1.0; it must be a finite number ≥ 0"),
        (["generate", "hi", "--prefer", "x=-1"], "the weight of objective 'x' is -1.0; it must be"),
        (["generate", "hi", "--prefer", "x=nan"], "the weight of objective 'x' is nan; it must be"),
        (
            ["generate", "hi", "--prefer", "x", "--method", "amulet", "--tau", "1"],
            "--tau belongs to mato, not to amulet",
        ),
        (["generate", "hi", "--alpha", "1"], "--alpha belongs to amulet and mato, not to base"),
        (["generate", "hi", "--method", "mto"], "unknown method 'mto'; methods are trim, base, prompt, "),
        (["generate", "hi", "--method", "mato"], "mato needs at least one objective and was given none"),
        (
            ["generate", "hi", "--method", "base", "--prefer", "x"],
            "base takes no objectives, but was given 'x'",
        ),
        (["generate", " "], "the prompt is empty; ask something"),
        (["generate", "hi", "--dtype", "int3"], "dtype is 'int3'; it must be one of auto, "),
        (["generate", "hi", "--kv-cache-memory", "-5"], "kv_cache_memory is '-5'; it must be a size of"),
        (["generate", "hi", "--n", "1000000000"], "n is 1000000000; it must be an integer from 1 to 128"),
        (["generate", "\udcff"], "the argument '\\udcff' is not valid UTF-8"),
        (["chat", "hi"], "unrecognized arguments: hi; see trimtab chat --help"),
        (["chat", "--n", "2"], "unrecognized arguments: --n 2; see trimtab chat --help"),
        (["compare", "hi"], 'compare needs at least one --prefer "TEXT=WEIGHT"'),
        (["compare", "hi", "--prefer", "x", "--methods", "mto"], "unknown method 'mto'"),
        (["pull", "gpt"], "unknown model 'gpt' to pull; it must be 'demo'"),
        (["info"], "the following arguments are required: MODEL; see trimtab info --help"),
    ],
)
def test_invalid_input_is_one_error_line_and_status_2(
    run: Run, engine: FakeEngine, command: list[str], message: str
) -> None:
    ran = run(*command)
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"trimtab: {message}")
    assert ran.stderr.count("\n") == 1
    assert engine.configs == []


def test_help_and_version_go_to_stdout(run: Run) -> None:
    assert run("--version") == CommandResult(0, f"trimtab {__version__}\n", "")
    for words in ([], ["--help"], ["-h"]):
        ran = run(*words)
        assert (ran.status, ran.stderr) == (0, "")
        assert all(command_name in ran.stdout for command_name in main.COMMANDS)


@pytest.mark.parametrize("command_name", main.COMMANDS)
def test_every_command_has_help(run: Run, monkeypatch: pytest.MonkeyPatch, command_name: str) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    ran = run(command_name, "--help")
    assert (ran.status, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"usage: trimtab {command_name} ")
    assert max(map(len, ran.stdout.splitlines())) <= 100


def test_help_of_generate_is_grouped(run: Run) -> None:
    titles = re.findall(r"^(\w+):$", run("generate", "--help").stdout, re.MULTILINE)
    assert titles == ["options", "method", "sampling", "model", "ray", "output"]


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from trimtab.tools.cli.main import main\n"
        "for command_name in ('', 'generate', 'chat', 'compare', 'pull', 'convert', 'info'):\n"
        "    assert main([command_name, '--help'] if command_name else ['--help']) == 0\n"
        "assert 'torch' not in sys.modules, 'torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


WITHOUT_PYDANTIC = """
import builtins, sys

imported, import_module = set(), builtins.__import__

def record(name, *args, **kwargs):
    imported.add(name.partition(".")[0])
    return import_module(name, *args, **kwargs)

sys.modules["pydantic"], builtins.__import__ = None, record

from trimtab import Engine, Mato, Objective, Request, SamplingParams
from trimtab.engine.server import ServerConfig
from trimtab.tools.cli.main import COMMANDS, main

model = sys.argv[1]
assert ServerConfig(port=1).port == 1
assert all(main([command, "--help"]) == 0 for command in COMMANDS)
engine = Engine.from_pretrained(model, kv_cache_memory="1MiB")
request = Request("Why?", Mato([Objective("Be kind.")]), SamplingParams(max_tokens=2))
assert engine.generate(request).token_ids
assert main(["generate", "Why?", "--model", model, "--max-tokens", "2", "--kv-cache-memory", "1MiB"]) == 0
assert "pydantic" not in imported
assert main(["serve", "--model", model]) == 2
"""


def test_only_the_server_needs_pydantic(tiny_folder: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_PYDANTIC, str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("trimtab: serving needs the package pydantic; pip install 'trimtab[serve]'\n")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (InputError("the model is odd"), 2, "the model is odd"),
        (RunError("no network"), 1, "no network"),
        (RunError("two\nlines"), 1, "two lines"),
        (MemoryError(), 1, "out of memory"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            1,
            "out of memory (CUDA out of memory. ",
        ),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 1, "No such file or directory: 'a/b'"),
        (InputError("escape \x1b[31m"), 2, "escape \\x1b[31m"),
    ],
)
def test_a_failure_to_open_the_model_is_one_error_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, message: str
) -> None:
    monkeypatch.setattr(open_engine, "open_engine", _raise_on_open(error))
    ran = run("generate", "hi")
    assert (ran.status, ran.stdout) == (status, "")
    assert ran.stderr.startswith(f"trimtab: {message}")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), ZeroDivisionError(), AssertionError()])
def test_an_unexpected_error_keeps_its_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(open_engine, "open_engine", _raise_on_open(error))
    with pytest.raises(type(error)):
        run("generate", "hi")


def test_ctrl_c_is_status_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_engine, "open_engine", _raise_on_open(KeyboardInterrupt()))
    assert run("generate", "hi") == CommandResult(130, "", "")


def test_a_closed_pipe_exits_with_status_141_and_no_message() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "trimtab", "generate", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("command", "streams", "status", "message"),
    [
        ("generate -", "<&-", 2, "trimtab: standard input is closed\n"),
        ("chat", "<&-", 2, "trimtab: standard input is closed\n"),
        ("generate ''", "<&-", 2, "trimtab: the prompt is empty; ask something\n"),
        ("--help", ">&-", 1, "trimtab: standard output is closed\n"),
        ("generate hi", ">&-", 1, "trimtab: standard output is closed\n"),
        ("generate ''", "2>&-", 2, ""),
        ("generate hi", "<&- >&- 2>&-", 1, ""),
        ("--help", ">/dev/full", 1, "trimtab: No space left on device\n"),
    ],
)
def test_a_closed_stream_is_an_error_only_if_it_is_needed(
    command: str, streams: str, status: int, message: str
) -> None:
    line = f"{sys.executable} -m trimtab {command} {streams}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", message)


@pytest.mark.parametrize("command_name", ["generate -", "chat", "compare - --prefer x"])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_stdin_that_is_not_utf8_is_one_error_line_in_any_locale(
    command_name: str, locale: str, tiny_folder: Path
) -> None:
    command = [sys.executable, "-m", "trimtab", *command_name.split(), "--model", str(tiny_folder)]
    done = subprocess.run(
        command, input=b"ab\xff\n", capture_output=True, env={**os.environ, "LC_ALL": locale}, check=False
    )
    message = b"trimtab: standard input is not valid UTF-8 (invalid start byte at byte 2)\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", message)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    command_name=st.sampled_from([*main.COMMANDS]),
    words=st.lists(st.sampled_from([*TYPED.split(), "9" * 5000]) | st.text(max_size=5), max_size=6),
)
def test_any_arguments_lead_to_an_answer_or_one_error_line(
    run: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, command_name: str, words: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    if command_name in ("pull", "convert", "info", "serve"):
        words = [*words, "--no-such-flag"]  # they use the disk or the network, and serve does not end
    ran = run(command_name, *words)
    assert ran.status in (0, 2)
    assert (ran.stderr.count("\n"), ran.stdout) == (1, "") if ran.status else not ran.stderr


def test_a_warning_of_trimtab_is_one_note(run: Run, engine: FakeEngine) -> None:
    ran = run("generate", "hi", "--prefer", "x", "--method", "mato", "--alpha", "1.5", "--iterations", "5")
    assert ran.status == 0
    assert ran.stderr.startswith("trimtab: note: mato: alpha=1.5 is above lam=1.0")
    assert ran.stderr.count("\n") == 1


def test_the_same_note_is_shown_once(run: Run, engine: FakeEngine) -> None:
    ran = run("compare", "hi", "--prefer", "x", "--methods", "mato:alpha=1.5,mato:alpha=1.5:tau=2")
    assert (ran.status, ran.stderr.count("note:")) == (0, 1)


def test_warnings_of_other_packages_are_not_prefixed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warning(config: EngineConfig) -> None:
        warnings.warn("from elsewhere", UserWarning, stacklevel=1)
        raise RunError("enough")

    monkeypatch.setattr(open_engine, "open_engine", warning)
    with pytest.warns(UserWarning, match="from elsewhere"):
        ran = run("generate", "hi")
    assert ran == CommandResult(1, "", "trimtab: enough\n")


def test_the_warning_filters_of_the_caller_are_restored(run: Run, engine: FakeEngine) -> None:
    before = list(warnings.filters)
    run("generate", "hi")
    assert list(warnings.filters) == before


def test_a_terminal_without_utf8_gets_backslash_escapes(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = io.BytesIO()
    narrow = io.TextIOWrapper(sent, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    engine.deltas = ["caf", "é"]
    assert main.main(["generate", "hi"]) == 0
    assert sent.getvalue() == b"caf\\xe9\n"


def _raise_on_open(error: BaseException) -> Callable[[EngineConfig], None]:
    def fail(config: EngineConfig) -> None:
        raise error

    return fail
