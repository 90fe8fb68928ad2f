"""A request in an AsyncEngine and the stream or future that receives its outputs."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..outputs import Delta
    from ..sequence.sequence import SequenceGroup


@dataclass(eq=False)
class RequestHandle:
    """An unfinished request: its groups, the callback for deltas or an error, and its deadline.

    abort: aborts the request within a step, without a delta.
    expired: whether the deadline ended it.
    """

    groups: list[SequenceGroup]
    deliver: Callable[[Delta | Exception], None]
    deadline: float
    timeout: float | None
    expired: bool = False
    unfinished: set[SequenceGroup] = field(default_factory=set)
    abort: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.unfinished = set(self.groups)

    def detach(self) -> None:
        """Drop the references to the engine and to the caller: neither must keep the other alive."""
        self.deliver, self.abort = lambda item: None, lambda: None


class OutputStream:
    """Async iterator over the deltas of a request. Close it when leaving before the end."""

    def __init__(self, num_outputs: int, get_handle: Callable[[], RequestHandle]) -> None:
        self._num_unfinished, self._get_handle = num_outputs, get_handle
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

    @property
    def expired(self) -> bool:
        """Whether the deadline ended the request."""
        return self._get_handle().expired

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> Delta:
        if not self._num_unfinished:
            raise StopAsyncIteration
        item: Delta | Exception = await self._queue.get()
        if isinstance(item, Exception):
            self._num_unfinished = 0
            raise item
        if item.output is not None:
            self._num_unfinished -= 1
        return item

    def deliver(self, item: Delta | Exception) -> None:
        """Queue a delta or an error; callable from any thread."""
        with suppress(RuntimeError):  # the event loop is closed: no task waits
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def close(self) -> None:
        """Abort the unfinished answers within a step, and end the iteration of a waiting task."""
        self._num_unfinished = 0
        self._get_handle().abort()
        self.deliver(StopAsyncIteration())


def set_future(future: Future[Any], result: Any) -> None:
    """Set the future's result, or its exception if `result` is one, unless it was cancelled."""
    with suppress(InvalidStateError):
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)
