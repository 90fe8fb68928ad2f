"""Asynchronous engine: serve concurrent requests from any task or thread.

A request is validated in the caller's thread, waits in a bounded queue and streams its output to the caller;
`engine.core.background_loop` decodes it.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from ..kernels.common.errors import InputError, RunError
from .base_engine import BaseEngine
from .core.background_loop import EngineThread
from .core.request_handle import OutputStream, RequestHandle, set_future
from .engine import merge_outputs
from .request import Request
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    import torch

    from .config import EngineConfig
    from .outputs import Delta, Output
    from .sequence.sequence import SequenceGroup


class AsyncEngine(BaseEngine):
    """Decode requests from many tasks and threads in one batch. Close it, or use it as `async with`.

    Raises InputError when the model cannot be loaded as configured, RunError when memory is short.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        super().__init__(config, progress)
        self._thread = EngineThread(self._core)

    @property
    def refusal(self) -> str | None:
        """Why it accepts no more requests: closed, draining or failed. None while it accepts them."""
        return self._thread.closed_reason

    async def health_error(self) -> str | None:
        """Why requests are not served; None while they are.

        This is `refusal`, or, if the last step failed, the error of a one-token request run now.
        """
        if self._thread.closed_reason or not self._thread.last_step_failed:
            return self._thread.closed_reason
        sampling = SamplingParams(max_tokens=1, seed=0)
        try:
            await self.generate(Request(branch_token_ids=[[0]], sampling=sampling, trace=False))
        except RunError as error:
            return str(error)
        return None

    @property
    def unfinished(self) -> int:
        """Number of waiting and running requests."""
        return self._thread.unfinished

    async def stream(self, request: Request, timeout: float | None = None) -> AsyncIterator[Delta]:
        """Stream the deltas of one request; the last Delta of each of its n answers has `output`.

        Leaving the loop, or cancelling the task, aborts the request within a step. After `timeout` seconds
        its unfinished answers end with finish_reason "abort".
        Raises InputError when the request is invalid, BusyError when max_waiting requests already wait,
        and RunError when the engine is closed or one of its steps failed.
        """
        output_stream = await self.open_stream(request, timeout)
        try:
            async for delta in output_stream:
                yield delta
        finally:
            output_stream.close()

    async def open_stream(self, request: Request, timeout: float | None = None) -> OutputStream:
        """Submit a request and return its stream: a refusal is raised here, before the first delta.

        Raises as `stream` does. The caller closes the stream.
        """
        groups = await asyncio.to_thread(self._core.create_groups, request)
        output_stream = OutputStream(len(groups), lambda: handle)
        handle = self._add_request(groups, output_stream.deliver, timeout)
        return output_stream

    async def generate(self, request: Request, timeout: float | None = None) -> Output:
        """Answer one request, as `stream` does; the output has all its samples."""
        outputs = {delta.index: delta.output async for delta in self.stream(request, timeout) if delta.output}
        return _merge_by_index(outputs)

    def submit(self, request: Request, timeout: float | None = None) -> Future[Output]:
        """Submit one request from a thread without an event loop; cancelling the future aborts it.

        Raises as `stream` does, except that the future raises failures of the engine.
        """
        future: Future[Output] = Future()
        outputs: dict[int, Output] = {}
        groups = self._core.create_groups(request)

        def on_output(item: Delta | Exception) -> None:
            if isinstance(item, Exception):
                set_future(future, item)
                return
            if item.output is not None:
                outputs[item.index] = item.output
            if len(outputs) == len(groups):
                set_future(future, _merge_by_index(outputs))

        def on_done(done: Future[Output]) -> None:
            if done.cancelled():
                done.set_running_or_notify_cancel()  # notifies concurrent.futures.wait() and as_completed()
                handle.abort()

        handle = self._add_request(groups, on_output, timeout)
        future.add_done_callback(on_done)
        return future

    async def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each position: [len(token_ids), vocab] float32.

        Raises InputError when the ids are empty, too many or outside the vocabulary, and RunError when the
        engine is closed or the model returns NaN.
        """
        future: Future[torch.Tensor] = Future()
        self._thread.score(future, token_ids)
        return await asyncio.wrap_future(future)

    async def drain(self) -> None:
        """Accept no more requests, and return when all current ones have ended."""
        self._thread.stop_accepting("the engine is draining and takes no more requests")
        while self._thread.busy:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Abort and free all requests, and end the engine thread. Idempotent."""
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """`close`, for callers without an event loop."""
        self._thread.stop_accepting("the engine is closed", override=True)
        self._thread.close()
        self._core.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def _add_request(
        self, groups: list[SequenceGroup], deliver: Callable[[Delta | Exception], None], timeout: float | None
    ) -> RequestHandle:
        if timeout is not None and not timeout > 0:
            raise InputError(f"timeout is {timeout!r}; it must be a number of seconds above 0")
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        handle = RequestHandle(groups, deliver, deadline, timeout)
        self._thread.add_request(handle)
        return handle


def _merge_by_index(outputs: dict[int, Output]) -> Output:
    """Merge the outputs of one request in the order of their index."""
    return merge_outputs([outputs[index] for index in sorted(outputs)])
