"""One copy of a model under a load, and how fast its tokens come: a roofline and Little's law.

A replica decodes n requests of B branches in lockstep, which takes S(n) a step. Each request also takes P of
prompts, and while it decodes its O tokens the replica does n/O prompts for every token of it, so

    TPOT(n) = S(n) + n P / O            between two tokens of a request
    rate(n) = n / (O TPOT(n))           requests a second that leave, and come (Little)

S grows slower than n, so that rate grows with n until the cache has no room for one more. S is the sum over a
step's operations of the longer of reading and computing, by a share of the device's peaks, with what devices
that hold a model together tell each other: two all-reduces a layer, and the logits.

The first token waits for prompts that came before (an M/D/1 queue), for half a step, and for its own prompts,
between whose pieces the others decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil, floor
from typing import TYPE_CHECKING

from ...models import roofline
from ...models.roofline import SequenceShape

if TYPE_CHECKING:
    from ...models.config import ModelConfig
    from ..common.datasheets import Gpu


@dataclass(frozen=True)
class Demand:
    """What is asked for: requests a second, branches of each, tokens of a branch's prompt and of an answer.

    shared_len: tokens at the prompts' beginning that all branches have, in whole pages.
    """

    rps: float
    branches: int
    prompt_len: int
    output_len: int
    shared_len: int = 0

    @property
    def prefill_tokens(self) -> int:
        """Tokens of prompts that a request has computed."""
        return self.shared_len + self.branches * (self.prompt_len - self.shared_len)

    @property
    def kv_tokens(self) -> int:
        """Tokens that a request holds at its end."""
        return self.prefill_tokens + self.branches * self.output_len


@dataclass(frozen=True)
class Assumptions:
    """What the model rests on beside sizes and peaks. efficiency: share of the peaks that a step reaches.
    message_latency: seconds of a message among devices, however short. memory_utilization: share of a
    device's that is used. load: of a replica's highest rate. max_batched_tokens: most of one step. tpot:
    most seconds between tokens, or None.
    """

    efficiency: float
    message_latency: float
    memory_utilization: float
    load: float
    max_batched_tokens: int
    tpot: float | None = None


@dataclass(frozen=True)
class Replica:
    """One copy of the model on `tp_size` devices, and what it does with requests of this kind."""

    config: ModelConfig
    itemsize: int
    weight_bytes: float  # bytes of the weights
    demand: Demand
    gpu: Gpu
    assumptions: Assumptions
    tp_size: int

    @property
    def weight_bytes_per_gpu(self) -> float:
        """Bytes on each device."""
        return self.weight_bytes / self.tp_size

    @property
    def kv_bytes_per_request(self) -> float:
        """Bytes of one request's keys and values at its end, on all devices."""
        return self.demand.kv_tokens * self.config.kv_elements_per_token * self.itemsize

    @property
    def workspace_bytes(self) -> float:
        """Bytes on each device of the largest step, but for its logits."""
        return roofline.workspace_bytes(
            self.config, self.assumptions.max_batched_tokens, 0, self.itemsize, self.tp_size
        )

    @property
    def kv_cache_bytes(self) -> float:
        """Bytes on each device that requests may take."""
        return (
            self.gpu.memory * self.assumptions.memory_utilization
            - self.weight_bytes_per_gpu
            - self.workspace_bytes
        )

    @cached_property
    def max_requests(self) -> int:
        """Requests that there is room for, and time where that is limited."""
        logits = roofline.workspace_bytes(self.config, 0, self.demand.branches, self.itemsize)
        max_fit = max(0, floor(self.kv_cache_bytes / (self.kv_bytes_per_request / self.tp_size + logits)))
        max_tpot = self.assumptions.tpot
        if max_tpot is None or not max_fit or self.tpot(max_fit) <= max_tpot:
            return max_fit
        low, high = 0, max_fit  # tpot grows
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.tpot(middle) <= max_tpot else (low, middle)
        return low

    def decode_ops(self, num_requests: float) -> list[roofline.StepOp]:
        """The operations of a decoding step on each device."""
        mean_len = self.demand.prompt_len + self.demand.output_len / 2
        num_rows = num_requests * self.demand.branches
        return roofline.decode_step_ops(self.config, num_rows, mean_len, self.itemsize, self.tp_size)

    def min_step_time(self, num_requests: float) -> float:
        """Seconds of a decoding step at the peaks."""
        num_rows = num_requests * self.demand.branches
        return self._compute_time(self.decode_ops(num_requests)) + self._comm_time(num_rows, num_rows)

    def step_time(self, num_requests: float) -> float:
        """Seconds of a decoding step, S(n)."""
        return self.min_step_time(num_requests) / self.assumptions.efficiency + self._message_time

    @cached_property
    def prefill_steps(self) -> int:
        """Steps that a request's prompts are cut into."""
        return ceil(self.demand.prefill_tokens / self.assumptions.max_batched_tokens)

    @cached_property
    def prefill_ops(self) -> list[roofline.StepOp]:
        """The operations of one request's prompts."""
        demand = self.demand
        unshared = SequenceShape(demand.branches, demand.prompt_len, demand.prompt_len - demand.shared_len)
        shapes = (
            [SequenceShape(1, demand.shared_len, demand.shared_len), unshared]
            if demand.shared_len
            else [unshared]
        )
        return roofline.step_ops(
            self.config, shapes, demand.branches, self.itemsize, self.tp_size, self.prefill_steps
        )

    @cached_property
    def prefill_time(self) -> float:
        """Seconds of one request's prompts, P."""
        seconds = self._compute_time(self.prefill_ops) + self._comm_time(
            self.demand.prefill_tokens, self.demand.branches
        )
        return seconds / self.assumptions.efficiency + self.prefill_steps * self._message_time

    def tpot(self, num_requests: float) -> float:
        """Seconds between two tokens of a request while so many are decoded; one alone decodes alone."""
        return (
            self.step_time(max(num_requests, 1)) + num_requests * self.prefill_time / self.demand.output_len
        )

    def request_rate(self, num_requests: float) -> float:
        """Requests a second."""
        return num_requests / (self.demand.output_len * self.tpot(num_requests))

    def concurrency(self, rate: float) -> float:
        """Requests that are decoded at once at that rate, which is at most `rate(most)`."""
        low, high = 0.0, float(self.max_requests)
        while high - low > 1e-9 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.request_rate(middle) < rate else (low, middle)
        return high

    def ttft(self, rate: float) -> float:
        """Seconds to the first token at that rate."""
        utilization, step_time = rate * self.prefill_time, self.step_time(max(self.concurrency(rate), 1))
        return (
            utilization * self.prefill_time / (2 * (1 - utilization))
            + step_time / 2
            + self.prefill_time
            + (self.prefill_steps - 1) * step_time
        )

    def _compute_time(self, ops: list[roofline.StepOp]) -> float:
        return sum(op.roofline_seconds(self.gpu.bandwidth, self.gpu.flops) for op in ops)

    def _comm_time(self, num_tokens: float, num_rows: float) -> float:
        """Two all-reduces of hidden states a layer, in a ring, and the logits' parts to everyone."""
        if self.tp_size == 1:
            return 0.0
        all_reduced = 2 * self.config.num_layers * num_tokens * self.config.hidden_size
        time_per_number = (self.tp_size - 1) / self.tp_size * self.itemsize / self.gpu.link_bandwidth
        return (2 * all_reduced + num_rows * self.config.vocab_size) * time_per_number

    @property
    def _message_time(self) -> float:
        """What a step's messages take however short they are."""
        return (
            (2 * self.config.num_layers + 1) * self.assumptions.message_latency if self.tp_size > 1 else 0.0
        )
