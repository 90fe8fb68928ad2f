"""The background thread that runs steps and delivers outputs.

Only this thread touches the scheduler: other threads put commands in a queue, which are called with the
`EngineThread`. The thread lives while anything references the `EngineThread`, a queued request included.
Interpreter exit waits for its last step.
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
    """Run an `EngineCore` in a thread: queue requests, step, deliver outputs.

    closed_reason: why no more requests are accepted; None while they are. last_step_failed: whether the last
    step failed.
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
        """Number of waiting and running requests."""
        return len(self._handles)

    @property
    def busy(self) -> bool:
        """Whether a request or a score is unfinished."""
        return self._thread.is_alive() and bool(self._handles or self._score_futures)

    def add_request(self, handle: RequestHandle) -> None:
        """Queue a request. Raises BusyError when max_waiting requests wait, RunError when closed."""
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
        """Run `EngineCore.score` between two steps and set the future. Raises RunError when closed."""
        self._check_open()
        with self._submit_lock:
            self._check_open()
            self._score_futures.add(future)
            self._commands.put(lambda _: self._run_score(future, token_ids))

    def stop_accepting(self, reason: str, override: bool = False) -> None:
        """Refuse requests from now on; `override` replaces an earlier reason."""
        if self._thread.is_alive():
            with self._submit_lock:
                self.closed_reason = reason if override else self.closed_reason or reason

    def close(self) -> None:
        """End the thread after its current step and join it."""
        self._finalizer()
        if self._thread is not threading.current_thread():  # a future's callback may close its engine
            self._thread.join()

    def _check_open(self) -> None:
        """Called before taking the lock too: after a fork, a missing thread may hold it."""
        self._core.check_not_forked()
        if self.closed_reason:
            raise RunError(self.closed_reason)

    def _run_until_idle(self, command: Command, stop_event: threading.Event) -> bool:
        """Run steps from a first command until idle. Returns False when the thread must end.

        Every pending request and score gets an output or an error, however the loop ends.
        """
        try:
            command(self)
            while not stop_event.is_set():
                self._run_commands()
                self._check_deadlines(time.monotonic())
                if not self._core.scheduler.idle:
                    self._step()
                elif not stop_event.is_set():  # else the stop command may have been consumed just now
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
        """Run a step and deliver its outputs. If it fails, all groups that ran in it fail."""
        try:
            self._core.step()
            self.last_step_failed = False
        except Exception as error:
            LOG.info("a step of the engine failed", exc_info=error)  # the requester gets the exception
            failed_groups = {*self._core.fail_step(error)}
            self.last_step_failed = True
            if self._core.dead_reason:
                self._on_core_death(self._core.dead_reason)
            self._fail_requests(
                error, [handle for handle in list(self._handles) if failed_groups & handle.unfinished]
            )
        for handle in list(self._handles):
            self._deliver(handle)

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
            if handle in self._handles:  # its deadline or a failure may have ended it already
                for group in handle.groups:
                    self._core.scheduler.add(group)

    def _abort(self, handle: RequestHandle) -> None:
        for group in handle.groups:
            self._core.scheduler.remove(group)
        self._handles.discard(handle)
        handle.detach()

    def _end_request(self, handle: RequestHandle, reason: str) -> None:
        """Abort the unfinished answers of a request and deliver the reason."""
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
        """Deliver the pending deltas of a request; a finished one is removed before its last delta."""
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
        """Accept no more requests; current ones fail at the next step."""
        self.stop_accepting(f"the engine has ended: {cause}")
        self._commands.put(lambda loop: None)

    def _fail_requests(self, error: BaseException, handles: Iterable[RequestHandle]) -> None:
        """Remove these requests and deliver the error of the failed step to each."""
        clear_frames(error.__traceback__)  # a caller that keeps the error must not keep the step's tensors
        for handle in list(handles):
            run_error = RunError(f"a step of the engine failed: {format_error(error)}")
            run_error.__cause__ = error
            deliver = handle.deliver
            self._abort(handle)
            deliver(run_error)


def _thread_main(
    loop_ref: weakref.ref[EngineThread], commands: SimpleQueue[Command], stop_event: threading.Event
) -> None:
    """Main function of the thread. While idle it does not reference the `EngineThread`, which may be freed.

    At the end the queue is emptied: commands of requests reference the `EngineThread`.
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
    """Pop commands until the queue is empty."""
    with suppress(Empty):
        while True:
            yield commands.get_nowait()


def _stop_thread(
    thread: threading.Thread, commands: SimpleQueue[Command], stop_event: threading.Event
) -> None:
    """End the thread after its current step."""
    stop_event.set()
    commands.put(lambda loop: None)
    at_exit = not threading.main_thread().is_alive()
    if at_exit:  # a thread returning from torch after finalization would crash the process
        thread.join()
