"""Carries out a plan: one ragged forward over all branches, then one steering step over all ready groups."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from ..kernels.layout import Batch, Segment
from ..kernels.linear import filled
from ..kernels.steer import Choice
from ..kernels.steer_table import Draw, Edits, Groups, SteerTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ..kernels.backend import Cache
    from ..models.llama import Llama
    from .group import Group
    from .scheduler import Plan


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Neither gradients nor subclasses of Tensor: looking for those takes longer than some operations do."""
    with torch.inference_mode(), torch._C.DisableTorchFunctionSubclass():
        yield


class Runner:
    """The model, its KV cache and the table of running requests; `step` moves all of them on.

    steps, step_seconds, steer_seconds: how many, how long they took, and how much of it steering took.
    """

    def __init__(self, model: Llama, cache: Cache, table: SteerTable, steer: Callable[..., Choice]) -> None:
        self.model, self.cache, self.table, self.steer = model, cache, table, steer
        self.steps, self.step_seconds, self.steer_seconds = 0, 0.0, 0.0

    def admit(self, group: Group) -> None:
        """Writes the group's method and sampling into its row of the table."""
        sampling, method = group.request.sampling, group.request.steering
        draw = Draw(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, group.seed)
        self.table.admit(group.row, method.compiled, method.weights(), draw)

    @plain_tensors()
    def step(self, plan: Plan) -> Choice | None:
        """Computes the plan's tokens; the choice of each ready group, in their order, or None without any."""
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
        hidden = self._forward(segments, token_ids, turned_by, self.cache)
        ends = accumulate(count for _, _, count in plan.shares)
        last = {branch: end - 1 for (_, branch, _), end in zip(plan.shares, ends, strict=True)}
        if not plan.ready:
            return None
        rows = [last[branch] for group in plan.ready for branch in group.branches]
        return self.model.logits(hidden[filled(rows)])[: len(rows)]

    def _steer(self, groups: Sequence[Group], logits: torch.Tensor) -> Choice:
        return self.steer(
            logits,
            Groups.of([(group.row, [branch.index for branch in group.branches]) for group in groups]),
            self.table,
            edits(groups, logits.shape[1]),
            trace=any(group.request.trace for group in groups),
            top=any(group.request.sampling.logprobs is not None for group in groups),
        )

    @plain_tensors()
    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each position, [tokens, vocab] float32."""
        config = self.model.config
        pages = -(-len(token_ids) // self.cache.block_size)
        sizes = (self.cache.block_size, config.num_kv_heads, config.head_dim)
        cache = type(self.cache)(config.num_layers, pages, *sizes, self.cache.pages.dtype)
        cache.clear(list(range(pages)))
        turned_by = [config.rope.turned_by(len(token_ids))] * len(token_ids)
        hidden = self._forward([Segment(0, len(token_ids), list(range(pages)))], token_ids, turned_by, cache)
        return self.model.logits(hidden)[: len(token_ids)].log_softmax(-1)

    def _forward(
        self, segments: list[Segment], token_ids: Sequence[int], turned_by: list[int], cache: Cache
    ) -> torch.Tensor:
        """Hidden states of the tokens, and of rows that only fill the batch up: [rows, hidden]."""
        ids = filled(token_ids)
        batch = Batch.of(segments, cache.block_size, padding=len(ids) - len(token_ids))
        cache.begin(batch)
        lengths = torch.tensor(filled(turned_by)) if self.model.config.rope.kind == "dynamic" else None
        return self.model.forward(torch.tensor(ids), batch.positions, cache, lengths)


def edits(groups: Sequence[Group], vocab: int) -> Edits | None:
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
    at, values = _columns(bias)
    repeated, penalties = _columns(repetition)
    return Edits(bias_at=at, bias=values, repetition_at=repeated, repetition=penalties)


def _bias(group: Group) -> Iterator[tuple[int, float]]:
    sampling = group.request.sampling
    yield from sampling.logit_bias.items()
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, count in Counter(group.tokens).items():
            yield token, -sampling.presence_penalty - sampling.frequency_penalty * count
    if len(group.tokens) < sampling.min_tokens:
        yield from ((token, -torch.inf) for token in group.answer.stop_ids)


def _columns(entries: list[tuple[int, int, float]]) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    groups, tokens = (torch.tensor([entry[i] for entry in entries], dtype=torch.int64) for i in (0, 1))
    return (groups, tokens), torch.tensor([entry[2] for entry in entries], dtype=torch.float32)
