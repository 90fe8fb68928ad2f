"""A model at work: what is added is decoded, a step at a time, all of it in one batch."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from ..kernels.device_cache import DeviceKV
from ..kernels.errors import InputError, RunError, defect
from ..kernels.steer_table import SteerTable
from ..models import memory, shards
from ..models.llama import dimensions
from ..models.opening import open_model
from .admission import Admission
from .blocks import KVBlocks
from .config import DTYPES, EngineConfig
from .devices import backend_of, device_of, without_lost_threads
from .graphs import DecodeGraphs, captured
from .options import fitted
from .pick import split
from .place import Place
from .room import pages_of
from .runner import Runner, plain_tensors
from .scheduler import Scheduler
from .stats import Stats
from .warmup import warm_up

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..kernels.backend import Backend, Cache
    from ..models.config import ModelConfig
    from ..models.opening import Opened
    from .flight import Flight
    from .group import Group
    from .ranks import Ranks
    from .request import Request


class Core:
    """What `Engine` and `AsyncEngine` drive. One thread at a time may step; `admit` any thread may call.

    looks_ahead: whether a step may be launched before the choice of the one before it is known.
    Raises InputError when the model cannot be loaded as configured, RunError when memory is short.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        fitted("config", config, EngineConfig)
        without_lost_threads()
        place = Place.of(config.tensor_parallel_size)
        device = device_of(config.device, place.local, place.beside if place.alone else 1)
        backend = backend_of(config.kernels, device, config.batch_invariant, config.tensor_parallel_size)
        opened = open_model(config.model, config.load_format, config.chat_template, progress, config.dtype)
        shape, tokenizer = opened.config, opened.tokenizer
        length = _max_length(config, shape)
        dtype = torch_dtype(shape.dtype if config.dtype == "auto" else config.dtype)
        self._process = os.getpid()
        vocab = min(tokenizer.vocab_size, shape.vocab_size)
        self.ranks = _ranks(config, shape, place, device)
        with self.ranks.together() if self.ranks else nullcontext():
            self.runner = _runner(config, opened, dtype, device, backend, vocab, self.ranks, progress)
            if device.type == "cuda":
                _get_ready(self.runner, backend, config, length)
        if self.ranks and place.rank:
            self.ranks.follow(self.runner)
            raise SystemExit(0)
        self.looks_ahead = device.type == "cuda" and not self.ranks
        self._next: Flight | None = None
        self._lost: str | None = None
        dense = device.type == "cpu"
        blocks = KVBlocks(self.runner.pages, config.block_size, config.enable_prefix_caching, dense)
        self.config, self.model_config, self.tokenizer = config, shape, tokenizer
        self.admission = Admission(
            tokenizer, opened.template, blocks, length, config.max_num_seqs, vocab, config.seed, shape.rope
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


def _ranks(config: EngineConfig, shape: ModelConfig, place: Place, device: torch.device) -> Ranks | None:
    """The processes that share the model out; None where one holds it whole."""
    if config.tensor_parallel_size == 1:
        return None
    from .ranks import Ranks  # noqa: PLC0415 - not every torch can talk to other processes
    from .workers import Workers  # noqa: PLC0415

    shards.require(shape, config.tensor_parallel_size)
    return Ranks(place, device, Workers(config) if place.alone else None)


def _runner(
    config: EngineConfig,
    opened: Opened,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend,
    vocab: int,
    ranks: Ranks | None,
    progress: Callable[[int, int], None] | None,
) -> Runner:
    """The model, or this process's part of it, with its cache. Ids below `vocab` have a token."""
    part = shards.Shards(opened.config, ranks.peers, dimensions(opened.config)) if ranks else None
    with memory.enough(device, "give a smaller model or dtype"):
        model = opened.load(dtype, device, progress, backend.ops, part)
    if device.type == "cpu":
        memory.keep()
    shape = model.config
    sizes = (config.block_size, shape.num_kv_heads, shape.head_dim)

    def new_cache(pages: int) -> Cache:
        return backend.cache(shape.num_layers, pages, *sizes, dtype, device)

    table = SteerTable(vocab, device)
    if part:
        own = part.vocabulary
        table = SteerTable(min(max(vocab - own.first, 0), own.width), device, own)
    page = backend.page_bytes(shape.num_layers, *sizes, dtype)
    with memory.enough(device, "lower max_num_batched_tokens or max_num_seqs"):
        pages = pages_of(config, model, backend, new_cache, page, table.shard)
    with memory.enough(device, "lower gpu_memory_utilization or max_num_seqs"):
        runner = Runner(model, new_cache, ranks.least(pages) if ranks else pages, table, backend.choose)
    if ranks:
        runner.lead = ranks.lead
    return runner


def _get_ready(runner: Runner, backend: Backend, config: EngineConfig, length: int) -> None:
    """Captures steps that are to be replayed and compiles kernels, so that no request waits for it."""
    runner.compiles = backend.compiles() if backend.compiles else None
    if config.enforce_eager:
        return
    with memory.enough(runner.device, "lower gpu_memory_utilization or max_num_seqs, or give enforce_eager"):
        if backend.graphs:
            capture(runner, config.max_num_seqs, length)
        if backend.warm_shapes:
            warm_up(runner, backend.warm_shapes(runner.device, config.max_num_seqs))


def capture(runner: Runner, rows: int, length: int) -> None:
    """Captures the runner's decoding steps, of up to so many rows whose longest text is so long."""
    cache = runner.cache
    assert isinstance(cache, DeviceKV), "only such a cache has a spare page"
    with plain_tensors(), runner.on_device():
        runner.graphs = DecodeGraphs(runner.model, cache, rows, length, captured())
        torch.cuda.empty_cache()


def _max_length(config: EngineConfig, shape: ModelConfig) -> int:
    own, asked = shape.context, config.max_model_len
    if asked is not None and asked > own:
        raise InputError(f"max_model_len is {asked}; the model was trained for at most {own}")
    return own if asked is None else asked


def torch_dtype(name: str) -> torch.dtype:
    """The type of that name; InputError for one that no weights are held in."""
    known = DTYPES[1:]
    if name not in known:
        raise InputError(f"the checkpoint's dtype is {name!r}; known are {', '.join(known)}, or give dtype")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
