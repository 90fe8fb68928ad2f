"""A request in an AsyncEngine: its answers, and the task or thread that waits for them."""

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
    """A request under way: its answers, whom to tell of a piece or of the failure of all, and by when.

    abort: aborts it within a step, if it has not ended; nobody is told.
    expired: whether its deadline ended it.
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
        """Lets go of the engine and of who asked, who has this: neither is to keep the other's memory."""
        self.deliver, self.abort = lambda item: None, lambda: None


class OutputStream:
    """The pieces of a request's answers as they come: iterate over it, and close it if you leave before."""

    def __init__(self, num_outputs: int, get_handle: Callable[[], RequestHandle]) -> None:
        self._num_unfinished, self._get_handle = num_outputs, get_handle
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

    @property
    def expired(self) -> bool:
        """Whether the request's deadline ended what was open of it."""
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
        """Brings news, from any thread."""
        with suppress(RuntimeError):  # the loop is closed, and nobody waits there any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def close(self) -> None:
        """Aborts what is not ended, within a step; a task that still waits for a piece gets no more."""
        self._num_unfinished = 0
        self._get_handle().abort()
        self.deliver(StopAsyncIteration())


def set_future(future: Future[Any], result: Any) -> None:
    """Gives the future its result or the exception that it is, unless it was cancelled."""
    with suppress(InvalidStateError):
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)
