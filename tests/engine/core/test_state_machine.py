"""Stateful property tests: random orders of engine calls against a model of their results."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from trimtab import AsyncEngine, Engine, InputError, Request, RunError
from trimtab.engine.core.request_handle import OutputStream
from trimtab.engine.outputs import Delta, Output

from ...harness import get_scheduler, set_async_scheduling
from ...helpers.random_requests import random_request
from ...helpers.simulated_kv_cache import check_blocks
from ...helpers.tiny_model import is_idle

REQUESTS = [random_request(random.Random(seed)) for seed in range(40, 52)]
REQUEST_INDEX = st.integers(0, len(REQUESTS) - 1)
ENGINE_INDEX = st.integers(0, 1)
SMALL_ENGINE: dict[str, Any] = {"kv_cache_memory": 130 * 3072, "block_size": 16, "max_num_batched_tokens": 64}
QUICK = settings(
    max_examples=8,
    stateful_step_count=15,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@cache
def answers_alone(folder: Path) -> list[list[list[int]]]:
    """Tokens of each request's answers, each request run alone."""
    engine = Engine.from_pretrained(str(folder), kv_cache_memory="2MiB", block_size=16)
    return [token_ids(engine.generate(request)) for request in REQUESTS]


def token_ids(output: Output) -> list[list[int]]:
    return [each.token_ids for each in output.outputs]


