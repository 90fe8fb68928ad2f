"""Performance model of one replica under a load: a roofline and Little's law.

A replica decodes n requests of B branches in lockstep, with S(n) seconds per step. Each request also takes P
seconds of prefill. While a request decodes its O tokens, the replica prefills n/O requests per token, so

    TPOT(n) = S(n) + n P / O            time between two tokens of a request
    rate(n) = n / (O TPOT(n))           requests per second that finish, and arrive (Little's law)

S grows slower than n, so the rate grows with n until the KV cache is full. S is the sum over a step's
operations of the larger of memory time and compute time, at a fraction of the device's peaks, plus the
communication of tensor parallelism: two all-reduces per layer, and the logits.

The first token waits for earlier prefills (an M/D/1 queue), for half a step, and for the request's prefill,
with a decoding step between its chunks.
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
    """The load: requests per second, branches of each, tokens of a branch's prompt and of an answer.

    shared_len: tokens of the prefix that all branches share, a multiple of the block size.
    """

    rps: float
    branches: int
    prompt_len: int
    output_len: int
    shared_len: int = 0

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens computed for a request."""
        return self.shared_len + self.branches * (self.prompt_len - self.shared_len)

    @property
    def kv_tokens(self) -> int:
        """Tokens that a request has in the KV cache at its end."""
        return self.prefill_tokens + self.branches * self.output_len


@dataclass(frozen=True)
class Assumptions:
    """Assumptions besides sizes and peaks. efficiency: fraction of the peaks that a step reaches.
    message_latency: minimum seconds of a message between devices. memory_utilization: used fraction of a
    device's memory. load: used fraction of a replica's maximum rate. max_batched_tokens: maximum tokens of a
    step. tpot: maximum seconds between tokens, or None.
    """

    efficiency: float
    message_latency: float
    memory_utilization: float
    load: float
    max_batched_tokens: int
    tpot: float | None = None


@dataclass(frozen=True)
class Replica:
    """One copy of the model on `tp_size` devices, under the load `demand`."""

    config: ModelConfig
    itemsize: int
    weight_bytes: float  # bytes of the weights
    demand: Demand
    gpu: Gpu
    assumptions: Assumptions
    tp_size: int

    @property
    def weight_bytes_per_gpu(self) -> float:
        """Bytes of weights on each device."""
        return self.weight_bytes / self.tp_size

    @property
    def kv_bytes_per_request(self) -> float:
        """Bytes of one request's KV cache at its end, on all devices together."""
        return self.demand.kv_tokens * self.config.kv_elements_per_token * self.itemsize

    @property
    def workspace_bytes(self) -> float:
        """Bytes on each device of the activations of the largest step, without logits."""
        return roofline.workspace_bytes(
            self.config, self.assumptions.max_batched_tokens, 0, self.itemsize, self.tp_size
        )

    @property
    def kv_cache_bytes(self) -> float:
        """Bytes on each device for the KV cache and logits of requests."""
        return (
            self.gpu.memory * self.assumptions.memory_utilization
            - self.weight_bytes_per_gpu
            - self.workspace_bytes
        )

    @cached_property
    def max_requests(self) -> int:
        """Maximum requests that fit in memory and meet the TPOT limit, if any."""
        logits = roofline.workspace_bytes(self.config, 0, self.demand.branches, self.itemsize)
        max_fit = max(0, floor(self.kv_cache_bytes / (self.kv_bytes_per_request / self.tp_size + logits)))
        max_tpot = self.assumptions.tpot
        if max_tpot is None or not max_fit or self.tpot(max_fit) <= max_tpot:
            return max_fit
        low, high = 0, max_fit  # tpot grows with the number of requests
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
        """Steps of a request's chunked prefill."""
        return ceil(self.demand.prefill_tokens / self.assumptions.max_batched_tokens)

    @cached_property
    def prefill_ops(self) -> list[roofline.StepOp]:
        """The operations of one request's prefill."""
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
        """Seconds of one request's prefill, P."""
        seconds = self._compute_time(self.prefill_ops) + self._comm_time(
            self.demand.prefill_tokens, self.demand.branches
        )
        return seconds / self.assumptions.efficiency + self.prefill_steps * self._message_time

    def tpot(self, num_requests: float) -> float:
        """Seconds between two tokens with `num_requests` in flight. A step has at least one request."""
        return (
            self.step_time(max(num_requests, 1)) + num_requests * self.prefill_time / self.demand.output_len
        )

    def request_rate(self, num_requests: float) -> float:
        """Requests per second with `num_requests` in flight."""
        return num_requests / (self.demand.output_len * self.tpot(num_requests))

    def concurrency(self, rate: float) -> float:
        """Requests in flight at `rate`, which is at most `request_rate(max_requests)`. Found by bisection."""
        low, high = 0.0, float(self.max_requests)
        while high - low > 1e-9 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.request_rate(middle) < rate else (low, middle)
        return high

    def ttft(self, rate: float) -> float:
        """Seconds to the first token at `rate` requests per second."""
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
        """Seconds of two ring all-reduces of hidden states per layer, and of the all-gather of logits."""
        if self.tp_size == 1:
            return 0.0
        all_reduced = 2 * self.config.num_layers * num_tokens * self.config.hidden_size
        time_per_number = (self.tp_size - 1) / self.tp_size * self.itemsize / self.gpu.link_bandwidth
        return (2 * all_reduced + num_rows * self.config.vocab_size) * time_per_number

    @property
    def _message_time(self) -> float:
        """Seconds of latency of a step's messages."""
        return (
            (2 * self.config.num_layers + 1) * self.assumptions.message_latency if self.tp_size > 1 else 0.0
        )
