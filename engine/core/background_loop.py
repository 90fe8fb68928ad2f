"""The background thread that runs steps and delivers outputs.

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

from ...kernels.common.errors import BusyError, RunError, format_error
from .request_handle import set_future

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    import torch

    from .engine_core import EngineCore
    from .request_handle import RequestHandle

    Command = Callable[["EngineThread"], None]

LOG = logging.getLogger("trimtab.engine")


class EngineThread:
    """Requests on their way into a core and out of it again.

    closed_reason: why nobody may enter any more; None while they may. last_step_failed: whether the last
    step did.
    """

    def __init__(self, core: EngineCore) -> None:
        self.closed_reason: str | None = None
        self.last_step_failed = False
        self._core = core
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._submit_lock = threading.Lock()
        self._num_arriving = 0
        self._handles: set[RequestHandle] = set()
        self._score_futures: set[Future[torch.Tensor]] = set()
        stop_event = threading.Event()
        thread_args = (weakref.ref(self), self._commands, stop_event)
        self._thread = threading.Thread(target=_thread_main, args=thread_args, name="trimtab", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _stop_thread, self._thread, self._commands, stop_event)
        on_core_death = weakref.WeakMethod(self._on_core_death)
        core.on_death(lambda cause: tell(cause) if (tell := on_core_death()) else None)

    @property
    def unfinished(self) -> int:
        """How many requests wait or run."""
        return len(self._handles)

    @property
    def busy(self) -> bool:
        """Whether anything that was asked is still to be answered."""
        return self._thread.is_alive() and bool(self._handles or self._score_futures)

    def add_request(self, handle: RequestHandle) -> None:
        """Takes a request. Raises BusyError when max_waiting wait already, RunError when nobody may enter."""
        self._check_open()
        with self._submit_lock:
            self._check_open()
            max_waiting = self._core.config.max_waiting
            num_waiting = len(self._core.scheduler.waiting) + self._num_arriving
            if num_waiting >= max_waiting:
                raise BusyError(
                    f"{num_waiting} requests are waiting, and max_waiting is {max_waiting}; try again later"
                )
            handle.abort = partial(self._commands.put, lambda loop: loop._abort(handle))
            self._handles.add(handle)
            self._num_arriving += len(handle.groups)
            self._commands.put(lambda _: self._add_to_scheduler(handle))

    def score(self, future: Future[torch.Tensor], token_ids: Sequence[int]) -> None:
        """Gives the future what `EngineCore.score` does, between two steps. Raises RunError as
        `add_request` does.
        """
        self._check_open()
        with self._submit_lock:
            self._check_open()
            self._score_futures.add(future)
            self._commands.put(lambda _: self._run_score(future, token_ids))

    def stop_accepting(self, reason: str, override: bool = False) -> None:
        """From now on nobody enters; `override` replaces what was said before."""
        if self._thread.is_alive():
            with self._submit_lock:
                self.closed_reason = reason if override else self.closed_reason or reason

    def close(self) -> None:
        """Ends the worker after its step, and waits for it."""
        self._finalizer()
        if self._thread is not threading.current_thread():  # a future's callback may close its engine
            self._thread.join()

    def _check_open(self) -> None:
        """Asked before the lock too: in a forked process a thread that is not there may have it."""
        self._core.check_not_forked()
        if self.closed_reason:
            raise RunError(self.closed_reason)

    def _run_until_idle(self, command: Command, stop_event: threading.Event) -> bool:
        """The worker's part, from a first note until there is nothing to do. False at its end.

        Whatever ends it, nobody is left waiting.
        """
        try:
            command(self)
            while not stop_event.is_set():
                self._run_commands()
                self._check_deadlines(time.monotonic())
                if not self._core.scheduler.idle:
                    self._step()
                elif not stop_event.is_set():  # else the note that says so may have been read just now
                    return True
            self.stop_accepting("the engine is closed")
            for handle in list(self._handles):
                self._end_request(handle, "the engine was closed")
            self._fail_scores(RunError("the engine is closed"))
            return False
        except BaseException as error:
            run_error = RunError(f"the engine broke: {format_error(error)}")
            run_error.__cause__ = error
            self.stop_accepting(str(run_error), override=True)
            self._fail_requests(error, self._handles)
            self._fail_scores(run_error)
            raise

    def _run_commands(self) -> None:
        for command in _drain(self._commands):
            command(self)

    def _step(self) -> None:
        """A step, and its news; what ran in one that fails cannot be told apart, and all of it has failed."""
        try:
            self._core.step()
            self.last_step_failed = False
        except Exception as error:
            LOG.info("a step of the engine failed", exc_info=error)  # whoever asked is told by an exception
            failed_groups = {*self._core.fail_step(error)}
            self.last_step_failed = True
            if self._core.dead_reason:
                self._on_core_death(self._core.dead_reason)
            self._fail_requests(
                error, [handle for handle in list(self._handles) if failed_groups & handle.unfinished]
            )
        for ticket in list(self._handles):
            self._deliver(ticket)

    def _run_score(self, future: Future[torch.Tensor], token_ids: Sequence[int]) -> None:
        try:
            if not future.cancelled():
                set_future(future, self._core.score(token_ids))
        except Exception as error:
            set_future(future, error)
        self._score_futures.discard(future)

    def _fail_scores(self, error: RunError) -> None:
        for future in list(self._score_futures):
            set_future(future, error)
        self._score_futures.clear()

    def _add_to_scheduler(self, handle: RequestHandle) -> None:
        with self._submit_lock:
            self._num_arriving -= len(handle.groups)
            if handle in self._handles:  # it may have ended before it began, by its deadline or a failure
                for group in handle.groups:
                    self._core.scheduler.add(group)

    def _abort(self, handle: RequestHandle) -> None:
        for group in handle.groups:
            self._core.scheduler.remove(group)
        self._handles.discard(handle)
        handle.detach()

    def _end_request(self, handle: RequestHandle, reason: str) -> None:
        """Aborts what is open of a request and tells so."""
        for group in handle.unfinished:
            self._core.scheduler.remove(group)
            group.end("abort", reason, time.perf_counter())
        self._deliver(handle)

    def _check_deadlines(self, now: float) -> None:
        for handle in list(self._handles):
            if handle.deadline <= now:
                handle.expired = True
                self._end_request(handle, f"the request's timeout of {handle.timeout:g} s has passed")

    def _deliver(self, handle: RequestHandle) -> None:
        """Passes the news of a request's answers on; it has left before the last of them is told."""
        deltas = [delta for group in handle.groups for delta in group.pending_deltas]
        for group in handle.groups:
            group.pending_deltas.clear()
        handle.unfinished = {group for group in handle.unfinished if not group.is_finished}
        if not handle.unfinished:
            self._handles.discard(handle)
        for delta in deltas:
            handle.deliver(delta)
        if not handle.unfinished:
            handle.detach()

    def _on_core_death(self, cause: str) -> None:
        """No step will do any more: nothing is taken, and what is here fails at its next."""
        self.stop_accepting(f"the engine has ended: {cause}")
        self._commands.put(lambda loop: None)

    def _fail_requests(self, error: BaseException, handles: Iterable[RequestHandle]) -> None:
        """A step failed: these requests are told why, and leave."""
        clear_frames(error.__traceback__)  # whoever keeps the reason does not keep the step's tensors
        for handle in list(handles):
            run_error = RunError(f"a step of the engine failed: {format_error(error)}")
            run_error.__cause__ = error
            deliver = handle.deliver
            self._abort(handle)
            deliver(run_error)


def _thread_main(
    loop_ref: weakref.ref[EngineThread], commands: SimpleQueue[Command], stop_event: threading.Event
) -> None:
    """The worker: while nothing is to be done it does not have the loop, so that it may be forgotten.

    Nor do notes once it has ended: those of requests have it, and nobody else would take them out.
    """
    running = True
    try:
        while running:
            command, loop = commands.get(), loop_ref()
            running = loop is not None and loop._run_until_idle(command, stop_event)
            del command, loop
    finally:
        for _ in _drain(commands):
            pass


def _drain(commands: SimpleQueue[Command]) -> Iterator[Command]:
    """Takes out one note after another, for as long as there are any."""
    with suppress(Empty):
        while True:
            yield commands.get_nowait()


def _stop_thread(
    thread: threading.Thread, commands: SimpleQueue[Command], stop_event: threading.Event
) -> None:
    """Ends the worker after its step."""
    stop_event.set()
    commands.put(lambda loop: None)
    at_exit = not threading.main_thread().is_alive()
    if at_exit:  # a thread that came back from torch after the interpreter's end would bring the process down
        thread.join()
