"""A model at work: what is added is decoded, a step at a time, all of it in one batch."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..kernels.backend import TORCH, Backend
from ..kernels.errors import InputError
from ..kernels.steer_table import SteerTable
from ..models import memory
from ..models.opening import open_model
from .admission import Admission
from .blocks import KVBlocks
from .config import DTYPES, EngineConfig, parse_bytes
from .options import fitted
from .pick import split
from .runner import Runner
from .scheduler import Scheduler
from .stats import Stats

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..models.config import ModelConfig
    from .group import Group
    from .request import Request


class Core:
    """What `Engine` and `AsyncEngine` drive. One thread at a time may step; `admit` any thread may call.

    Raises InputError when the model cannot be loaded as configured, RunError when memory is short.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        fitted("config", config, EngineConfig)
        opened = open_model(config.model, config.load_format, config.chat_template, progress, config.dtype)
        shape, tokenizer = opened.config, opened.tokenizer
        length = _max_length(config, shape)
        dtype = torch_dtype(shape.dtype if config.dtype == "auto" else config.dtype)
        backend = _backend(config.kernels)
        model = opened.load(dtype, torch.device("cpu"), progress, backend.ops)
        memory.keep()
        sizes = (config.block_size, shape.num_kv_heads, shape.head_dim)
        pages = _pages(config, backend.cache.page_bytes(shape.num_layers, *sizes, dtype))
        cache = backend.cache(shape.num_layers, pages, *sizes, dtype)
        blocks = KVBlocks(pages, config.block_size, config.enable_prefix_caching)
        vocab = min(tokenizer.vocab_size, shape.vocab_size)
        self.config, self.model_config, self.tokenizer = config, shape, tokenizer
        self.admission = Admission(
            tokenizer, opened.template, blocks, length, config.max_num_seqs, vocab, config.seed, shape.rope
        )
        self.scheduler = Scheduler(blocks, config.max_num_seqs, config.max_num_batched_tokens)
        self.runner = Runner(model, cache, SteerTable(vocab), backend.steer)

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


def _backend(kernels: str) -> Backend:
    """Raises InputError for Triton's kernels where nothing can run them."""
    if kernels != "triton":
        return TORCH
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            "kernels is 'triton', and this version decodes on the CPU, where they are interpreted, for "
            "tests: set TRITON_INTERPRET=1 before the process starts, or take 'torch'"
        )
    from ..kernels.gpu.backend import TRITON  # noqa: PLC0415 - it brings triton

    return TRITON


def _max_length(config: EngineConfig, shape: ModelConfig) -> int:
    own, asked = shape.context, config.max_model_len
    if asked is not None and asked > own:
        raise InputError(f"max_model_len is {asked}; the model was trained for at most {own}")
    return own if asked is None else asked


def _pages(config: EngineConfig, page: int) -> int:
    pages = parse_bytes(config.kv_cache_memory) // page
    if not pages:
        raise InputError(
            f"kv_cache_memory is {config.kv_cache_memory!r}; one page of this model takes {page} bytes"
        )
    return pages


def torch_dtype(name: str) -> torch.dtype:
    """The type of that name; InputError for one that no weights are held in."""
    known = DTYPES[1:]
    if name not in known:
        raise InputError(f"the checkpoint's dtype is {name!r}; known are {', '.join(known)}, or give dtype")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
