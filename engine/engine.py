"""The engine: requests in, answers out, all running ones decoded in one batch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import torch

from ..kernels.attention import PagedKV
from ..kernels.errors import InputError
from ..kernels.steer_table import SteerTable
from ..models.opening import open_model
from .admission import Admission
from .blocks import KVBlocks
from .config import DTYPES, EngineConfig, parse_bytes
from .options import check_known, fitted
from .output import Delta, Output, Timings
from .pick import split
from .request import Request
from .runner import Runner
from .scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from ..models.config import ModelConfig
    from .group import Group


class Engine:
    """Decodes requests on one model. One thread at a time may call it.

    progress(done, total) is told of the bytes as the model is fetched and loaded.
    Raises InputError when the model cannot be loaded as configured, RunError when memory is short.
    """

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        fitted("config", config, EngineConfig)
        opened = open_model(config.model, config.load_format, config.chat_template, progress, config.dtype)
        shape, tokenizer = opened.config, opened.tokenizer
        length = _max_length(config, shape)
        dtype = torch_dtype(shape.dtype if config.dtype == "auto" else config.dtype)
        model = opened.load(dtype, torch.device("cpu"), progress)
        pages = _pages(config, shape)
        cache = PagedKV(shape.num_layers, pages, config.block_size, shape.num_kv_heads, shape.head_dim)
        blocks = KVBlocks(pages, config.block_size, config.enable_prefix_caching)
        vocab = min(tokenizer.vocab_size, shape.vocab_size)
        self.config, self.model_config, self.tokenizer = config, shape, tokenizer
        self._admission = Admission(
            tokenizer, opened.template, blocks, length, config.max_num_seqs, vocab, config.seed, shape.rope
        )
        self._scheduler = Scheduler(blocks, config.max_num_seqs, config.max_num_batched_tokens)
        self._runner = Runner(model, cache, SteerTable(vocab))

    @classmethod
    def from_pretrained(
        cls, model: str = "demo", progress: Callable[[int, int], None] | None = None, **fields: Any
    ) -> Engine:
        """An engine for "demo", a model folder or a .gguf file, with any other field of EngineConfig."""
        check_known(EngineConfig, fields)
        return cls(EngineConfig(model=model, **fields), progress)

    @overload
    def generate(self, requests: Request) -> Output: ...

    @overload
    def generate(self, requests: Sequence[Request]) -> list[Output]: ...

    def generate(self, requests: Request | Sequence[Request]) -> Output | list[Output]:
        """Answers one request, or a list of them decoded together, in their order.

        A single request that is wrong raises InputError. A list never raises for one member: its output then
        has finish_reason "error" and says why.
        """
        if isinstance(requests, Request | str) or not isinstance(requests, Iterable):
            return self._finish([self._admission.groups(requests)])[0]
        members: list[list[Group] | Output] = []
        for request in requests:
            try:
                members.append(self._admission.groups(request))
            except InputError as error:
                members.append(_refused(str(error)))
        answers = iter(self._finish([member for member in members if isinstance(member, list)]))
        return [member if isinstance(member, Output) else next(answers) for member in members]

    def stream(self, request: Request) -> Iterator[Delta]:
        """Answers one request piece by piece; each of its n answers ends with a Delta that has `output`.

        Leaving the loop early aborts the request. Streams may be read in turn: all decode in one batch.
        Raises InputError when the request is wrong.
        """
        return self._deltas(self._admission.groups(request))

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each position: [len(token_ids), vocab] float32.

        Raises InputError when there are no ids, too many, or one that the model does not have.
        """
        ids = fitted("token_ids", token_ids, Sequence[int])
        self._admission.check_scored(ids)
        return self._runner.score(ids)

    def _deltas(self, groups: list[Group]) -> Iterator[Delta]:
        with closing(self._run(groups)) as run:
            for _, delta in run:
                yield delta

    def _finish(self, members: list[list[Group]]) -> list[Output]:
        """Runs all groups to their end; one output for each member, which holds its samples."""
        together = [group for groups in members for group in groups]
        done = {group: delta.output for group, delta in self._run(together) if delta.output}
        samples = [[done[group] for group in groups] for groups in members]
        return [replace(outputs[0], outputs=outputs) for outputs in samples]

    def _run(self, groups: list[Group]) -> Generator[tuple[Group, Delta], None, None]:
        """Steps until these groups have ended, yielding their deltas; they leave the engine in any case."""
        for group in groups:
            self._scheduler.add(group)
        try:
            open_groups = list(groups)
            while open_groups:
                if not any(group.outbox for group in open_groups):
                    self._step()
                for group in open_groups:
                    while group.outbox:
                        yield group, group.outbox.popleft()
                open_groups = [
                    group for group in open_groups if group.answer.finish_reason is None or group.outbox
                ]
        finally:
            for group in groups:
                self._scheduler.remove(group)

    def _step(self) -> None:
        """One step of everything that runs: plan, forward, steer, append."""
        plan = self._scheduler.plan()
        for group in plan.admitted:
            self._runner.admit(group)
        choice = self._runner.step(plan)
        self._scheduler.commit(plan)
        if choice is None:
            return
        now = time.perf_counter()
        for group, picked in zip(plan.ready, split(choice, plan.ready), strict=True):
            group.append(picked, now)
            if group.answer.finish_reason is not None:
                self._scheduler.remove(group)


def _refused(reason: str) -> Output:
    timings = Timings(queue=0.0, prefill=0.0, decode=0.0, tokens_per_second=0.0)
    output = Output("", [], "error", [], None, None, timings, seed=0, error=reason)
    return replace(output, outputs=[output])


def _max_length(config: EngineConfig, shape: ModelConfig) -> int:
    own, asked = shape.context, config.max_model_len
    if asked is not None and asked > own:
        raise InputError(f"max_model_len is {asked}; the model was trained for at most {own}")
    return own if asked is None else asked


def _pages(config: EngineConfig, shape: ModelConfig) -> int:
    page = PagedKV.page_bytes(shape.num_layers, config.block_size, shape.num_kv_heads, shape.head_dim)
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
