"""Concurrent use and shutdown of engines from threads, tasks and forked processes: no hangs, no leaks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from trimtab import AsyncEngine, BusyError, Engine, Mato, Objective, Request, RunError, SamplingParams
from trimtab.engine.outputs import Output

from ...harness import get_core, get_thread
from ...helpers.tiny_model import is_idle

OBJECTIVES = [Objective("Be kind."), Objective("Be short.", 2)]


def make_request(n: int, max_tokens: int = 8) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.7, seed=n, ignore_eos=True)
    return Request(f"Why {n}?", Mato(OBJECTIVES), sampling)


def make_async_engine(folder: Path, **fields: Any) -> AsyncEngine:
    return AsyncEngine.from_pretrained(str(folder), kv_cache_memory="1MiB", **fields)


@pytest.fixture(scope="module")
def shared_engine(tiny_folder: Path) -> Iterator[AsyncEngine]:
    engine = make_async_engine(tiny_folder)
    yield engine
    engine.shutdown()
    assert is_idle(engine)
    assert engine.unfinished == 0


@pytest.fixture
def engine(shared_engine: AsyncEngine) -> Iterator[AsyncEngine]:
    """The shared engine, which must still accept requests after the test."""
    yield shared_engine
    assert shared_engine.refusal is None


def run_async(make_coroutine: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(make_coroutine(), 120))


def call_concurrently(*calls: Callable[[], Any]) -> list[Any]:
    """Run the calls in threads that start together; return their results or RunErrors."""
    barrier = threading.Barrier(len(calls))

    def call(function: Callable[[], Any]) -> Any:
        barrier.wait(60)
        try:
            return function()
        except RunError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls, timeout=120))


# Shutdown of engines, event loops and processes.


def test_an_unreferenced_engine_ends_its_thread(tiny_folder: Path) -> None:
    engines = [make_async_engine(tiny_folder)]
    run_async(lambda: engines[0].generate(make_request(0)))
    worker, core = get_thread(engines[0])._thread, weakref.ref(get_core(engines[0]))
    engines.clear()
    end = time.monotonic() + 60
    while (worker.is_alive() or core()) and time.monotonic() < end:
        gc.collect()
        worker.join(0.01)
    assert not worker.is_alive()
    assert core() is None


def test_a_submitted_answer_reaches_its_callback_though_the_engine_is_unreferenced(tiny_folder: Path) -> None:
    futures, finished = list[Future[Output]](), threading.Event()

    def on_done(future: Future[Output]) -> None:
        futures.append(future)
        finished.set()

    make_async_engine(tiny_folder).submit(make_request(0, 100)).add_done_callback(on_done)
    gc.collect()
    assert finished.wait(60)
    assert futures[0].result(0).finish_reason == "length"


SHUTDOWN_PROGRAMS = {
    "at once": "",
    "in a step": "futures = [engine.submit(request(400)) for _ in range(4)]",
    "in a stream": """
async def leave():
    async for _ in engine.stream(request(400)):
        break
asyncio.run(leave())""",
    "from a thread": """
def wait():
    print(len(engine.submit(request(5)).result().token_ids))
threading.Thread(target=wait).start()""",
    "with an exception": "engine.submit(request(400)); sys.exit(3)",
}


QUICK = ("in a step", "from a thread")


@pytest.mark.parametrize(
    "how", [how if how in QUICK else pytest.param(how, marks=pytest.mark.long) for how in SHUTDOWN_PROGRAMS]
)
def test_the_interpreter_ends_with_a_live_engine(tiny_folder: Path, how: str) -> None:
    ended = run_python(
        "engine = AsyncEngine.from_pretrained(sys.argv[1], kv_cache_memory='1MiB')\n"
        "def request(n):\n"
        "    return Request('Why?', sampling=SamplingParams(max_tokens=n, ignore_eos=True))\n"
        + SHUTDOWN_PROGRAMS[how],
        str(tiny_folder),
    )
    assert ended.stderr == ""
    assert ended.returncode == (3 if how == "with an exception" else 0)
    assert how != "from a thread" or ended.stdout == "5\n"


def run_python(code: str, *arguments: str, threads: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a program in a new process; kill it when it hangs."""
    head = (
        "import asyncio, os, sys, threading, torch\n"
        "from trimtab import AsyncEngine, Engine, Request, RunError, SamplingParams\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
    )


