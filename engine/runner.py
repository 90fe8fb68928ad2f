"""Carries out a plan: one ragged forward over all branches, then one steering step over all ready groups."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..kernels.layout import Segment
from ..kernels.linear import filled
from ..kernels.parcel import fetch, send
from ..kernels.steer import Choice
from ..kernels.steer_table import Draw, Edits, Groups, SteerTable
from ..models.ragged import forward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..kernels.backend import Cache
    from ..models.llama import Llama
    from .graphs import DecodeGraphs
    from .group import Group
    from .scheduler import Plan


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Neither gradients nor subclasses of Tensor: looking for those takes longer than some operations do."""
    with torch.inference_mode(), torch._C.DisableTorchFunctionSubclass():
        yield


class Runner:
    """The model, its KV cache and the table of running requests; `step` moves all of them on.

    new_cache: makes a cache of so many pages. graphs: what of decoding is captured, where anything is.
    steps, step_seconds, steer_seconds: how many, how long they took, and how much of it steering took; on a
    GPU that is its launches and the wait for all that was launched before.
    """

    def __init__(
        self,
        model: Llama,
        new_cache: Callable[[int], Cache],
        pages: int,
        table: SteerTable,
        steer: Callable[..., Choice],
    ) -> None:
        self.model, self.new_cache, self.table, self.steer = model, new_cache, table, steer
        self.cache, self.device = new_cache(pages), model.device
        self.graphs: DecodeGraphs | None = None
        self.steps, self.step_seconds, self.steer_seconds = 0, 0.0, 0.0

    def on_device(self) -> AbstractContextManager[object]:
        """Launches within go to this runner's GPU, whichever the thread's own is."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def admit(self, group: Group) -> None:
        """Writes the group's method and sampling into its row of the table."""
        sampling, method = group.request.sampling, group.request.steering
        draw = Draw(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, group.seed)
        with self.on_device():
            self.table.admit(group.row, method.compiled, method.weights(), draw)

    def step(self, plan: Plan) -> Choice | None:
        """Computes the plan's tokens; the choice of each ready group, in their order, or None without any.

        The choice is on the host, which has waited for it.
        """
        with plain_tensors(), self.on_device():
            return self._step(plan)

    def _step(self, plan: Plan) -> Choice | None:
        self.cache.swap(plan.swaps)
        self.cache.clear(plan.fresh)
        if not plan.shares:
            return None
        start = time.perf_counter()
        logits = self._logits(plan)
        middle = time.perf_counter()
        choice = None if logits is None else self._steer(plan.ready, logits)
        end = time.perf_counter()
        self.steps += 1
        self.step_seconds += end - start
        self.steer_seconds += end - middle
        return choice

    def _logits(self, plan: Plan) -> torch.Tensor | None:
        """Those of all branches of the ready groups, in order, [branches, vocab]; None without any."""
        segments = [Segment(branch.computed, count, branch.pages) for _, branch, count in plan.shares]
        token_ids = [
            token
            for group, branch, count in plan.shares
            for token in group.token_ids(branch, branch.computed, count)
        ]
        turned_by = [group.turned_by for group, _, count in plan.shares for _ in range(count)]
        hidden = self.graphs.run(token_ids, segments, turned_by) if self.graphs else None
        if hidden is None:
            hidden = forward(self.model, segments, token_ids, turned_by, self.cache)
        ends = accumulate(count for _, _, count in plan.shares)
        last = {branch: end - 1 for (_, branch, _), end in zip(plan.shares, ends, strict=True)}
        if not plan.ready:
            return None
        rows = [last[branch] for group in plan.ready for branch in group.branches]
        (at,) = send(self.device, np.array(filled(rows, self.device), np.int64))
        return self.model.logits(hidden[at])[: len(rows)]

    def _steer(self, groups: Sequence[Group], logits: torch.Tensor) -> Choice:
        branches = [(group.row, [branch.index for branch in group.branches]) for group in groups]
        choice = self.steer(
            logits,
            Groups.of(branches, self.device),
            self.table,
            edits(groups, logits.shape[1], self.device),
            trace=any(group.request.trace for group in groups),
            top=any(group.request.sampling.logprobs is not None for group in groups),
        )
        return choice if self.device.type == "cpu" else _on_host(choice)

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each position, [tokens, vocab] float32 on the host."""
        rope = self.model.config.rope
        pages = -(-len(token_ids) // self.cache.block_size)
        segments = [Segment(0, len(token_ids), list(range(pages)))]
        with plain_tensors(), self.on_device():
            cache = self.new_cache(pages)
            cache.clear(list(range(pages)))
            turned_by = [rope.turned_by(len(token_ids))] * len(token_ids)
            hidden = forward(self.model, segments, token_ids, turned_by, cache)
            return self.model.logits(hidden)[: len(token_ids)].log_softmax(-1).cpu()


def _on_host(choice: Choice) -> Choice:
    """The same, read in one copy."""
    names = [field.name for field in fields(choice) if field.name != "top"]
    found = fetch([*(getattr(choice, name) for name in names), *(choice.top or ())])
    top = (found[-2], found[-1]) if choice.top else None
    return replace(choice, **dict(zip(names, found, strict=False)), top=top)


def edits(groups: Sequence[Group], vocab: int, device: torch.device) -> Edits | None:
    """The single scores that bias, bans and penalties change in this step; None where there are none."""
    bias: list[tuple[int, int, float]] = []
    repetition: list[tuple[int, int, float]] = []
    for index, group in enumerate(groups):
        bias += [(index, token, value) for token, value in _bias(group) if token < vocab]
        penalty = group.request.sampling.repetition_penalty
        if penalty != 1:
            seen = {*group.prompts[0].prompt_token_ids, *group.tokens}
            repetition += [(index, token, penalty) for token in seen]
    if not bias and not repetition:
        return None
    columns = send(device, *(column for entries in (bias, repetition) for column in _columns(entries)))
    return Edits((columns[0], columns[1]), columns[2], (columns[3], columns[4]), columns[5])


def _bias(group: Group) -> Iterator[tuple[int, float]]:
    sampling = group.request.sampling
    yield from sampling.logit_bias.items()
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, count in Counter(group.tokens).items():
            yield token, -sampling.presence_penalty - sampling.frequency_penalty * count
    if len(group.tokens) < sampling.min_tokens:
        yield from ((token, -torch.inf) for token in group.answer.stop_ids)


def _columns(entries: list[tuple[int, int, float]]) -> list[np.ndarray[Any, Any]]:
    """Groups, tokens and values."""
    groups, tokens = (np.array([entry[i] for entry in entries], np.int64) for i in (0, 1))
    return [groups, tokens, np.array([entry[2] for entry in entries], np.float32)]
