"""AsyncEngine: concurrent requests from tasks and threads, cancellation, failures, shutdown."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
from trimtab import AsyncEngine, BusyError, Engine, InputError, Mato, Objective, Request, RunError
from trimtab.engine import Amulet, Base, SamplingParams
from trimtab.engine.outputs import Output

from ..harness import get_runner, set_async_scheduling
from ..helpers.polling import wait_until
from ..helpers.tiny_model import is_idle

KIND, SHORT = Objective("Be kind."), Objective("Be short.", 2)
METHODS = (Base(), Amulet([KIND]), Mato([KIND, SHORT]))


@pytest.fixture(params=[False, True], ids=["", "looks ahead"])
def engine(tiny_folder: Path, request: pytest.FixtureRequest) -> Iterator[AsyncEngine]:
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB", max_num_seqs=12)
    set_async_scheduling(engine, request.param)
    yield engine
    engine.shutdown()
    assert is_idle(engine)
    assert engine.unfinished == 0


def make_request(n: int, max_tokens: int = 12) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.7, seed=n, ignore_eos=True)
    return Request(f"Why {n}?", METHODS[n % 3], sampling)


def run_async(make_coroutine: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(make_coroutine(), 120))  # type: ignore[arg-type]


def test_concurrent_tasks_get_the_answers_of_a_list(engine: AsyncEngine, tiny: Engine) -> None:
    requests = [make_request(n) for n in range(9)]

    async def all_at_once() -> list[Output]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    for output, expected in zip(run_async(all_at_once), tiny.generate(requests), strict=True):
        assert (output.token_ids, output.text, output.trace) == (
            expected.token_ids,
            expected.text,
            expected.trace,
        )
        assert output.outputs[0].token_ids == output.token_ids


def test_a_stream_joins_to_its_answer_and_deltas_name_their_sample(engine: AsyncEngine) -> None:
    request = Request("Why?", sampling=SamplingParams(n=3, max_tokens=7, temperature=1.0, seed=5))

    async def read() -> None:
        texts, outputs = ["", "", ""], {}
        async for delta in engine.stream(request):
            texts[delta.index] += delta.text
            if delta.output:
                outputs[delta.index] = delta.output
        assert [outputs[index].text for index in range(3)] == texts

    run_async(read)


def test_leaving_the_loop_frees_everything_within_a_step(engine: AsyncEngine) -> None:
    async def leave() -> None:
        stream = engine.stream(make_request(2, max_tokens=300))
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        other = await engine.generate(make_request(1, max_tokens=3))
        assert other.finish_reason == "length"
        assert engine.unfinished == 0

    run_async(leave)


def test_cancelling_the_task_aborts_the_request(engine: AsyncEngine) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(engine.generate(make_request(2, max_tokens=300)))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.drain()
        assert engine.unfinished == 0

    run_async(cancel)


def test_a_timeout_ends_the_answer_with_its_tokens_so_far(engine: AsyncEngine) -> None:
    output = run_async(lambda: engine.generate(make_request(2, max_tokens=400), timeout=0.3))
    assert output.finish_reason == "abort"
    assert output.error == "the request's timeout of 0.3 s has passed"
    assert 0 < len(output.token_ids) < 400
    assert output.trace is not None
    assert len(output.trace.weights) == len(output.token_ids)


@pytest.mark.parametrize(("timeout", "tokens", "expired"), [(0.3, 400, True), (300.0, 4, False)])
def test_a_stream_says_whether_its_deadline_ended_it(
    engine: AsyncEngine, timeout: float, tokens: int, expired: bool
) -> None:
    async def read() -> bool:
        pieces = await engine.open_stream(make_request(2, max_tokens=tokens), timeout)
        assert not pieces.expired
        async for _ in pieces:
            pass
        return pieces.expired

    assert run_async(read) is expired


def test_threads_may_submit_and_cancel(engine: AsyncEngine, tiny: Engine) -> None:
    expected = tiny.generate([make_request(n) for n in range(6)])
    outputs: dict[int, Output] = {}
    gone = engine.submit(make_request(2, max_tokens=400))

    def ask(n: int) -> None:
        outputs[n] = engine.submit(make_request(n)).result(60)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    assert gone.cancel()
    for thread in threads:
        thread.join(60)
    assert [outputs[n].token_ids for n in range(6)] == [output.token_ids for output in expected]
    with pytest.raises(CancelledError):
        gone.result(1)


def test_an_invalid_request_raises_at_its_caller(engine: AsyncEngine) -> None:
    async def ask() -> list[Any]:
        wrong = Request(branch_token_ids=[[10**6]])
        return await asyncio.gather(
            engine.generate(wrong), engine.generate(make_request(0)), return_exceptions=True
        )

    refused, answered = run_async(ask)
    assert isinstance(refused, InputError)
    assert answered.finish_reason == "length"
    with pytest.raises(InputError, match="timeout is 0; it must be a number of seconds above 0"):
        run_async(lambda: engine.generate(make_request(0), timeout=0))


def test_too_many_waiting_are_refused_with_the_numbers(tiny_folder: Path) -> None:
    engine = AsyncEngine.from_pretrained(
        str(tiny_folder), kv_cache_memory="2MiB", max_num_seqs=3, max_waiting=2
    )
    futures = [engine.submit(make_request(2, max_tokens=200))]
    wait_until(lambda: engine.stats.running)
    futures += [engine.submit(make_request(2)) for _ in range(2)]
    with pytest.raises(BusyError, match="2 requests are waiting, and max_waiting is 2"):
        engine.submit(make_request(2))
    assert [future.result(60).finish_reason for future in futures] == ["length"] * 3
    engine.shutdown()


def test_a_failed_step_fails_running_requests_with_the_cause_and_the_next_request_is_served(
    engine: AsyncEngine,
) -> None:
    forward, broken = get_runner(engine).model.forward, threading.Event()

    def break_once(*arguments: Any) -> Any:
        if not broken.is_set():
            broken.set()
            raise ZeroDivisionError("by design")
        return forward(*arguments)

    get_runner(engine).model.forward = break_once  # type: ignore[method-assign]

    async def ask() -> list[Any]:
        return await asyncio.gather(
            *(engine.generate(make_request(n)) for n in range(3)), return_exceptions=True
        )

    failed = run_async(ask)
    assert any(isinstance(one, RunError) and "ZeroDivisionError: by design" in str(one) for one in failed)
    assert run_async(lambda: engine.generate(make_request(0))).finish_reason == "length"


def test_a_detokenizer_failure_fails_its_own_answer(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.engine.sequence.output_processor import OutputState  # noqa: PLC0415

    append = OutputState.append

    def broken(self: OutputState, pick: Any, limit: int) -> str:
        if limit == 5:
            raise ZeroDivisionError("by design")
        return append(self, pick, limit)

    monkeypatch.setattr(OutputState, "append", broken)

    async def ask() -> list[Output]:
        return await asyncio.gather(engine.generate(make_request(0, 5)), engine.generate(make_request(1, 6)))

    bad, good = run_async(ask)
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
    assert bad.error == "the answer's text failed: ZeroDivisionError: by design"


def test_a_closed_engine_aborts_running_requests_and_refuses_new_ones(tiny_folder: Path) -> None:
    async def close() -> None:
        engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB")
        async with engine:
            task = asyncio.create_task(engine.generate(make_request(2, max_tokens=400)))
            await asyncio.sleep(0.2)
        output = await task
        assert (output.finish_reason, output.error) == ("abort", "the engine was closed")
        with pytest.raises(RunError, match="the engine is closed"):
            await engine.generate(make_request(0))
        await engine.close()

    run_async(close)


def test_a_draining_engine_finishes_its_requests_and_refuses_new_ones(engine: AsyncEngine) -> None:
    async def drain() -> None:
        task = asyncio.create_task(engine.generate(make_request(2)))
        while not engine.unfinished:
            await asyncio.sleep(0.01)
        await engine.drain()
        with pytest.raises(RunError, match="draining"):
            await engine.generate(make_request(0))
        assert (await task).finish_reason == "length"

    run_async(drain)


def test_scores_equal_those_of_the_synchronous_engine(engine: AsyncEngine, tiny: Engine) -> None:
    assert run_async(lambda: engine.score([5, 6, 7])).equal(tiny.score([5, 6, 7]))