FORK_PROGRAM = """
engine = Engine.from_pretrained(sys.argv[1], kv_cache_memory='1MiB')
served = AsyncEngine.from_pretrained(sys.argv[1], kv_cache_memory='1MiB')
request = Request('What happens if an earthworm is cut in half? ' * 5, sampling=SamplingParams(max_tokens=4))
torch.ones(400, 400) @ torch.ones(400, 400)  # starts OpenMP's threads
expected = engine.generate(request).token_ids
sys.stdout.flush()
child = os.fork()
if not child:
    served._thread._submit_lock.acquire()  # as if a thread held it at the fork
    for call in (engine.generate, served.submit, lambda request: engine.score([1, 2])):
        try:
            call(request)
        except RunError as error:
            print(error)
    served.shutdown()
    own = AsyncEngine.from_pretrained(sys.argv[1], kv_cache_memory='1MiB')
    print(own.submit(request).result().token_ids == expected)
    print(Engine.from_pretrained(sys.argv[1]).generate(request).token_ids == expected)
    sys.exit(7)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), engine.generate(request).token_ids == expected)
"""


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_forked_process_cannot_use_its_parents_engine_but_can_build_its_own(
    tiny_folder: Path, threads: int
) -> None:
    ended = run_python(FORK_PROGRAM, str(tiny_folder), threads=threads)
    refusal = "the engine was made before this process was forked; make one in each process"
    assert ended.stdout.splitlines() == [refusal] * 3 + ["True", "True", "7 True"], ended.stderr


def test_closing_an_event_loop_mid_stream_does_not_affect_other_requests(
    engine: AsyncEngine, tiny: Engine
) -> None:
    async def begin() -> Any:
        return await engine.open_stream(make_request(0, 100))

    for _ in range(20):
        pieces = asyncio.run(begin())
    assert (
        run_async(lambda: engine.generate(make_request(1))).token_ids
        == tiny.generate(make_request(1)).token_ids
    )
    pieces.close()


def test_closing_a_stream_ends_the_task_that_reads_it(engine: AsyncEngine) -> None:
    async def leave() -> None:
        pieces = await engine.open_stream(make_request(0, 400))

        async def read() -> int:
            return len([piece async for piece in pieces])

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        pieces.close()
        assert await asyncio.wait_for(reading, 30) < 400

    run_async(leave)


# Scores and futures.


def test_a_cancelled_score_does_not_affect_other_scores(engine: AsyncEngine, tiny: Engine) -> None:
    async def cancel() -> None:
        tasks = [asyncio.create_task(engine.score([5, 6, 7])) for _ in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        scores = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(score, asyncio.CancelledError) for score in scores[::2])
        assert all(score.equal(tiny.score([5, 6, 7])) for score in scores[1::2])

    run_async(cancel)
    assert engine.refusal is None


def test_scores_that_a_closed_engine_has_not_computed_are_refused(tiny_folder: Path) -> None:
    engine = make_async_engine(tiny_folder)

    async def close() -> list[Any]:
        busy = [asyncio.create_task(engine.generate(make_request(n, 100))) for n in range(3)]
        scores = [asyncio.create_task(engine.score([5] * 400)) for _ in range(30)]
        await asyncio.sleep(0.02)
        await engine.close()
        await asyncio.gather(*busy, return_exceptions=True)
        return await asyncio.gather(*scores, return_exceptions=True)

    for score in run_async(close):
        assert not isinstance(score, Exception) or str(score) == "the engine is closed"


def test_a_stop_between_two_reads_of_the_command_queue_is_not_missed(tiny_folder: Path) -> None:
    engine = make_async_engine(tiny_folder)
    entered = threading.Event()

    def ask(_: object) -> None:
        entered.wait(60)
        get_thread(engine)._finalizer()  # its stop command is read together with this one

    get_thread(engine)._commands.put(lambda _: entered.set())
    get_thread(engine)._commands.put(ask)
    get_thread(engine)._thread.join(60)
    assert not get_thread(engine)._thread.is_alive()
    engine.shutdown()


