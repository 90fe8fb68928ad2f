"""An engine's memory is free with the last reference to it, and waits for no collector of cycles."""

from __future__ import annotations

import asyncio
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from trimtab import AsyncEngine, Engine, Mato, Request, RunError, SamplingParams
from trimtab.engine.core.engine_core import Core
from trimtab.engine.execution.cuda_graphs import DecodeGraphs
from trimtab.engine.execution.model_runner import plain_tensors
from trimtab.engine.outputs import Output
from trimtab.kernels.backend import PLAIN

from ...helpers.fake_graph import again
from .test_concurrency import WISHES

pytestmark = pytest.mark.usefixtures("uncollected")

STEERED = Request("Why? " * 30, Mato(WISHES), SamplingParams(max_tokens=40, n=2))
ALONE = Request("Why?", sampling=SamplingParams(max_tokens=40, temperature=0.7, top_p=0.9, logprobs=2))


def kept(core: Core) -> list[weakref.ref[Any]]:
    """The large parts of an engine."""
    runner, cache = core.runner, core.runner.cache
    return [weakref.ref(part) for part in (core, runner.model, cache, cache.pages, runner.table)]


def gone(parts: list[weakref.ref[Any]]) -> bool:
    return not any(part() is not None for part in parts)


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_an_engine_ends_with_its_last_reference(
    tiny_folder: Path, as_on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if as_on_a_gpu:
        monkeypatch.setattr("trimtab.engine.core.builder.backend_of", lambda *_: PLAIN)
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB", block_size=16)
    if as_on_a_gpu:
        engine._core.looks_ahead, runner = True, engine._core.runner
        with plain_tensors():
            runner.graphs = DecodeGraphs(runner.model, runner.cache, 12, 512, again)  # type: ignore[arg-type]
        del runner
    parts = kept(engine._core)
    outputs = engine.generate([STEERED, ALONE])
    stream = engine.stream(STEERED)
    next(stream)
    engine.score([1, 2, 3])
    del engine
    assert not gone(parts), "a stream that is not read to its end needs its engine"
    del stream
    assert gone(parts)
    assert all(output.finish_reason == "length" for output in outputs)


async def every_way(engine: AsyncEngine) -> list[Output]:
    """Streams read and left, an answer that is cancelled, one that is late, and some in earnest."""
    async for _ in engine.stream(STEERED):
        pass
    pieces = engine.stream(STEERED)
    await anext(pieces)
    await pieces.aclose()
    asking = asyncio.create_task(engine.generate(STEERED))
    await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    late = await engine.generate(ALONE, timeout=1e-9)
    assert late.finish_reason == "abort"
    return await asyncio.gather(engine.generate(STEERED), engine.generate(ALONE))


@pytest.mark.parametrize("closed", [False, True])
def test_an_engine_for_services_ends_with_its_last_reference(tiny_folder: Path, closed: bool) -> None:
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB")
    parts, worker = kept(engine._core), engine._loop._worker
    futures: list[Future[Output]] = [engine.submit(STEERED), engine.submit(ALONE), engine.submit(STEERED)]
    futures[-1].cancel()
    asyncio.run(every_way(engine))
    assert [future.result().finish_reason for future in futures[:-1]] == ["length"] * 2
    if closed:
        engine.shutdown()
        with pytest.raises(RunError):
            engine.submit(ALONE)
    del engine
    worker.join(10)
    assert gone(parts), "the futures, which are still here, keep it"


def test_what_an_engines_worker_no_longer_reads_does_not_keep_it(tiny_folder: Path) -> None:
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB")
    parts, loop, asked = kept(engine._core), engine._loop, threading.Event()
    worker = loop._worker

    def wait(_: object) -> None:
        asked.wait(60)

    loop._notes.put(wait)
    future = engine.submit(ALONE)
    loop._stop()
    asked.set()
    assert future.result(60).finish_reason == "abort"
    worker.join(60)
    del engine, loop
    assert gone(parts)
