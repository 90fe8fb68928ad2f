"""A model at work: what is added is decoded, a step at a time, all of it in one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..kernels.device_cache import DeviceKV
from ..kernels.errors import InputError, RunError
from ..kernels.steer_table import SteerTable
from ..models import memory
from ..models.opening import open_model
from .admission import Admission
from .blocks import KVBlocks
from .config import DTYPES, EngineConfig
from .devices import backend_of, device_of
from .graphs import DecodeGraphs, captured
from .options import fitted
from .pick import split
from .room import pages_of
from .runner import Runner, plain_tensors
from .scheduler import Scheduler
from .stats import Stats

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..kernels.backend import Cache
    from ..models.config import ModelConfig
    from .group import Group
    from .request import Request


class Core:
    """What `Engine` and `AsyncEngine` drive. One thread at a time may step; `admit` any thread may call.

    Raises InputError when the model cannot be loaded as configured, RunError when memory is short.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        fitted("config", config, EngineConfig)
        device = device_of(config.device)
        backend = backend_of(config.kernels, device)
        opened = open_model(config.model, config.load_format, config.chat_template, progress, config.dtype)
        shape, tokenizer = opened.config, opened.tokenizer
        length = _max_length(config, shape)
        dtype = torch_dtype(shape.dtype if config.dtype == "auto" else config.dtype)
        model = opened.load(dtype, device, progress, backend.ops)
        if device.type == "cpu":
            memory.keep()
        sizes = (config.block_size, shape.num_kv_heads, shape.head_dim)

        def new_cache(pages: int) -> Cache:
            return backend.cache(shape.num_layers, pages, *sizes, dtype, device)

        page = backend.page_bytes(shape.num_layers, *sizes, dtype)
        pages = pages_of(config, model, backend, new_cache, page)
        dense = device.type == "cpu"
        blocks = KVBlocks(pages, config.block_size, config.enable_prefix_caching, dense)
        vocab = min(tokenizer.vocab_size, shape.vocab_size)
        self.config, self.model_config, self.tokenizer = config, shape, tokenizer
        self.admission = Admission(
            tokenizer, opened.template, blocks, length, config.max_num_seqs, vocab, config.seed, shape.rope
        )
        self.scheduler = Scheduler(blocks, config.max_num_seqs, config.max_num_batched_tokens)
        self.runner = Runner(model, new_cache, pages, SteerTable(vocab, device), backend.steer)
        if device.type == "cuda" and backend.graphs and not config.enforce_eager:
            _capture(self.runner, config.max_num_seqs, length)

    def admit(self, request: Request) -> list[Group]:
        """One group for each of the request's n answers, not added yet. Raises InputError if it is wrong."""
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
        )

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each position: [len(token_ids), vocab] float32."""
        ids = fitted("token_ids", token_ids, Sequence[int])
        self.admission.check_scored(ids)
        return self.runner.score(ids)

    def step(self) -> None:
        """One step of everything that runs: plan, forward, steer, append. What ends leaves."""
        plan = self.scheduler.plan()
        for group in plan.admitted:
            self.runner.admit(group)
        choice = self.runner.step(plan)
        self.scheduler.commit(plan)
        if choice is None:
            return
        now = time.perf_counter()
        for group, picked in zip(plan.ready, split(choice, plan.ready), strict=True):
            try:
                group.append(picked, now)
            except Exception as error:  # the text of one answer is no other's concern
                group.end("error", f"the answer's text failed: {type(error).__name__}: {error}", now)
            if group.ended:
                self.scheduler.remove(group)


def _capture(runner: Runner, rows: int, length: int) -> None:
    """Captures the runner's decoding steps. Raises RunError when the GPU has too little memory for them."""
    cache = runner.cache
    assert isinstance(cache, DeviceKV), "only such a cache has a spare page"
    try:
        with plain_tensors(), runner.on_device():
            runner.graphs = DecodeGraphs(runner.model, cache, rows, length, captured())
            torch.cuda.empty_cache()
    except torch.cuda.OutOfMemoryError:
        raise RunError(
            f"{runner.device} has too little memory left to capture steps of {rows} rows; lower "
            "gpu_memory_utilization or max_num_seqs, or give enforce_eager"
        ) from None


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
