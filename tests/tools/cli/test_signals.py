"""SIGINT and SIGTERM handling, also during an import."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from trimtab.tools.cli.signals import terminable

if TYPE_CHECKING:
    from pathlib import Path

BOTH = pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
IMPORTS = "from trimtab.tools.cli.signals import terminable\nwith terminable():\n    import dropping\n"
DROPPING = """
import signal
try:
    signal.raise_signal({})
except BaseException:
    pass
print("it went on")
"""


@BOTH
def test_a_signal_raises_an_exception_and_the_handler_is_restored(
    number: signal.Signals, raised: type[BaseException]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(raised), terminable():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


@BOTH
def test_a_signal_swallowed_by_an_import_still_ends_the_program(
    number: signal.Signals, raised: type[BaseException], tmp_path: Path
) -> None:
    (tmp_path / "dropping.py").write_text(DROPPING.format(int(number)))
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", "")


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with terminable():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_installs_no_signal_handlers() -> None:
    before, handlers = signal.getsignal(signal.SIGTERM), []

    def look() -> None:
        with terminable():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [before]
