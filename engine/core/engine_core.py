"""Engine core: schedule and execute one step at a time for all running groups."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from ...kernels.common.errors import RunError, format_error
from ..config import EngineConfig
from ..execution.device import limit_threads_after_fork
from ..execution.model_runner import split_output
from ..scheduling.block_manager import BlockManager
from ..scheduling.scheduler import Scheduler
from ..utils.fields import coerce
from .builder import EngineBuilder, warm_up_and_capture
from .input_processor import InputProcessor
from .stats import Stats

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..execution.in_flight import InFlightStep
    from ..request import Request
    from ..sequence.sequence import SequenceGroup


class EngineCore:
    """Core of `Engine` and `AsyncEngine`. One thread at a time may step; any may call `create_groups`.

    async_scheduling: whether a step may be launched before the tokens of the step before it are known.
    Raises InputError when the model cannot be loaded as configured, RunError when memory is short.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        coerce("config", config, EngineConfig)
        limit_threads_after_fork()
        builder = EngineBuilder.from_config(config, progress)
        bundle, device = builder.bundle, builder.device
        self._pid = os.getpid()
        self.tp_group = builder.build_tp_group()
        with self.tp_group.fail_together() if self.tp_group else nullcontext():
            self.runner = builder.build_runner(self.tp_group, progress)
            if device.type == "cuda":
                warm_up_and_capture(self.runner, builder.backend, config, builder.max_model_len)
        if self.tp_group and builder.dist_info.rank:
            self.tp_group.worker_loop(self.runner)
            raise SystemExit(0)
        self.async_scheduling = device.type == "cuda" and not self.tp_group
        self._in_flight: InFlightStep | None = None
        self._device_error: str | None = None
        on_cpu = device.type == "cpu"
        block_manager = BlockManager(
            self.runner.num_blocks, config.block_size, config.enable_prefix_caching, on_cpu
        )
        self.config, self.model_config, self.tokenizer = config, bundle.config, bundle.tokenizer
        self.input_processor = InputProcessor(
            bundle.tokenizer,
            bundle.template,
            block_manager,
            builder.max_model_len,
            config.max_num_seqs,
            builder.vocab_size,
            config.seed,
            bundle.config.rope,
        )
        self.scheduler = Scheduler(block_manager, config.max_num_seqs, config.max_num_batched_tokens)

    def close(self) -> None:
        """End the worker processes; nothing is decoded after."""
        if self.tp_group:
            self.tp_group.close()

    @property
    def dead_reason(self) -> str | None:
        """Why the engine can take no more steps; None while it can."""
        return self.tp_group.dead_reason if self.tp_group else self._device_error

    def on_death(self, callback: Callable[[str], None]) -> None:
        """Register callback(cause), called from another thread if a worker process dies."""
        if self.tp_group:
            self.tp_group.on_death(callback)

    def create_groups(self, request: Request) -> list[SequenceGroup]:
        """Make, but do not schedule, one group per answer of the request. Raises InputError if invalid."""
        self.check_not_forked()
        return self.input_processor.create_groups(request)

    @property
    def stats(self) -> Stats:
        """Counters of the engine; any thread may read them."""
        scheduler, block_manager, runner = self.scheduler, self.scheduler.block_manager, self.runner
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages=block_manager.num_blocks,
            pages_held=block_manager.num_blocks - block_manager.num_free_blocks,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            cached=block_manager.num_cached_tokens,
            steps=runner.steps,
            step_seconds=runner.step_seconds,
            steer_seconds=runner.steer_seconds,
            captured=runner.cuda_graphs.num_graphs if runner.cuda_graphs else 0,
            late_compiles=runner.jit_monitor.late if runner.jit_monitor else 0,
        )

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each position: [len(token_ids), vocab] float32."""
        self.check_not_forked()
        ids = coerce("token_ids", token_ids, Sequence[int])
        self.input_processor.check_score_ids(ids)
        return self.runner.score(ids)

    def check_not_forked(self) -> None:
        """Raise RunError in a forked process, which lacks the engine's threads."""
        if os.getpid() != self._pid:
            raise RunError("the engine was made before this process was forked; make one in each process")

    def step(self) -> None:
        """One step of all running groups: schedule, forward, steer, append. Finished groups are removed.

        With async scheduling the next step is launched before this one's tokens are read, if it needs only
        their ids, which stay on the device. Its results for a group that has finished are dropped.
        """
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is None or in_flight.abandoned:
            in_flight = self.runner.execute(self.scheduler.schedule())
        scheduler_output = in_flight.scheduler_output
        self.scheduler.mark_computed(scheduler_output)
        if self.async_scheduling and (next_output := self.scheduler.schedule_ahead(scheduler_output)):
            self._in_flight = self.runner.execute(next_output)
        sampler_output = in_flight.result()
        if sampler_output is None:
            return
        now = time.perf_counter()
        for group, sampled in zip(
            scheduler_output.to_sample, split_output(sampler_output, scheduler_output.to_sample), strict=True
        ):
            if not group.is_active:
                continue  # it ended or was removed while this step was in flight
            try:
                group.append(sampled, now)
            except Exception as error:  # an error in one answer's text must not fail the others
                group.end("error", f"the answer's text failed: {format_error(error)}", now)
            if sampled.failed:
                self.scheduler.block_manager.evict(group)
            if group.is_finished:
                self.scheduler.remove(group)
        if self._in_flight and self._in_flight.abandoned:
            self._in_flight = None  # it would keep its finished groups alive until the next request

    def fail_step(self, error: BaseException) -> list[SequenceGroup]:
        """End the groups that ran in a failed or interrupted step, with the reason, and return them.

        If none ran, the first waiting group ends. Other waiting groups stay.
        """
        reason, now = f"a step of the engine failed: {format_error(error)}", time.perf_counter()
        self._in_flight, self._device_error = None, self._device_error or _probe_device(self.runner.device)
        failed = self.scheduler.pop_failed()
        for group in failed:
            if not group.is_finished:
                group.end("error", reason, now)
        return failed


def _probe_device(device: torch.device) -> str | None:
    """The error that a lost GPU reports at every call of this process; None while it works."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError as error:
        return f"{device} no longer works: {format_error(error)}"
    return None
