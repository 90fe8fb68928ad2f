"""A request under way in an engine for services: its answers, and who hears of them, a task or a thread."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..outputs import Delta
    from ..sequence.sequence import Group


@dataclass(eq=False)
class Ticket:
    """A request under way: its answers, whom to tell of a piece or of the failure of all, and by when.

    leave: aborts it within a step, if it has not ended; nobody is told.
    expired: whether its deadline ended it.
    """

    groups: list[Group]
    tell: Callable[[Delta | Exception], None]
    deadline: float
    timeout: float | None
    expired: bool = False
    open: set[Group] = field(default_factory=set)
    leave: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.open = set(self.groups)

    def close(self) -> None:
        """Lets go of the engine and of who asked, who has this: neither is to keep the other's memory."""
        self.tell, self.leave = lambda news: None, lambda: None


class Stream:
    """The pieces of a request's answers as they come: iterate over it, and close it if you leave before."""

    def __init__(self, answers: int, ticket: Callable[[], Ticket]) -> None:
        self._open, self._ticket = answers, ticket
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Queue[Any]()

    @property
    def expired(self) -> bool:
        """Whether the request's deadline ended what was open of it."""
        return self._ticket().expired

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Delta:
        if not self._open:
            raise StopAsyncIteration
        news: Delta | Exception = await self._arrived.get()
        if isinstance(news, Exception):
            self._open = 0
            raise news
        if news.output is not None:
            self._open -= 1
        return news

    def tell(self, news: Delta | Exception) -> None:
        """Brings news, from any thread."""
        with suppress(RuntimeError):  # the loop is closed, and nobody waits there any more
            self._loop.call_soon_threadsafe(self._arrived.put_nowait, news)

    def close(self) -> None:
        """Aborts what is not ended, within a step; a task that still waits for a piece gets no more."""
        self._open = 0
        self._ticket().leave()
        self.tell(StopAsyncIteration())


def settle(future: Future[Any], news: Any) -> None:
    """Gives the future its result or the exception that it is, unless it was cancelled."""
    with suppress(InvalidStateError):
        if isinstance(news, BaseException):
            future.set_exception(news)
        else:
            future.set_result(news)
