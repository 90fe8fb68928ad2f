"""A model at work: what is added is decoded, a step at a time, all of it in one batch."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from ...kernels.common.errors import RunError, defect
from ..config import EngineConfig
from ..execution.device import without_lost_threads
from ..execution.model_runner import split
from ..scheduling.block_manager import KVBlocks
from ..scheduling.scheduler import Scheduler
from ..utils.fields import fitted
from .builder import Blueprint, get_ready
from .input_processor import Admission
from .stats import Stats

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..execution.in_flight import Flight
    from ..request import Request
    from ..sequence.sequence import Group


class Core:
    """What `Engine` and `AsyncEngine` drive. One thread at a time may step; `admit` any thread may call.

    looks_ahead: whether a step may be launched before the choice of the one before it is known.
    Raises InputError when the model cannot be loaded as configured, RunError when memory is short.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        fitted("config", config, EngineConfig)
        without_lost_threads()
        blueprint = Blueprint.of(config, progress)
        opened, device = blueprint.opened, blueprint.device
        self._process = os.getpid()
        self.ranks = blueprint.ranks()
        with self.ranks.together() if self.ranks else nullcontext():
            self.runner = blueprint.runner(self.ranks, progress)
            if device.type == "cuda":
                get_ready(self.runner, blueprint.backend, config, blueprint.length)
        if self.ranks and blueprint.place.rank:
            self.ranks.follow(self.runner)
            raise SystemExit(0)
        self.looks_ahead = device.type == "cuda" and not self.ranks
        self._next: Flight | None = None
        self._lost: str | None = None
        dense = device.type == "cpu"
        blocks = KVBlocks(self.runner.pages, config.block_size, config.enable_prefix_caching, dense)
        self.config, self.model_config, self.tokenizer = config, opened.config, opened.tokenizer
        self.admission = Admission(
            opened.tokenizer,
            opened.template,
            blocks,
            blueprint.length,
            config.max_num_seqs,
            blueprint.vocab,
            config.seed,
            opened.config.rope,
        )
        self.scheduler = Scheduler(blocks, config.max_num_seqs, config.max_num_batched_tokens)

    def close(self) -> None:
        """Ends the processes that hold other parts of the model; nothing is decoded after."""
        if self.ranks:
            self.ranks.close()

    @property
    def broken(self) -> str | None:
        """Why no step can be taken any more; None while they can."""
        return self.ranks.broken if self.ranks else self._lost

    def when_broken(self, tell: Callable[[str], None]) -> None:
        """Calls tell(cause), from another thread, should a process die that holds a part of the model."""
        if self.ranks:
            self.ranks.when_broken(tell)

    def admit(self, request: Request) -> list[Group]:
        """One group for each of the request's n answers, not added yet. Raises InputError if it is wrong."""
        self.check_process()
        return self.admission.groups(request)

    @property
    def stats(self) -> Stats:
        """What it is doing, in numbers; any thread may ask."""
        scheduler, blocks, runner = self.scheduler, self.scheduler.blocks, self.runner
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages=blocks.total,
            pages_held=blocks.total - blocks.free,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            cached=blocks.found,
            steps=runner.steps,
            step_seconds=runner.step_seconds,
            steer_seconds=runner.steer_seconds,
            captured=runner.graphs.count if runner.graphs else 0,
            late_compiles=runner.compiles.late if runner.compiles else 0,
        )

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each position: [len(token_ids), vocab] float32."""
        self.check_process()
        ids = fitted("token_ids", token_ids, Sequence[int])
        self.admission.check_scored(ids)
        return self.runner.score(ids)

    def check_process(self) -> None:
        """Raises RunError in a process forked since, which has none of the threads that it would wait for."""
        if os.getpid() != self._process:
            raise RunError("the engine was made before this process was forked; make one in each process")

    def step(self) -> None:
        """One step of everything that runs: plan, forward, steer, append. What ends leaves.

        On a GPU the step after it is launched before this one's choice is read, where it does not depend on
        it but for the tokens, which stay on the device. What it computes for an answer that ends is dropped.
        """
        flight, self._next = self._next, None
        if flight is None or flight.lost:
            flight = self.runner.launch(self.scheduler.plan())
        plan = flight.plan
        self.scheduler.commit(plan)
        if self.looks_ahead and (ahead := self.scheduler.ahead(plan)):
            self._next = self.runner.launch(ahead)
        choice = flight.land()
        if choice is None:
            return
        now = time.perf_counter()
        for group, picked in zip(plan.ready, split(choice, plan.ready), strict=True):
            if not group.present:
                continue  # it ended, or was taken out, when this step was on its way
            try:
                group.append(picked, now)
            except Exception as error:  # the text of one answer is no other's concern
                group.end("error", f"the answer's text failed: {defect(error)}", now)
            if picked.failed:
                self.scheduler.blocks.unlearn(group)
            if group.ended:
                self.scheduler.remove(group)
        if self._next and self._next.lost:
            self._next = None  # it would keep them for as long as nobody asks for anything

    def abandon(self, error: BaseException) -> list[Group]:
        """A step failed or was interrupted: ends what ran in it, or would have been the first to run.

        What else waits stays, and may be decoded by the next step.
        """
        reason, now = f"a step of the engine failed: {defect(error)}", time.perf_counter()
        self._next, self._lost = None, self._lost or _fault(self.runner.device)
        lost = self.scheduler.abandon()
        for group in lost:
            if not group.ended:
                group.end("error", reason, now)
        return lost


def _fault(device: torch.device) -> str | None:
    """Why a GPU does nothing more for this process, which it tells at every call; None while it does."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        return f"{device} does nothing more: {defect(error)}"
    return None