class SyncEngineMachine(RuleBasedStateMachine):
    """Two engines: lists, streams read alternately or left, scores, invalid requests."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.expected = answers_alone(folder)
        self.engines = [Engine.from_pretrained(str(folder), **SMALL_ENGINE) for _ in range(2)]
        set_async_scheduling(self.engines[1])
        self.streams: list[tuple[Iterator[Delta], int, list[list[int]]]] = []

    @rule(one=ENGINE_INDEX, which=st.lists(REQUEST_INDEX, max_size=5))
    def generate(self, one: int, which: list[int]) -> None:
        outputs = self.engines[one].generate([REQUESTS[at] for at in which])
        assert [token_ids(output) for output in outputs] == [self.expected[at] for at in which]

    @rule(one=ENGINE_INDEX, at=REQUEST_INDEX)
    def begin(self, one: int, at: int) -> None:
        self.streams.append((self.engines[one].stream(REQUESTS[at]), at, [[] for _ in self.expected[at]]))

    @precondition(lambda self: self.streams)
    @rule(choose=st.randoms(use_true_random=False), pieces=st.integers(1, 6))
    def read(self, choose: random.Random, pieces: int) -> None:
        stream, at, token_ids_read = choose.choice(self.streams)
        for _ in range(pieces):
            delta = next(stream, None)
            if delta is None:
                assert token_ids_read == self.expected[at]
                self.streams = [each for each in self.streams if each[0] is not stream]
                return
            token_ids_read[delta.index] += delta.token_ids
        assert [
            expected_text[: len(part)]
            for part, expected_text in zip(token_ids_read, self.expected[at], strict=True)
        ] == token_ids_read

    @precondition(lambda self: self.streams)
    @rule(choose=st.randoms(use_true_random=False))
    def leave(self, choose: random.Random) -> None:
        self.streams.pop(choose.randrange(len(self.streams)))

    @rule(count=st.integers(1, 60))
    def score(self, count: int) -> None:
        first, second = (engine.score([5] * count) for engine in self.engines)
        assert first.equal(second)

    @rule(one=ENGINE_INDEX)
    def generate_invalid(self, one: int) -> None:
        with pytest.raises(InputError):
            self.engines[one].score([])
        with pytest.raises(InputError):
            self.engines[one].generate(Request(branch_token_ids=[[10**6]]))

    @invariant()
    def check_blocks(self) -> None:
        for engine in self.engines:
            scheduler = get_scheduler(engine)
            check_blocks(scheduler.block_manager, scheduler.running)
            if not self.streams:
                assert is_idle(engine)

    def teardown(self) -> None:
        self.streams.clear()
        assert all(map(is_idle, self.engines))


class AsyncEngineMachine(RuleBasedStateMachine):
    """One AsyncEngine, called from a thread and from tasks of another event loop; open, drained, closed."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.expected = answers_alone(folder)
        self.engine = AsyncEngine.from_pretrained(str(folder), **SMALL_ENGINE)
        set_async_scheduling(self.engine)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.refusal: str | None = None
        self.closed = False
        self.pending: list[tuple[Future[Output], int, bool]] = []
        self.streams: list[OutputStream] = []

    def run_task(self, what: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(60)

    @rule(at=REQUEST_INDEX, late=st.booleans(), task=st.booleans())
    def ask(self, at: int, late: bool, task: bool) -> None:
        timeout = 0.002 if late else None
        if task:
            work = self.engine.generate(REQUESTS[at], timeout)
            self.pending.append((asyncio.run_coroutine_threadsafe(work, self.loop), at, late))
        elif self.refusal:
            with pytest.raises(RunError, match=self.refusal):
                self.engine.submit(REQUESTS[at], timeout)
        else:
            self.pending.append((self.engine.submit(REQUESTS[at], timeout), at, late))

    @rule(at=REQUEST_INDEX)
    def begin(self, at: int) -> None:
        if self.refusal:
            with pytest.raises(RunError, match=self.refusal):
                self.run_task(self.engine.open_stream(REQUESTS[at]))
        else:
            self.streams.append(self.run_task(self.engine.open_stream(REQUESTS[at])))

    @precondition(lambda self: self.streams)
    @rule(pieces=st.integers(0, 3))
    def leave(self, pieces: int) -> None:
        async def read() -> None:
            stream = self.streams.pop()
            for _ in range(pieces):
                await anext(stream, None)  # type: ignore[call-overload]
            stream.close()
            assert [piece async for piece in stream] == []

        self.run_task(read())

    @precondition(lambda self: self.pending)
    @rule(choose=st.randoms(use_true_random=False))
    def cancel(self, choose: random.Random) -> None:
        future, *_ = choose.choice(self.pending)
        future.cancel()

    @rule(count=st.integers(1, 40))
    def score(self, count: int) -> None:
        if self.refusal:
            with pytest.raises(RunError, match=self.refusal):
                self.run_task(self.engine.score([5] * count))
        else:
            assert len(self.run_task(self.engine.score([5] * count))) == count

    @precondition(lambda self: self.pending)
    @rule()
    def result(self) -> None:
        future, at, late = self.pending.pop()
        try:
            output = future.result(60)
        except CancelledError:
            assert future.cancelled()
        except RunError as error:  # refused after this model accepted it
            assert self.refusal
            assert "closed" in str(error) or "draining" in str(error)  # noqa: PT017 - either reason is correct
        else:
            for tokens, expected_tokens in zip(token_ids(output), self.expected[at], strict=True):
                assert tokens == expected_tokens[: len(tokens)]
            ended = "abort" not in {each.finish_reason for each in output.outputs}
            assert ended or late or self.closed
            assert not ended or token_ids(output) == self.expected[at]

    @rule()
    def drain(self) -> None:
        for stream in self.streams:
            stream.close()
        self.streams.clear()
        self.run_task(self.engine.drain())
        self.refusal = self.refusal or "draining"

    @rule(task=st.booleans())
    def close(self, task: bool) -> None:
        self.run_task(self.engine.close()) if task else self.engine.shutdown()
        self.refusal, self.closed = "closed", True
        assert is_idle(self.engine)

    def teardown(self) -> None:
        self.close(task=False)
        while self.pending:
            self.result()
        self.run_task(self.drain_tasks())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(60)
        self.loop.close()
        assert self.engine.unfinished == 0

    async def drain_tasks(self) -> None:
        """Wait for all other tasks of the loop: one cancelled at once may not have started yet."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)


MACHINES = pytest.mark.parametrize("machine", [SyncEngineMachine, AsyncEngineMachine])


@MACHINES
def test_any_order_of_calls_gives_the_expected_answers(machine: type[Any], tiny_folder: Path) -> None:
    run_state_machine_as_test(partial(machine, tiny_folder), settings=QUICK)


@pytest.mark.long
@MACHINES
def test_hundreds_of_orders_of_calls_give_the_expected_answers(machine: type[Any], tiny_folder: Path) -> None:
    many = settings(QUICK, max_examples=150, stateful_step_count=40)
    run_state_machine_as_test(partial(machine, tiny_folder), settings=many)
