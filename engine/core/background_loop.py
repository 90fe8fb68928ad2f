"""The worker of the engine for services: a thread that steps the model and tells whoever asked.

Only the worker touches what runs: others leave it a note, which is given the loop as it is read. It works for
as long as anybody has the loop, a request on its way too; the interpreter's end waits for its last step.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from traceback import clear_frames
from typing import TYPE_CHECKING

from ...kernels.common.errors import BusyError, RunError, defect
from .request_handle import settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    import torch

    from .engine_core import Core
    from .request_handle import Ticket

    Note = Callable[["Loop"], None]

LOG = logging.getLogger("trimtab.engine")


class Loop:
    """Requests on their way into a core and out of it again.

    refusal: why nobody may enter any more; None while they may. failed: whether the last step did.
    """

    def __init__(self, core: Core) -> None:
        self.refusal: str | None = None
        self.failed = False
        self._core = core
        self._notes: SimpleQueue[Note] = SimpleQueue()
        self._entering = threading.Lock()
        self._arriving = 0
        self._tickets: set[Ticket] = set()
        self._scores: set[Future[torch.Tensor]] = set()
        stopping = threading.Event()
        work = (weakref.ref(self), self._notes, stopping)
        self._worker = threading.Thread(target=_work, args=work, name="trimtab", daemon=True)
        self._worker.start()
        self._stop = weakref.finalize(self, _stop, self._worker, self._notes, stopping)
        broke = weakref.WeakMethod(self._broke)
        core.when_broken(lambda cause: tell(cause) if (tell := broke()) else None)

    @property
    def unfinished(self) -> int:
        """How many requests wait or run."""
        return len(self._tickets)

    @property
    def busy(self) -> bool:
        """Whether anything that was asked is still to be answered."""
        return self._worker.is_alive() and bool(self._tickets or self._scores)

    def enter(self, ticket: Ticket) -> None:
        """Takes a request. Raises BusyError when max_waiting wait already, RunError when nobody may enter."""
        self._check_open()
        with self._entering:
            self._check_open()
            limit = self._core.config.max_waiting
            waiting = len(self._core.scheduler.waiting) + self._arriving
            if waiting >= limit:
                raise BusyError(
                    f"{waiting} requests are waiting, and max_waiting is {limit}; try again later"
                )
            ticket.leave = partial(self._notes.put, lambda loop: loop._drop(ticket))
            self._tickets.add(ticket)
            self._arriving += len(ticket.groups)
            self._notes.put(lambda _: self._add(ticket))

    def score(self, future: Future[torch.Tensor], token_ids: Sequence[int]) -> None:
        """Gives the future what `Core.score` does, between two steps. Raises RunError as `enter` does."""
        self._check_open()
        with self._entering:
            self._check_open()
            self._scores.add(future)
            self._notes.put(lambda _: self._score(future, token_ids))

    def refuse(self, why: str, last: bool = False) -> None:
        """From now on nobody enters; `last` replaces what was said before."""
        if self._worker.is_alive():
            with self._entering:
                self.refusal = why if last else self.refusal or why

    def close(self) -> None:
        """Ends the worker after its step, and waits for it."""
        self._stop()
        if self._worker is not threading.current_thread():  # a future's callback may close its engine
            self._worker.join()

    def _check_open(self) -> None:
        """Asked before the lock too: in a forked process a thread that is not there may have it."""
        self._core.check_process()
        if self.refusal:
            raise RunError(self.refusal)

    def _serve(self, note: Note, stopping: threading.Event) -> bool:
        """The worker's part, from a first note until there is nothing to do. False at its end.

        Whatever ends it, nobody is left waiting.
        """
        try:
            note(self)
            while not stopping.is_set():
                self._read_notes()
                self._expire(time.monotonic())
                if not self._core.scheduler.idle:
                    self._advance()
                elif not stopping.is_set():  # else the note that says so may have been read just now
                    return True
            self.refuse("the engine is closed")
            for ticket in list(self._tickets):
                self._end(ticket, "the engine was closed")
            self._fail_scores(RunError("the engine is closed"))
            return False
        except BaseException as error:
            broken = RunError(f"the engine broke: {defect(error)}")
            broken.__cause__ = error
            self.refuse(str(broken), last=True)
            self._fail(error, self._tickets)
            self._fail_scores(broken)
            raise

    def _read_notes(self) -> None:
        for note in _unread(self._notes):
            note(self)

    def _advance(self) -> None:
        """A step, and its news; what ran in one that fails cannot be told apart, and all of it has failed."""
        try:
            self._core.step()
            self.failed = False
        except Exception as error:
            LOG.info("a step of the engine failed", exc_info=error)  # whoever asked is told by an exception
            lost = {*self._core.abandon(error)}
            self.failed = True
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
        ticket.close()

    def _end(self, ticket: Ticket, why: str) -> None:
        """Aborts what is open of a request and tells so."""
        for group in ticket.open:
            self._core.scheduler.remove(group)
            group.end("abort", why, time.perf_counter())
        self._tell(ticket)

    def _expire(self, now: float) -> None:
        for ticket in list(self._tickets):
            if ticket.deadline <= now:
                ticket.expired = True
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
        if not ticket.open:
            ticket.close()

    def _broke(self, cause: str) -> None:
        """No step will do any more: nothing is taken, and what is here fails at its next."""
        self.refuse(f"the engine has ended: {cause}")
        self._notes.put(lambda loop: None)

    def _fail(self, error: BaseException, tickets: Iterable[Ticket]) -> None:
        """A step failed: these requests are told why, and leave."""
        clear_frames(error.__traceback__)  # whoever keeps the reason does not keep the step's tensors
        for ticket in list(tickets):
            reason = RunError(f"a step of the engine failed: {defect(error)}")
            reason.__cause__ = error
            tell = ticket.tell
            self._drop(ticket)
            tell(reason)


def _work(ref: weakref.ref[Loop], notes: SimpleQueue[Note], stopping: threading.Event) -> None:
    """The worker: while nothing is to be done it does not have the loop, so that it may be forgotten.

    Nor do notes once it has ended: those of requests have it, and nobody else would take them out.
    """
    goes_on = True
    try:
        while goes_on:
            note, loop = notes.get(), ref()
            goes_on = loop is not None and loop._serve(note, stopping)
            del note, loop
    finally:
        for _ in _unread(notes):
            pass


def _unread(notes: SimpleQueue[Note]) -> Iterator[Note]:
    """Takes out one note after another, for as long as there are any."""
    with suppress(Empty):
        while True:
            yield notes.get_nowait()


def _stop(worker: threading.Thread, notes: SimpleQueue[Note], stopping: threading.Event) -> None:
    """Ends the worker after its step."""
    stopping.set()
    notes.put(lambda loop: None)
    at_exit = not threading.main_thread().is_alive()
    if at_exit:  # a thread that came back from torch after the interpreter's end would bring the process down
        worker.join()