def test_waiting_for_several_futures_ends_when_one_is_cancelled(engine: AsyncEngine) -> None:
    futures = [engine.submit(make_request(n, 5 if n else 400)) for n in range(3)]
    assert futures[0].cancel()
    assert wait(futures, timeout=60).not_done == set()


def test_a_futures_callback_may_submit_again_and_close_the_engine(tiny_folder: Path) -> None:
    engine, done = make_async_engine(tiny_folder), threading.Event()
    second: list[Future[Output]] = []

    def close(_: Future[Output]) -> None:
        engine.shutdown()
        done.set()

    def again(_: Future[Output]) -> None:
        second.append(engine.submit(make_request(1)))
        second[0].add_done_callback(close)

    engine.submit(make_request(0)).add_done_callback(again)
    assert done.wait(60)
    engine.shutdown()
    assert second[0].result(60).finish_reason == "length"


def test_aborted_requests_do_not_count_as_waiting(tiny_folder: Path) -> None:
    engine = make_async_engine(tiny_folder, max_waiting=2, max_num_seqs=3)
    step, go = get_core(engine).step, threading.Event()
    get_core(engine).step = lambda: go.wait(60) and step()  # type: ignore[method-assign,func-returns-value]
    first = engine.submit(make_request(0))
    while not engine.stats.waiting:  # the engine thread has queued it and is about to step
        time.sleep(0.001)
    waiting = engine.submit(make_request(1))
    with pytest.raises(BusyError, match="2 requests are waiting, and max_waiting is 2"):
        engine.submit(make_request(2))
    for _ in range(3):
        asyncio.run(cancel_score(engine))
    waiting.cancel()
    go.set()
    assert first.result(60).finish_reason == "length"
    assert engine.submit(make_request(3)).result(60).finish_reason == "length"
    engine.shutdown()


async def cancel_score(engine: AsyncEngine) -> None:
    with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
        await asyncio.wait_for(engine.score([1]), 0.01)


# Races.


@pytest.mark.parametrize("turn", range(6))
def test_a_request_made_during_shutdown_is_answered_or_refused(tiny_folder: Path, turn: int) -> None:
    engine = make_async_engine(tiny_folder)

    def submit(n: int) -> Callable[[], Any]:
        return lambda: engine.submit(make_request(n), (None, 0.001)[n % 2])

    def score() -> Any:
        return run_async(lambda: engine.score([5, 6]))

    calls = [*map(submit, range(6)), score, score, engine.shutdown, engine.shutdown]
    random.Random(turn).shuffle(calls)
    for result in call_concurrently(*calls):
        if isinstance(result, Future):
            assert result.result(60).finish_reason in ("length", "abort")
        elif isinstance(result, RunError):
            assert "closed" in str(result)
    assert is_idle(engine)
    assert engine.unfinished == 0


@pytest.mark.parametrize("turn", range(12))
def test_cancelling_at_the_end_of_an_answer_gives_either_the_answer_or_the_cancellation(
    shared_engine: AsyncEngine, turn: int
) -> None:
    future = shared_engine.submit(make_request(turn, 1 + turn % 3))
    time.sleep(0.001 * turn)
    cancelled, again = call_concurrently(future.cancel, future.cancel)
    assert cancelled == again == future.cancelled()
    assert cancelled or future.result(60).finish_reason == "length"


def test_two_engines_in_two_threads_answer_as_alone(tiny_folder: Path, tiny: Engine) -> None:
    requests = [make_request(n) for n in range(8)]
    expected = [(output.token_ids, output.trace) for output in tiny.generate(requests)]
    engines = [Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB") for _ in range(2)]

    def answers(engine: Engine) -> list[Any]:
        return [(output.token_ids, output.trace) for _ in range(3) for output in engine.generate(requests)]

    for actual in call_concurrently(*(lambda engine=engine: answers(engine) for engine in engines)):  # type: ignore[misc]
        assert actual == expected * 3
