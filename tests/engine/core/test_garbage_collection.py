"""An engine is freed with its last reference, without the cyclic garbage collector."""

from __future__ import annotations

import asyncio
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from trimtab import AsyncEngine, Engine, Mato, Request, RunError, SamplingParams
from trimtab.engine.core.engine_core import EngineCore
from trimtab.engine.execution.cuda_graphs import CUDAGraphRunner
from trimtab.engine.execution.model_runner import inference_context
from trimtab.engine.outputs import Output
from trimtab.kernels.backend import REFERENCE_BACKEND

from ...harness import get_core, get_runner, get_thread
from ...helpers.fake_graph import fake_capture
from .test_concurrency import OBJECTIVES

pytestmark = pytest.mark.usefixtures("gc_disabled")

STEERED = Request("Why? " * 30, Mato(OBJECTIVES), SamplingParams(max_tokens=40, n=2))
UNSTEERED = Request("Why?", sampling=SamplingParams(max_tokens=40, temperature=0.7, top_p=0.9, logprobs=2))


def weak_refs(core: EngineCore) -> list[weakref.ref[Any]]:
    """Weak references to the large parts of an engine."""
    runner, cache = core.runner, core.runner.cache
    return [weakref.ref(part) for part in (core, runner.model, cache, cache.blocks, runner.steering_state)]


def all_collected(parts: list[weakref.ref[Any]]) -> bool:
    return not any(part() is not None for part in parts)


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_an_engine_is_freed_with_its_last_reference(
    tiny_folder: Path, as_on_a_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if as_on_a_gpu:
        monkeypatch.setattr("trimtab.engine.core.builder.select_backend", lambda *_: REFERENCE_BACKEND)
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB", block_size=16)
    if as_on_a_gpu:
        get_core(engine).async_scheduling, runner = True, get_runner(engine)
        with inference_context():
            runner.cuda_graphs = CUDAGraphRunner(runner.model, runner.cache, 12, 512, fake_capture)  # type: ignore[arg-type]
        del runner
    parts = weak_refs(get_core(engine))
    outputs = engine.generate([STEERED, UNSTEERED])
    stream = engine.stream(STEERED)
    next(stream)
    engine.score([1, 2, 3])
    del engine
    assert not all_collected(parts), "an unfinished stream keeps its engine alive"
    del stream
    assert all_collected(parts)
    assert all(output.finish_reason == "length" for output in outputs)


async def use_every_api(engine: AsyncEngine) -> list[Output]:
    """Read a stream, leave a stream, cancel a request, let one time out, and finish two."""
    async for _ in engine.stream(STEERED):
        pass
    pieces = engine.stream(STEERED)
    await anext(pieces)
    await pieces.aclose()
    asking = asyncio.create_task(engine.generate(STEERED))
    await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    late = await engine.generate(UNSTEERED, timeout=1e-9)
    assert late.finish_reason == "abort"
    return await asyncio.gather(engine.generate(STEERED), engine.generate(UNSTEERED))


@pytest.mark.parametrize("closed", [False, True])
def test_an_async_engine_is_freed_with_its_last_reference(tiny_folder: Path, closed: bool) -> None:
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB")
    parts, worker = weak_refs(get_core(engine)), get_thread(engine)._thread
    futures: list[Future[Output]] = [engine.submit(STEERED), engine.submit(UNSTEERED), engine.submit(STEERED)]
    futures[-1].cancel()
    asyncio.run(use_every_api(engine))
    assert [future.result().finish_reason for future in futures[:-1]] == ["length"] * 2
    if closed:
        engine.shutdown()
        with pytest.raises(RunError):
            engine.submit(UNSTEERED)
    del engine
    worker.join(10)
    assert all_collected(parts), "the remaining futures keep the engine alive"


def test_a_blocked_worker_thread_does_not_keep_an_engine_alive(tiny_folder: Path) -> None:
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB")
    parts, loop, entered = weak_refs(get_core(engine)), get_thread(engine), threading.Event()
    worker = loop._thread

    def wait(_: object) -> None:
        entered.wait(60)

    loop._commands.put(wait)
    future = engine.submit(UNSTEERED)
    loop._finalizer()
    entered.set()
    assert future.result(60).finish_reason == "abort"
    worker.join(60)
    del engine, loop
    assert all_collected(parts)
