"""Carries out a plan: one ragged forward over all branches, then one steering step over all ready groups."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels.attention_metadata import Segment
from ...kernels.common.errors import RunError
from ...kernels.common.transfer import fetch, send
from ...kernels.cpu.linear import filled
from ...kernels.reference.paged_kv_cache import DeviceKV
from ...kernels.steering.state import Groups, SteerTable
from ...models.common.memory import enough
from ...models.forward import forward
from ..outputs import Pick
from .cuda_graphs import DecodeGraphs, captured
from .in_flight import Flight
from .step_input import Admitted, Order

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ...kernels.backend import Backend, Cache
    from ...kernels.steering.step import Choice
    from ...models.llama import Llama
    from ..scheduling.scheduler import Plan
    from ..sequence.sequence import Group


SCORED = 768
"""Tokens whose scores are on the device at once; three divides it, see `linear.steady_rows`."""


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Neither gradients nor subclasses of Tensor: looking for those takes longer than some operations do."""
    with torch.inference_mode(), torch._C.DisableTorchFunctionSubclass():
        yield


class Runner:
    """The model, its KV cache and the table of running requests; `launch` moves all of them on.

    new_cache: makes a cache of so many pages; `pages` is how many its own has.
    lead: what to do about an order before and after it is carried out, where others hold parts of the model.
    choose: see `kernels.lm_head.choose`. compiles: what counts the kernels that its launches compile, where
    any are. graphs: what of decoding is captured, where anything is.
    steps, step_seconds, steer_seconds: how many, how long the host was at them, and how much of it with
    choosing tokens, from hidden states on: the vocabulary's product and steering, on a GPU their launches.
    """

    def __init__(
        self,
        model: Llama,
        new_cache: Callable[[int], Cache],
        pages: int,
        table: SteerTable,
        backend: Backend,
        lead: Callable[[Order], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self.new_cache, self.table, self.lead = model, new_cache, table, lead
        self.pages, self.cache, self.device = pages, new_cache(pages), model.device
        self.choose = backend.choose
        self.compiles = backend.compiles() if backend.compiles else None
        self.graphs: DecodeGraphs | None = None
        self.steps, self.step_seconds, self.steer_seconds = 0, 0.0, 0.0
        self._chosen = torch.zeros(0, dtype=torch.int64, device=self.device)  # by the step before

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Launches within go to this runner's GPU, whichever the thread's own is, and are counted as its."""
        device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with device, self.compiles.by_this_thread() if self.compiles else nullcontext():
            yield

    def capture(self, rows: int, length: int) -> None:
        """Captures decoding steps, of up to so many rows whose longest text is so long. On a GPU alone."""
        assert isinstance(self.cache, DeviceKV), "only such a cache has a spare page"
        with plain_tensors(), self.on_device():
            self.graphs = DecodeGraphs(self.model, self.cache, rows, length, captured())
            torch.cuda.empty_cache()

    def admit(self, admitted: Admitted) -> None:
        """Writes a request's method and sampling into its row of the table."""
        self.table.admit(admitted.row, admitted.program, admitted.weights, admitted.draw)

    def launch(self, plan: Plan) -> Flight:
        """Begins to compute the plan's tokens; on a CPU that is all there is to do.

        Another plan may be launched before this one has landed.
        """
        start = time.perf_counter()
        order = Order.of(plan)
        with self.lead(order):
            choice = self._carry_out(order)
        with plain_tensors(), self.on_device():
            arrival = _on_host(choice) if choice else lambda: None
        if order.segments:
            self.steps += 1
            self.step_seconds += time.perf_counter() - start

        def land() -> Choice | None:
            start = time.perf_counter()
            found = arrival()
            self.step_seconds += time.perf_counter() - start
            return found

        return Flight(plan, land)

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each position, [tokens, vocab] float32 on the host.

        Raises RunError when the model gives no number there, or a GPU has no room for all of them at once.
        """
        with self.lead(Order(scored=list(token_ids))):
            found = self._score(token_ids)
        broken = found.isnan().any(-1).nonzero()[:, 0]
        if len(broken):
            place = int(broken[0]) + 1
            raise RunError(f"the model gave no finite score after token {place} of what was scored")
        return found

    def follow(self, order: Order) -> None:
        """Does here what the first process does for this order: the same calls, on another part."""
        if order.scored:
            self._score(order.scored)
        else:
            self._carry_out(order)

    def _carry_out(self, order: Order) -> Choice | None:
        with plain_tensors(), self.on_device():
            return self._step(order)

    def _step(self, order: Order) -> Choice | None:
        for admitted in order.admitted:
            self.admit(admitted)
        self.cache.swap(order.swaps)
        self.cache.clear(order.fresh)
        if not order.segments:
            return None
        hidden = self._hidden(order)
        if hidden is None:
            return None
        start = time.perf_counter()
        choice = self._choose(order, hidden)
        self._chosen = choice.tokens
        self.steer_seconds += time.perf_counter() - start
        return choice

    def _hidden(self, order: Order) -> torch.Tensor | None:
        """Those of all branches of the ready groups, in order, and of rows that only fill up, [rows, hidden];
        None without any."""
        chosen = self._chosen if order.follows else None
        inputs = (order.segments, order.token_ids, order.turned_by)
        hidden = self.graphs.run(*inputs, chosen) if self.graphs else None
        if hidden is None:
            hidden = forward(self.model, *inputs, self.cache, chosen)
        if not order.last:
            return None
        if self.device.type != "cpu" and order.last == list(range(len(order.last))):
            return hidden[: len(order.last)]
        (at,) = send(self.device, np.array(filled(order.last, self.device), np.int64))
        return hidden[at]

    def _choose(self, order: Order, hidden: torch.Tensor) -> Choice:
        model, first = self.model, self.table.shard.first
        return self.choose(
            model.head,
            hidden,
            Groups.of(order.groups, self.device),
            self.table,
            order.edits(range(first, first + model.config.vocab_size), self.device),
            trace=order.trace,
            top=order.top,
        )

    def _score(self, token_ids: Sequence[int]) -> torch.Tensor:
        rope, shard = self.model.config.rope, self.table.shard
        pages = -(-len(token_ids) // self.cache.block_size)
        segments = [Segment(0, len(token_ids), list(range(pages)))]
        advice = "score fewer tokens at once, or lower gpu_memory_utilization"
        with plain_tensors(), self.on_device(), enough(self.device, advice):
            cache = self.new_cache(pages)
            cache.clear(list(range(pages)))
            turned_by = [rope.turned_by(len(token_ids))] * len(token_ids)
            hidden = forward(self.model, segments, token_ids, turned_by, cache)
            parts = (self.model.logits(part) for part in hidden.split(SCORED))
            return torch.cat([shard.whole(shard.log_softmax(part)).cpu() for part in parts])[: len(token_ids)]


def _on_host(choice: Choice) -> Callable[[], Choice]:
    """Sends it there in one copy, which the result waits for; a CPU's is there."""
    if choice.tokens.device.type == "cpu":
        return lambda: choice
    names = [field.name for field in fields(choice) if field.name != "top"]
    arrived = fetch([*(getattr(choice, name) for name in names), *(choice.top or ())])

    def land() -> Choice:
        found = arrived()
        top = (found[-2], found[-1]) if choice.top else None
        return replace(choice, **dict(zip(names, found, strict=False)), top=top)

    return land


def split(choice: Choice, groups: Sequence[Group]) -> Iterator[Pick]:
    """The pick of each group, in the order in which they were steered."""
    tokens, failed, logprobs = choice.tokens.tolist(), choice.failed.tolist(), choice.logprob.tolist()
    weights, rewards = choice.weights.tolist(), choice.rewards.tolist()
    strength, kl, branches = choice.strength.tolist(), choice.kl.tolist(), choice.branch_logprobs.tolist()
    top_values, top_ids = (part.tolist() for part in choice.top) if choice.top else ([], [])
    first = 0
    for index, group in enumerate(groups):
        objectives, rows = len(group.prompts) - 1, len(group.branches)
        yield Pick(
            token=tokens[index],
            failed=failed[index],
            logprob=logprobs[index],
            weights=weights[index][:objectives],
            rewards=rewards[index][:objectives],
            strength=strength[index],
            kl=None if math.isnan(kl[index]) else kl[index],
            branch_logprobs=branches[first : first + rows],
            top=list(zip(top_ids[index], top_values[index], strict=True)) if top_ids else [],
        )
        first += rows
