"""Failures of a step, device, callback or tokenizer: error reports, and isolation of other requests."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from trimtab import AsyncEngine, Engine, Mato, Objective, Request, RunError
from trimtab.engine import SamplingParams
from trimtab.engine.outputs import Output

from ...harness import get_core, get_runner
from ...helpers.tiny_model import is_idle

OBJECTIVES = (Objective("Be kind."), Objective("Be short.", 2))


@pytest.fixture
def engine(tiny_folder: Path) -> Iterator[AsyncEngine]:
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB", max_num_seqs=9)
    yield engine
    engine.shutdown()
    assert is_idle(engine)
    assert engine.unfinished == 0


def make_request(text: str = "Why?", max_tokens: int = 8, **sampling: Any) -> Request:
    return Request(text, Mato(OBJECTIVES), SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling))


def same_output(a: Output, b: Output) -> bool:
    return (a.token_ids, a.text, a.trace) == (b.token_ids, b.text, b.trace)


class FailingCall:
    """Wrap a method of the engine and raise an error at its `nth_call`."""

    def __init__(self, owner: Any, name: str, error: BaseException, nth_call: int = 1) -> None:
        self._call, self._error, self._calls_left = getattr(owner, name), error, nth_call
        setattr(owner, name, self)

    def __call__(self, *arguments: Any, **kwargs: Any) -> Any:
        self._calls_left -= 1
        if not self._calls_left:
            raise self._error
        return self._call(*arguments, **kwargs)


STEP_STAGES: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "schedule": lambda core: (core.scheduler, "schedule"),
    "add_request": lambda core: (core.runner, "add_request"),
    "swap_blocks": lambda core: (core.runner.cache, "swap_blocks"),
    "zero_blocks": lambda core: (core.runner.cache, "zero_blocks"),
    "forward": lambda core: (core.runner.model, "forward"),
    "lm_head": lambda core: (core.runner.model.lm_head, "_linear"),
    "sample": lambda core: (core.runner, "sample"),
    "mark_computed": lambda core: (core.scheduler, "mark_computed"),
}


@pytest.mark.parametrize("stage", STEP_STAGES)
def test_wherever_a_step_fails_running_requests_get_the_reason_and_waiting_ones_are_answered(
    stage: str, engine: AsyncEngine, tiny: Engine
) -> None:
    """Five requests of three branches each, three running at once."""
    requests = [make_request(f"Why {n}?", 5) for n in range(5)]
    expected = tiny.generate(requests)
    FailingCall(*STEP_STAGES[stage](get_core(engine)), ZeroDivisionError("by\ndesign"), nth_call=2)
    futures = [engine.submit(request) for request in requests]
    wait(futures, 60)
    failed = [future for future in futures if future.exception()]
    assert 1 <= len(failed) <= 3
    for future in failed:
        assert isinstance(future.exception(), RunError)
        assert str(future.exception()) == "a step of the engine failed: ZeroDivisionError: by design"
    for future, right in zip(futures, expected, strict=True):
        assert future in failed or same_output(future.result(), right)
    assert is_idle(engine)
    again = [engine.submit(request).result(60) for request in requests]
    assert all(same_output(one, right) for one, right in zip(again, expected, strict=True))


@pytest.mark.parametrize("stage", STEP_STAGES)
def test_a_failed_step_ends_other_streams_with_the_reason_and_leaves_the_engine_idle(
    stage: str, tiny_folder: Path, tiny: Engine
) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB", max_num_seqs=9)
    stream = engine.stream(make_request("Why 1?", 30))
    next(stream)
    FailingCall(*STEP_STAGES[stage](get_core(engine)), KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.generate(make_request("Why 2?"))
    output = [delta.output for delta in stream][-1]
    assert output is not None
    assert (output.finish_reason, len(output.token_ids)) == ("error", 1)
    assert output.error == "a step of the engine failed: KeyboardInterrupt"
    assert is_idle(engine)
    assert same_output(engine.generate(make_request("Why 2?")), tiny.generate(make_request("Why 2?")))


def test_blocks_that_a_failed_step_did_not_move_are_not_reused_as_cached(tiny_folder: Path) -> None:
    """The first of the long requests to end leave a hole; the next step moves the blocks behind it."""
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB", max_num_seqs=9)
    long = [Request(f"{n} " * 100, sampling=SamplingParams(max_tokens=3 + 9 * n)) for n in range(3)]
    right = [engine.generate(request) for request in long]
    moves: list[Any] = []

    def fail(pairs: Any) -> None:
        if pairs and not moves:
            moves.extend(pairs)
            raise OSError("a cable is loose")
        swap(pairs)

    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB", max_num_seqs=9)
    swap, get_runner(engine).cache.swap_blocks = get_runner(engine).cache.swap_blocks, fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="a cable is loose"):
        engine.generate(long)
    assert moves
    assert is_idle(engine)
    assert all(same_output(one, other) for one, other in zip(engine.generate(long), right, strict=True))


def test_a_stored_error_does_not_keep_the_steps_tensors_alive(engine: AsyncEngine) -> None:
    """On a GPU that is out of memory, the next step needs the memory of the failed one."""
    taken: list[weakref.ref[torch.Tensor]] = []

    def forward(*arguments: Any) -> Any:
        tensor = torch.zeros(1000)
        taken.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    model = get_runner(engine).model
    original_forward, model.forward = model.forward, forward  # type: ignore[method-assign]
    failed = engine.submit(make_request())
    reason = failed.exception(60)
    message = "a step of the engine failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert str(reason) == message
    model.forward = original_forward  # type: ignore[method-assign]
    assert engine.submit(make_request()).result(60).finish_reason == "length"
    gc.collect()
    assert taken
    assert reason is failed.exception()
    assert taken[0]() is None


@pytest.mark.parametrize("stage", ["compute_num_kv_blocks", "ModelRunner"])
def test_running_out_of_memory_at_startup_is_one_sentence(
    stage: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr(f"trimtab.engine.core.builder.{stage}", fail)
    with pytest.raises(RunError, match=r"cpu is out of memory: .* Tried to allocate 2 GiB\.; lower"):
        Engine.from_pretrained(str(tiny_folder))


def test_running_out_of_memory_while_scoring_is_one_sentence(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr(get_runner(tiny), "make_cache", fail)
    with pytest.raises(RunError, match=r"cpu is out of memory: .* 2 GiB\.; score fewer tokens at once"):
        tiny.score([1, 2, 3])


def test_an_engine_stays_unhealthy_until_a_probe_token_succeeds(engine: AsyncEngine) -> None:
    model = get_runner(engine).model
    forward = model.forward

    def fail(*arguments: Any) -> Any:
        raise OSError("the device is lost")

    assert asyncio.run(engine.health_error()) is None
    model.forward = fail  # type: ignore[method-assign]
    assert asyncio.run(engine.health_error()) is None  # no step has failed yet
    assert engine.submit(make_request()).exception(60)
    for _ in range(2):
        assert (
            asyncio.run(engine.health_error()) == "a step of the engine failed: OSError: the device is lost"
        )
    model.forward = forward  # type: ignore[method-assign]
    assert asyncio.run(engine.health_error()) is None
    assert get_runner(engine).steps == 1
    assert asyncio.run(engine.health_error()) is None
    assert get_runner(engine).steps == 1, "a probe runs only after a failure"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_worker_breaks_fails_waiting_requests_and_refuses_new_ones(
    tiny_folder: Path,
) -> None:
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB", max_num_seqs=3)
    entered, go = threading.Event(), threading.Event()

    def end(*arguments: Any) -> Any:
        entered.set()
        go.wait(60)
        raise SystemExit("by design")

    get_runner(engine).model.forward = end  # type: ignore[method-assign]

    async def ask() -> list[Any]:
        futures = [asyncio.wrap_future(engine.submit(make_request(f"{n}"))) for n in range(2)]
        await asyncio.to_thread(entered.wait, 60)
        late = asyncio.wrap_future(engine.submit(make_request("late")))
        score = asyncio.create_task(engine.score([1, 2]))
        await asyncio.sleep(0)
        go.set()
        return await asyncio.gather(*futures, late, score, return_exceptions=True)

    *requests, score = asyncio.run(asyncio.wait_for(ask(), 60))
    assert [str(each) for each in requests] == ["a step of the engine failed: SystemExit: by design"] * 3
    assert str(score) == "the engine broke: SystemExit: by design" == asyncio.run(engine.health_error())
    with pytest.raises(RunError, match="the engine broke: SystemExit: by design"):
        engine.submit(make_request())
    engine.shutdown()


def test_a_score_that_waits_when_the_engine_closes_is_refused(engine: AsyncEngine) -> None:
    entered, go, step = threading.Event(), threading.Event(), get_core(engine).step

    def slow() -> None:
        entered.set()
        go.wait(60)
        step()

    get_core(engine).step = slow  # type: ignore[method-assign]

    async def ask() -> Any:
        future = engine.submit(make_request())
        await asyncio.to_thread(entered.wait, 60)
        score = asyncio.create_task(engine.score([1, 2]))
        await asyncio.sleep(0)
        closing = asyncio.create_task(engine.close())
        while not engine.refusal:
            await asyncio.sleep(0.01)
        go.set()
        await closing
        return [await asyncio.wrap_future(future), *await asyncio.gather(score, return_exceptions=True)]

    output, score = asyncio.run(asyncio.wait_for(ask(), 60))
    assert (output.finish_reason, output.error) == ("abort", "the engine was closed")
    assert isinstance(score, RunError)
    assert str(score) == "the engine is closed"


def test_a_reader_with_a_closed_event_loop_does_not_block_other_requests(
    engine: AsyncEngine, tiny: Engine
) -> None:
    """Its event loop ends with the stream neither read nor closed."""
    abandoned = asyncio.run(asyncio.wait_for(engine.open_stream(make_request("Who reads?", 40)), 60))
    other = engine.submit(make_request()).result(60)
    assert same_output(other, tiny.generate(make_request()))
    abandoned.close()


def test_a_callback_that_raises_does_not_affect_other_requests(engine: AsyncEngine, tiny: Engine) -> None:
    def fail(done: Future[Output]) -> None:
        raise ZeroDivisionError("by design")

    bad = engine.submit(make_request())
    bad.add_done_callback(fail)
    good = engine.submit(make_request())
    expected = tiny.generate(make_request())
    assert all(
        same_output(future.result(60), expected) for future in (bad, good, engine.submit(make_request()))
    )


def test_a_detokenizer_failure_ends_only_its_own_answer(tiny_folder: Path, tiny: Engine) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB")
    make, tokenizer = engine.tokenizer.detokenizer, engine.tokenizer
    detokenizers: list[Any] = []

    def sick_first(skip: bool) -> Any:
        detokenizer = make(skip)
        if not detokenizers:
            FailingCall(detokenizer, "step", UnicodeDecodeError("utf-8", b"x", 0, 1, "by design"), nth_call=4)
        detokenizers.append(detokenizer)
        return detokenizer

    tokenizer.detokenizer = sick_first  # type: ignore[method-assign]
    bad, good = engine.generate([make_request("Who?"), make_request()])
    assert (bad.finish_reason, len(bad.token_ids)) == ("error", 4)
    assert bad.error is not None
    assert bad.error.startswith("the answer's text failed: UnicodeDecodeError")
    assert same_output(good, tiny.generate(make_request()))
    assert is_idle(engine)


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_a_prompt_that_cannot_be_rendered_is_reported_to_its_caller(
    stage: str, engine: AsyncEngine, tiny: Engine
) -> None:
    running = engine.submit(make_request("Why?", 60))
    FailingCall(engine.tokenizer, stage, ZeroDivisionError("by design"))
    request = make_request() if stage == "encode" else Request(branch_token_ids=[[5]])
    with pytest.raises(ZeroDivisionError, match="by design"):
        engine.submit(request)
    assert same_output(running.result(60), tiny.generate(make_request("Why?", 60)))


def test_a_wall_clock_jump_changes_nothing(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read of the clock jumps a century ahead or before 1970."""
    jumps = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 3e9 * (-1) ** next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(3e18) * (-1) ** next(jumps))
    long = engine.submit(make_request(max_tokens=20), timeout=300)
    late = engine.submit(make_request(max_tokens=450), timeout=0.05)
    output, cut = long.result(60), late.result(60)
    assert (output.finish_reason, cut.finish_reason) == ("length", "abort")
    for timings in (output.timings, cut.timings):
        assert all(0 <= seconds < 60 for seconds in (timings.queue, timings.prefill, timings.decode))
