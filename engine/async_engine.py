"""The engine for services: many requests at once, from any task or thread, each with its own end.

A worker thread steps the model. A request is checked where it is asked, waits in a bounded queue, and tells
whoever asked of every piece as it comes. Only the worker touches what runs: others leave it a note. It works
for as long as anybody has the engine; the interpreter's end waits for its last step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from traceback import clear_frames
from typing import TYPE_CHECKING

from ..kernels.errors import BusyError, InputError, RunError, defect
from .engine import together_of
from .front import Front
from .request import Request
from .sampling import SamplingParams
from .ticket import Stream, Ticket, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    import torch

    from .config import EngineConfig
    from .group import Group
    from .output import Delta, Output

    Note = Callable[[], None]

LOG = logging.getLogger("trimtab.engine")


class AsyncEngine(Front):
    """Decodes requests from many tasks and threads in one batch. Close it, or use it as `async with`.

    Raises InputError when the model cannot be loaded as configured, RunError when memory is short.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        super().__init__(config, progress)
        self._notes: SimpleQueue[Note] = SimpleQueue()
        self._entering = threading.Lock()
        self._arriving = 0
        self._tickets: set[Ticket] = set()
        self._scores: set[Future[torch.Tensor]] = set()
        self._refusal: str | None = None
        self._failed = False
        stopping = threading.Event()
        work = (weakref.ref(self), self._notes, stopping)
        self._worker = threading.Thread(target=_work, args=work, name="trimtab", daemon=True)
        self._worker.start()
        self._stop = weakref.finalize(self, _stop, self._worker, self._notes, stopping)
        self._core.when_broken(self._broke)

    @property
    def refusal(self) -> str | None:
        """Why it takes no more requests: it is closed, drains, or broke. None while it does."""
        return self._refusal

    async def ailment(self) -> str | None:
        """Why requests are not served, None while they are.

        It is the refusal, or, when the last step failed, what one token that is tried now fails of.
        """
        if self._refusal or not self._failed:
            return self._refusal
        sampling = SamplingParams(max_tokens=1, seed=0)
        try:
            await self.generate(Request(branch_token_ids=[[0]], sampling=sampling, trace=False))
        except RunError as error:
            return str(error)
        return None

    @property
    def unfinished(self) -> int:
        """How many requests wait or run."""
        return len(self._tickets)

    async def stream(self, request: Request, timeout: float | None = None) -> AsyncIterator[Delta]:
        """Answers one request piece by piece; each of its n answers ends with a Delta that has `output`.

        Leaving the loop, or cancelling the task, aborts the request within a step. After `timeout` seconds
        what is not ended is ended with finish_reason "abort".
        Raises InputError when the request is wrong, BusyError when max_waiting requests wait already, and
        RunError when the engine is closed or a step of it failed.
        """
        pieces = await self.begin(request, timeout)
        try:
            async for delta in pieces:
                yield delta
        finally:
            pieces.close()

    async def begin(self, request: Request, timeout: float | None = None) -> Stream:
        """`stream` in two steps: what is refused is refused here, and the pieces come later.

        Raises as `stream` does; whoever has the Stream closes it.
        """
        groups = await asyncio.to_thread(self._core.admit, request)
        pieces = Stream(len(groups), lambda: self._leave(ticket))
        ticket = self._enter(groups, pieces.tell, timeout)
        return pieces

    async def generate(self, request: Request, timeout: float | None = None) -> Output:
        """Answers one request, as `stream` does; the output holds all its samples."""
        outputs = {delta.index: delta.output async for delta in self.stream(request, timeout) if delta.output}
        return together_of([outputs[index] for index in sorted(outputs)])

    def submit(self, request: Request, timeout: float | None = None) -> Future[Output]:
        """Answers one request asked by an ordinary thread; cancelling the future aborts it.

        Raises as `stream` does, but for failures of the engine, which the future raises.
        """
        future: Future[Output] = Future()
        outputs: dict[int, Output] = {}
        groups = self._core.admit(request)

        def tell(news: Delta | Exception) -> None:
            if isinstance(news, Exception):
                settle(future, news)
                return
            if news.output is not None:
                outputs[news.index] = news.output
            if len(outputs) == len(groups):
                settle(future, together_of([outputs[index] for index in sorted(outputs)]))

        def leave(done: Future[Output]) -> None:
            if done.cancelled():
                done.set_running_or_notify_cancel()  # whoever waits for several futures hears of it
                self._leave(ticket)

        ticket = self._enter(groups, tell, timeout)
        future.add_done_callback(leave)
        return future

    async def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each position: [len(token_ids), vocab] float32.

        Raises InputError when there are no ids, too many, or one that the model does not have, and RunError
        when the engine is closed, or the model is broken and gives no number.
        """
        future: Future[torch.Tensor] = Future()
        self._check_open()
        with self._entering:
            self._check_open()
            self._scores.add(future)
            self._notes.put(lambda: self._score(future, token_ids))
        return await asyncio.wrap_future(future)

    async def drain(self) -> None:
        """Takes no more requests, and returns when those that are here have ended."""
        self._refuse("the engine is draining and takes no more requests")
        while (self._tickets or self._scores) and self._worker.is_alive():
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Aborts what is left, frees it, and ends the worker. May be called again."""
        await asyncio.to_thread(self.shutdown)

    def shutdown(self) -> None:
        """`close`, from an ordinary thread."""
        self._refuse("the engine is closed", last=True)
        self._stop()
        if self._worker is not threading.current_thread():  # a future's callback may close its engine
            self._worker.join()
        self._core.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def _enter(
        self, groups: list[Group], tell: Callable[[Delta | Exception], None], timeout: float | None
    ) -> Ticket:
        if timeout is not None and not timeout > 0:
            raise InputError(f"timeout is {timeout!r}; it must be a number of seconds above 0")
        deadline = time.monotonic() + timeout if timeout is not None else float("inf")
        ticket = Ticket(groups, tell, deadline, timeout)
        self._check_open()
        with self._entering:
            self._check_open()
            limit = self.config.max_waiting
            waiting = len(self._core.scheduler.waiting) + self._arriving
            if waiting >= limit:
                raise BusyError(
                    f"{waiting} requests are waiting, and max_waiting is {limit}; try again later"
                )
            self._tickets.add(ticket)
            self._arriving += len(groups)
            self._notes.put(lambda: self._add(ticket))
        return ticket

    def _leave(self, ticket: Ticket) -> None:
        if ticket in self._tickets:
            self._notes.put(lambda: self._drop(ticket))

    def _check_open(self) -> None:
        """Asked before the lock too: in a forked process a thread that is not there may have it."""
        self._core.check_process()
        if self._refusal:
            raise RunError(self._refusal)

    def _refuse(self, why: str, last: bool = False) -> None:
        """From now on nobody enters; `last` replaces what was said before."""
        if self._worker.is_alive():
            with self._entering:
                self._refusal = why if last else self._refusal or why

    def _serve(self, note: Note, stopping: threading.Event) -> bool:
        """The worker's part, from a first note until there is nothing to do. False at its end.

        Whatever ends it, nobody is left waiting.
        """
        try:
            note()
            while not stopping.is_set():
                self._read_notes()
                self._expire(time.monotonic())
                if not self._core.scheduler.idle:
                    self._advance()
                elif not stopping.is_set():  # else the note that says so may have been read just now
                    return True
            self._refuse("the engine is closed")
            for ticket in list(self._tickets):
                self._end(ticket, "the engine was closed")
            self._fail_scores(RunError("the engine is closed"))
            return False
        except BaseException as error:
            broken = RunError(f"the engine broke: {defect(error)}")
            broken.__cause__ = error
            self._refuse(str(broken), last=True)
            self._fail(error, self._tickets)
            self._fail_scores(broken)
            raise

    def _read_notes(self) -> None:
        with suppress(Empty):
            while True:
                self._notes.get_nowait()()

    def _advance(self) -> None:
        """A step, and its news; what ran in one that fails cannot be told apart, and all of it has failed."""
        try:
            self._core.step()
            self._failed = False
        except Exception as error:
            LOG.info("a step of the engine failed", exc_info=error)  # whoever asked is told by an exception
            lost = {*self._core.abandon(error)}
            self._failed = True
            if self._core.broken:
                self._broke(self._core.broken)
            self._fail(error, [ticket for ticket in list(self._tickets) if lost & ticket.open])
        for ticket in list(self._tickets):
            self._tell(ticket)

    def _score(self, future: Future[torch.Tensor], token_ids: Sequence[int]) -> None:
        try:
            if not future.cancelled():
                settle(future, self._core.score(token_ids))
        except Exception as error:
            settle(future, error)
        self._scores.discard(future)

    def _fail_scores(self, error: RunError) -> None:
        for future in list(self._scores):
            settle(future, error)
        self._scores.clear()

    def _add(self, ticket: Ticket) -> None:
        with self._entering:
            self._arriving -= len(ticket.groups)
            if ticket in self._tickets:  # it may have ended before it began, by its deadline or a failure
                for group in ticket.groups:
                    self._core.scheduler.add(group)

    def _drop(self, ticket: Ticket) -> None:
        for group in ticket.groups:
            self._core.scheduler.remove(group)
        self._tickets.discard(ticket)

    def _end(self, ticket: Ticket, why: str) -> None:
        """Aborts what is open of a request and tells so."""
        for group in ticket.open:
            self._core.scheduler.remove(group)
            group.end("abort", why, time.perf_counter())
        self._tell(ticket)

    def _expire(self, now: float) -> None:
        for ticket in list(self._tickets):
            if ticket.deadline <= now:
                self._end(ticket, f"the request's timeout of {ticket.timeout:g} s has passed")

    def _tell(self, ticket: Ticket) -> None:
        """Passes the news of a request's answers on; it has left before the last of them is told."""
        news = [delta for group in ticket.groups for delta in group.outbox]
        for group in ticket.groups:
            group.outbox.clear()
        ticket.open = {group for group in ticket.open if not group.ended}
        if not ticket.open:
            self._tickets.discard(ticket)
        for delta in news:
            ticket.tell(delta)

    def _broke(self, cause: str) -> None:
        """No step will do any more: nothing is taken, and what is here fails at its next."""
        self._refuse(f"the engine has ended: {cause}")
        self._notes.put(lambda: None)

    def _fail(self, error: BaseException, tickets: Iterable[Ticket]) -> None:
        """A step failed: these requests are told why, and leave."""
        clear_frames(error.__traceback__)  # whoever keeps the reason does not keep the step's tensors
        for ticket in list(tickets):
            reason = RunError(f"a step of the engine failed: {defect(error)}")
            reason.__cause__ = error
            self._drop(ticket)
            ticket.tell(reason)


def _work(ref: weakref.ref[AsyncEngine], notes: SimpleQueue[Note], stopping: threading.Event) -> None:
    """The worker: while nothing is to be done it does not have the engine, so that it may be forgotten."""
    goes_on = True
    while goes_on:
        note, engine = notes.get(), ref()
        goes_on = engine is not None and engine._serve(note, stopping)
        del note, engine


def _stop(worker: threading.Thread, notes: SimpleQueue[Note], stopping: threading.Event) -> None:
    """Ends the worker after its step."""
    stopping.set()
    notes.put(lambda: None)
    at_exit = not threading.main_thread().is_alive()
    if at_exit:  # a thread that came back from torch after the interpreter's end would bring the process down
        worker.join()
