"""What happens when something breaks: who is told of it, and what goes on as if nothing had happened."""

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

from ...helpers.tiny_model import at_rest

WISHES = (Objective("Be kind."), Objective("Be short.", 2))


@pytest.fixture
def engine(tiny_folder: Path) -> Iterator[AsyncEngine]:
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB", max_num_seqs=9)
    yield engine
    engine.shutdown()
    assert at_rest(engine)
    assert engine.unfinished == 0


def asked(text: str = "Why?", tokens: int = 8, **sampling: Any) -> Request:
    return Request(text, Mato(WISHES), SamplingParams(max_tokens=tokens, ignore_eos=True, **sampling))


def same(one: Output, other: Output) -> bool:
    return (one.token_ids, one.text, one.trace) == (other.token_ids, other.text, other.trace)


class Breaks:
    """Stands before a call of the engine, and fails its `at`-th use with an error."""

    def __init__(self, holder: Any, name: str, error: BaseException, at: int = 1) -> None:
        self._call, self._error, self._left = getattr(holder, name), error, at
        setattr(holder, name, self)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self._left -= 1
        if not self._left:
            raise self._error
        return self._call(*arguments, **named)


STAGES: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "the plan": lambda core: (core.scheduler, "plan"),
    "the row of the table": lambda core: (core.runner, "admit"),
    "the move of pages": lambda core: (core.runner.cache, "swap"),
    "the clearing of pages": lambda core: (core.runner.cache, "clear"),
    "the forward": lambda core: (core.runner.model, "forward"),
    "the last product": lambda core: (core.runner.model.head, "_product"),
    "the choice": lambda core: (core.runner, "choose"),
    "the end of the plan": lambda core: (core.scheduler, "commit"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_wherever_a_step_fails_what_ran_is_told_why_and_what_waits_is_answered(
    stage: str, engine: AsyncEngine, tiny: Engine
) -> None:
    """Of five requests of three branches, three are decoded at once."""
    requests = [asked(f"Why {n}?", 5) for n in range(5)]
    expected = tiny.generate(requests)
    Breaks(*STAGES[stage](engine._core), ZeroDivisionError("by\ndesign"), at=2)
    futures = [engine.submit(request) for request in requests]
    wait(futures, 60)
    failed = [future for future in futures if future.exception()]
    assert 1 <= len(failed) <= 3
    for future in failed:
        assert isinstance(future.exception(), RunError)
        assert str(future.exception()) == "a step of the engine failed: ZeroDivisionError: by design"
    for future, right in zip(futures, expected, strict=True):
        assert future in failed or same(future.result(), right)
    assert at_rest(engine)
    again = [engine.submit(request).result(60) for request in requests]
    assert all(same(one, right) for one, right in zip(again, expected, strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_fails_ends_other_streams_with_the_reason_and_leaves_nothing(
    stage: str, tiny_folder: Path, tiny: Engine
) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB", max_num_seqs=9)
    stream = engine.stream(asked("Why 1?", 30))
    next(stream)
    Breaks(*STAGES[stage](engine._core), KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.generate(asked("Why 2?"))
    output = [delta.output for delta in stream][-1]
    assert output is not None
    assert (output.finish_reason, len(output.token_ids)) == ("error", 1)
    assert output.error == "a step of the engine failed: KeyboardInterrupt"
    assert at_rest(engine)
    assert same(engine.generate(asked("Why 2?")), tiny.generate(asked("Why 2?")))


def test_pages_that_a_failed_step_had_not_moved_yet_are_not_found_again(tiny_folder: Path) -> None:
    """Long prompts of which the first end leave a hole, and the pages behind it move in the next step."""
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
    swap, engine._core.runner.cache.swap = engine._core.runner.cache.swap, fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="a cable is loose"):
        engine.generate(long)
    assert moves
    assert at_rest(engine)
    assert all(same(one, other) for one, other in zip(engine.generate(long), right, strict=True))


def test_a_reason_that_is_kept_keeps_no_tensor_of_the_step(engine: AsyncEngine) -> None:
    """On a GPU that is out of memory, the next step needs what the failed one has taken."""
    taken: list[weakref.ref[torch.Tensor]] = []

    def forward(*arguments: Any) -> Any:
        tensor = torch.zeros(1000)
        taken.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    model = engine._core.runner.model
    whole, model.forward = model.forward, forward  # type: ignore[method-assign]
    failed = engine.submit(asked())
    reason = failed.exception(60)
    said = "a step of the engine failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert str(reason) == said
    model.forward = whole  # type: ignore[method-assign]
    assert engine.submit(asked()).result(60).finish_reason == "length"
    gc.collect()
    assert taken
    assert reason is failed.exception()
    assert taken[0]() is None


@pytest.mark.parametrize("stage", ["pages_of", "Runner"])
def test_memory_that_is_short_at_the_start_is_a_sentence(
    stage: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr(f"trimtab.engine.core.builder.{stage}", fail)
    with pytest.raises(RunError, match=r"cpu has too little memory: .* Tried to allocate 2 GiB\.; lower"):
        Engine.from_pretrained(str(tiny_folder))


def test_memory_that_is_short_for_a_score_is_a_sentence(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setattr(tiny._core.runner, "new_cache", fail)
    with pytest.raises(RunError, match=r"cpu has too little memory: .* 2 GiB\.; score fewer tokens at once"):
        tiny.score([1, 2, 3])


def test_an_engine_that_fails_says_so_until_a_token_that_it_tries_comes_out(engine: AsyncEngine) -> None:
    model = engine._core.runner.model
    forward = model.forward

    def fail(*arguments: Any) -> Any:
        raise OSError("the device is lost")

    assert asyncio.run(engine.ailment()) is None
    model.forward = fail  # type: ignore[method-assign]
    assert asyncio.run(engine.ailment()) is None  # nothing has met the fault yet
    assert engine.submit(asked()).exception(60)
    for _ in range(2):
        assert asyncio.run(engine.ailment()) == "a step of the engine failed: OSError: the device is lost"
    model.forward = forward  # type: ignore[method-assign]
    assert asyncio.run(engine.ailment()) is None
    assert engine._core.runner.steps == 1
    assert asyncio.run(engine.ailment()) is None
    assert engine._core.runner.steps == 1, "it tries only after a failure"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_worker_breaks_leaves_nobody_waiting_and_refuses_with_the_cause(
    tiny_folder: Path,
) -> None:
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB", max_num_seqs=3)
    entered, go = threading.Event(), threading.Event()

    def end(*arguments: Any) -> Any:
        entered.set()
        go.wait(60)
        raise SystemExit("by design")

    engine._core.runner.model.forward = end  # type: ignore[method-assign]

    async def ask() -> list[Any]:
        futures = [asyncio.wrap_future(engine.submit(asked(f"{n}"))) for n in range(2)]
        await asyncio.to_thread(entered.wait, 60)
        late = asyncio.wrap_future(engine.submit(asked("late")))
        score = asyncio.create_task(engine.score([1, 2]))
        await asyncio.sleep(0)
        go.set()
        return await asyncio.gather(*futures, late, score, return_exceptions=True)

    *requests, score = asyncio.run(asyncio.wait_for(ask(), 60))
    assert [str(each) for each in requests] == ["a step of the engine failed: SystemExit: by design"] * 3
    assert str(score) == "the engine broke: SystemExit: by design" == asyncio.run(engine.ailment())
    with pytest.raises(RunError, match="the engine broke: SystemExit: by design"):
        engine.submit(asked())
    engine.shutdown()


def test_a_score_that_waits_when_the_engine_closes_is_refused(engine: AsyncEngine) -> None:
    entered, go, step = threading.Event(), threading.Event(), engine._core.step

    def slow() -> None:
        entered.set()
        go.wait(60)
        step()

    engine._core.step = slow  # type: ignore[method-assign]

    async def ask() -> Any:
        future = engine.submit(asked())
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


def test_a_reader_whose_loop_is_gone_stops_nobody_else(engine: AsyncEngine, tiny: Engine) -> None:
    """Its loop ends with the stream neither read nor closed."""
    abandoned = asyncio.run(asyncio.wait_for(engine.begin(asked("Who reads?", 40)), 60))
    other = engine.submit(asked()).result(60)
    assert same(other, tiny.generate(asked()))
    abandoned.close()


def test_a_callback_that_fails_stops_nobody_else(engine: AsyncEngine, tiny: Engine) -> None:
    def fail(done: Future[Output]) -> None:
        raise ZeroDivisionError("by design")

    bad = engine.submit(asked())
    bad.add_done_callback(fail)
    good = engine.submit(asked())
    expected = tiny.generate(asked())
    assert all(same(future.result(60), expected) for future in (bad, good, engine.submit(asked())))


def test_a_text_that_fails_ends_its_own_answer_and_its_neighbour_is_the_same_as_alone(
    tiny_folder: Path, tiny: Engine
) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB")
    make, tokenizer = engine.tokenizer.detokenizer, engine.tokenizer
    made: list[Any] = []

    def sick_first(skip: bool) -> Any:
        detokenizer = make(skip)
        if not made:
            Breaks(detokenizer, "push", UnicodeDecodeError("utf-8", b"x", 0, 1, "by design"), at=4)
        made.append(detokenizer)
        return detokenizer

    tokenizer.detokenizer = sick_first  # type: ignore[method-assign]
    bad, good = engine.generate([asked("Who?"), asked()])
    assert (bad.finish_reason, len(bad.token_ids)) == ("error", 4)
    assert bad.error is not None
    assert bad.error.startswith("the answer's text failed: UnicodeDecodeError")
    assert same(good, tiny.generate(asked()))
    assert at_rest(engine)


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_a_prompt_that_cannot_be_made_is_told_to_whoever_asked(
    stage: str, engine: AsyncEngine, tiny: Engine
) -> None:
    running = engine.submit(asked("Why?", 60))
    Breaks(engine.tokenizer, stage, ZeroDivisionError("by design"))
    request = asked() if stage == "encode" else Request(branch_token_ids=[[5]])
    with pytest.raises(ZeroDivisionError, match="by design"):
        engine.submit(request)
    assert same(running.result(60), tiny.generate(asked("Why?", 60)))


def test_a_wall_clock_that_jumps_changes_nothing(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward by a century and back behind 1970, between any two looks at it."""
    jumps = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 3e9 * (-1) ** next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: int(3e18) * (-1) ** next(jumps))
    long = engine.submit(asked(tokens=20), timeout=300)
    late = engine.submit(asked(tokens=450), timeout=0.05)
    output, cut = long.result(60), late.result(60)
    assert (output.finish_reason, cut.finish_reason) == ("length", "abort")
    for timings in (output.timings, cut.timings):
        assert all(0 <= seconds < 60 for seconds in (timings.queue, timings.prefill, timings.decode))
