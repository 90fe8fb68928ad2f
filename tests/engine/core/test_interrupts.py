"""Interrupts at any moment of a step: the engine answers afterwards as if nothing had been."""

from __future__ import annotations

import random
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trimtab
from trimtab import Engine, Mato, Request, SamplingParams

from ...helpers.simulated_kv_cache import check_pages
from ...helpers.tiny_model import at_rest
from .test_concurrency import WISHES, asked

PACKAGE = Path(trimtab.__file__).parent


class Interrupted:
    """An engine of which a step is interrupted at a line, any that is run in one.

    looks_ahead: whether the step after it is on its way then.
    """

    def __init__(self, folder: Path, looks_ahead: bool = False) -> None:
        pages = 26 * 3072  # too few for all
        self.engine = Engine.from_pretrained(str(folder), kv_cache_memory=pages, block_size=16)
        self.engine._core.looks_ahead = looks_ahead
        sampling = [SamplingParams(max_tokens=12, temperature=1.0, seed=n) for n in range(4)]
        self.requests = [Request("Why? " * 6, Mato(WISHES), each) for each in sampling]
        self.expected = self.answers()
        assert self.engine.stats.preemptions

    def answers(self) -> list[Any]:
        return [(output.token_ids, output.trace) for output in self.engine.generate(self.requests)]

    def lines(self, at: int) -> int:
        """Answers, and is interrupted at that line of all that the steps run; how many there were."""
        count, core = 0, self.engine._core
        step = core.step

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal count
            count += event == "line"
            if count == at and event == "line":
                raise KeyboardInterrupt
            return line

        def call(frame: FrameType, event: str, argument: Any) -> Any:
            name = Path(frame.f_code.co_filename)
            return line if PACKAGE in name.parents and "tests" not in name.parts else None

        def traced() -> None:
            sys.settrace(call)
            try:
                step()
            finally:
                sys.settrace(None)

        core.step = traced  # type: ignore[method-assign]
        try:
            self.answers()
        finally:
            core.step = step  # type: ignore[method-assign]
        return count

    def check(self, at: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            self.lines(at)
        assert at_rest(self.engine), at
        check_pages(self.engine._core.scheduler.blocks, [])
        assert self.answers() == self.expected, at


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_a_step_may_be_interrupted_anywhere(tiny_folder: Path, looks_ahead: bool) -> None:
    interrupted = Interrupted(tiny_folder, looks_ahead)
    total = interrupted.lines(-1)
    for at in random.Random(1).sample(range(1, total), 6):
        interrupted.check(at)


@pytest.mark.long
@pytest.mark.parametrize("looks_ahead", [False, True])
def test_a_step_may_be_interrupted_at_a_thousand_lines(tiny_folder: Path, looks_ahead: bool) -> None:
    interrupted = Interrupted(tiny_folder, looks_ahead)
    total = interrupted.lines(-1)
    for at in range(1, total, total // 1000):
        interrupted.check(at)


def test_other_streams_hear_of_an_interrupted_step(tiny_folder: Path) -> None:
    interrupted = Interrupted(tiny_folder)
    stream = interrupted.engine.stream(asked(0, 60))
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        interrupted.lines(2000)
    *_, last = stream
    assert last.output is not None
    assert (last.output.finish_reason, last.output.error) == (
        "error",
        "a step of the engine failed: KeyboardInterrupt",
    )
    assert at_rest(interrupted.engine)


@pytest.mark.usefixtures("uncollected")
def test_ctrl_c_leaves_an_engine_that_answers(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB")
    expected = engine.generate(asked(0)).token_ids
    for turn in range(5):
        timer = threading.Timer(0.02 + 0.005 * turn, signal.raise_signal, (signal.SIGINT,))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            engine.generate([asked(n, 400) for n in range(8)])
        timer.join()
        assert at_rest(engine)
        assert engine.generate(asked(0)).token_ids == expected
