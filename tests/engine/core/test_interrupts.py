"""Interrupts at any line of a step: later answers are unchanged."""

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

from ...harness import get_block_manager, get_core, set_async_scheduling
from ...helpers.simulated_kv_cache import check_blocks
from ...helpers.tiny_model import is_idle
from .test_concurrency import OBJECTIVES, make_request

PACKAGE = Path(trimtab.__file__).parent


class InterruptedEngine:
    """An engine whose steps can be interrupted at any executed line.

    looks_ahead: use async scheduling, so that the next step may be in flight.
    """

    def __init__(self, folder: Path, looks_ahead: bool = False) -> None:
        cache_bytes = 26 * 3072  # too few blocks for all requests
        self.engine = Engine.from_pretrained(str(folder), kv_cache_memory=cache_bytes, block_size=16)
        set_async_scheduling(self.engine, looks_ahead)
        sampling = [SamplingParams(max_tokens=12, temperature=1.0, seed=n) for n in range(4)]
        self.requests = [Request("Why? " * 6, Mato(OBJECTIVES), each) for each in sampling]
        self.expected = self.answers()
        assert self.engine.stats.preemptions

    def answers(self) -> list[Any]:
        return [(output.token_ids, output.trace) for output in self.engine.generate(self.requests)]

    def interrupt_at(self, line_number: int) -> int:
        """Run all requests, interrupted at this executed line of the steps. Return the line count."""
        count, core = 0, get_core(self.engine)
        step = core.step

        def trace_line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal count
            count += event == "line"
            if count == line_number and event == "line":
                raise KeyboardInterrupt
            return trace_line

        def trace_call(frame: FrameType, event: str, argument: Any) -> Any:
            name = Path(frame.f_code.co_filename)
            return trace_line if PACKAGE in name.parents and "tests" not in name.parts else None

        def run_traced() -> None:
            sys.settrace(trace_call)
            try:
                step()
            finally:
                sys.settrace(None)

        core.step = run_traced  # type: ignore[method-assign]
        try:
            self.answers()
        finally:
            core.step = step  # type: ignore[method-assign]
        return count

    def check(self, line_number: int) -> None:
        with pytest.raises(KeyboardInterrupt):
            self.interrupt_at(line_number)
        assert is_idle(self.engine), line_number
        check_blocks(get_block_manager(self.engine), [])
        assert self.answers() == self.expected, line_number


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_a_step_may_be_interrupted_at_any_line(tiny_folder: Path, looks_ahead: bool) -> None:
    interrupted = InterruptedEngine(tiny_folder, looks_ahead)
    total = interrupted.interrupt_at(-1)
    for at in random.Random(1).sample(range(1, total), 6):
        interrupted.check(at)


@pytest.mark.long
@pytest.mark.parametrize("looks_ahead", [False, True])
def test_a_step_may_be_interrupted_at_each_of_a_thousand_lines(tiny_folder: Path, looks_ahead: bool) -> None:
    interrupted = InterruptedEngine(tiny_folder, looks_ahead)
    total = interrupted.interrupt_at(-1)
    for at in range(1, total, total // 1000):
        interrupted.check(at)


def test_an_interrupted_step_ends_the_other_streams_with_an_error(tiny_folder: Path) -> None:
    interrupted = InterruptedEngine(tiny_folder)
    stream = interrupted.engine.stream(make_request(0, 60))
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        interrupted.interrupt_at(2000)
    *_, last = stream
    assert last.output is not None
    assert (last.output.finish_reason, last.output.error) == (
        "error",
        "a step of the engine failed: KeyboardInterrupt",
    )
    assert is_idle(interrupted.engine)


@pytest.mark.usefixtures("gc_disabled")
def test_an_engine_still_answers_after_ctrl_c(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB")
    expected = engine.generate(make_request(0)).token_ids
    for turn in range(5):
        timer = threading.Timer(0.02 + 0.005 * turn, signal.raise_signal, (signal.SIGINT,))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            engine.generate([make_request(n, 400) for n in range(8)])
        timer.join()
        assert is_idle(engine)
        assert engine.generate(make_request(0)).token_ids == expected
