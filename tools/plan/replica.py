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
from ...models.roofline import Run

if TYPE_CHECKING:
    from ...models.config import ModelConfig
    from ..common.datasheets import Gpu


@dataclass(frozen=True)
class Demand:
    """What is asked for: requests a second, branches of each, tokens of a branch's prompt and of an answer.

    shared: tokens at the prompts' beginning that all branches have, in whole pages.
    """

    rps: float
    branches: int
    prompt: int
    output: int
    shared: int = 0

    @property
    def computed(self) -> int:
        """Tokens of prompts that a request has computed."""
        return self.shared + self.branches * (self.prompt - self.shared)

    @property
    def held(self) -> int:
        """Tokens that a request holds at its end."""
        return self.computed + self.branches * self.output


@dataclass(frozen=True)
class Terms:
    """What the model rests on beside sizes and peaks. efficiency: share of the peaks that a step reaches.
    message: seconds of a message among devices, however short. memory: share of a device's that is used.
    load: of a replica's highest rate. tokens: most of one step. tpot: most seconds between tokens, or None.
    """

    efficiency: float
    message: float
    memory: float
    load: float
    tokens: int
    tpot: float | None = None


@dataclass(frozen=True)
class Replica:
    """One copy of the model on `shares` devices, and what it does with requests of this kind."""

    config: ModelConfig
    itemsize: int
    held: float  # bytes of the weights
    demand: Demand
    gpu: Gpu
    terms: Terms
    shares: int

    @property
    def weights(self) -> float:
        """Bytes on each device."""
        return self.held / self.shares

    @property
    def kv_request(self) -> float:
        """Bytes of one request's keys and values at its end, on all devices."""
        return self.demand.held * self.config.kv_size * self.itemsize

    @property
    def workspace(self) -> float:
        """Bytes on each device of the largest step, but for its logits."""
        return roofline.workspace_bytes(self.config, self.terms.tokens, 0, self.itemsize, self.shares)

    @property
    def room(self) -> float:
        """Bytes on each device that requests may take."""
        return self.gpu.memory * self.terms.memory - self.weights - self.workspace

    @cached_property
    def most(self) -> int:
        """Requests that there is room for, and time where that is limited."""
        logits = roofline.workspace_bytes(self.config, 0, self.demand.branches, self.itemsize)
        fit = max(0, floor(self.room / (self.kv_request / self.shares + logits)))
        limit = self.terms.tpot
        if limit is None or not fit or self.tpot(fit) <= limit:
            return fit
        low, high = 0, fit  # tpot grows
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.tpot(middle) <= limit else (low, middle)
        return low

    def decoding(self, requests: float) -> list[roofline.Part]:
        """The operations of a decoding step on each device."""
        mean = self.demand.prompt + self.demand.output / 2
        rows = requests * self.demand.branches
        return roofline.decoding(self.config, rows, mean, self.itemsize, self.shares)

    def floor(self, requests: float) -> float:
        """Seconds of a decoding step at the peaks."""
        rows = requests * self.demand.branches
        return self._computing(self.decoding(requests)) + self._sending(rows, rows)

    def step(self, requests: float) -> float:
        """Seconds of a decoding step, S(n)."""
        return self.floor(requests) / self.terms.efficiency + self._messages

    @cached_property
    def pieces(self) -> int:
        """Steps that a request's prompts are cut into."""
        return ceil(self.demand.computed / self.terms.tokens)

    @cached_property
    def prompts(self) -> list[roofline.Part]:
        """The operations of one request's prompts."""
        demand = self.demand
        own = Run(demand.branches, demand.prompt, demand.prompt - demand.shared)
        runs = [Run(1, demand.shared, demand.shared), own] if demand.shared else [own]
        return roofline.parts(self.config, runs, demand.branches, self.itemsize, self.shares, self.pieces)

    @cached_property
    def prefill(self) -> float:
        """Seconds of one request's prompts, P."""
        seconds = self._computing(self.prompts) + self._sending(self.demand.computed, self.demand.branches)
        return seconds / self.terms.efficiency + self.pieces * self._messages

    def tpot(self, requests: float) -> float:
        """Seconds between two tokens of a request while so many are decoded; one alone decodes alone."""
        return self.step(max(requests, 1)) + requests * self.prefill / self.demand.output

    def rate(self, requests: float) -> float:
        """Requests a second."""
        return requests / (self.demand.output * self.tpot(requests))

    def in_flight(self, rate: float) -> float:
        """Requests that are decoded at once at that rate, which is at most `rate(most)`."""
        low, high = 0.0, float(self.most)
        while high - low > 1e-9 * high:
            middle = (low + high) / 2
            low, high = (middle, high) if self.rate(middle) < rate else (low, middle)
        return high

    def ttft(self, rate: float) -> float:
        """Seconds to the first token at that rate."""
        busy, step = rate * self.prefill, self.step(max(self.in_flight(rate), 1))
        return busy * self.prefill / (2 * (1 - busy)) + step / 2 + self.prefill + (self.pieces - 1) * step

    def _computing(self, parts: list[roofline.Part]) -> float:
        return sum(part.seconds(self.gpu.bandwidth, self.gpu.products) for part in parts)

    def _sending(self, tokens: float, rows: float) -> float:
        """Two all-reduces of hidden states a layer, in a ring, and the logits' parts to everyone."""
        if self.shares == 1:
            return 0.0
        sums = 2 * self.config.num_layers * tokens * self.config.hidden_size
        apart = (self.shares - 1) / self.shares * self.itemsize / self.gpu.link
        return (2 * sums + rows * self.config.vocab_size) * apart

    @property
    def _messages(self) -> float:
        """What a step's messages take however short they are."""
        return (2 * self.config.num_layers + 1) * self.terms.message if self.shares > 1 else 0.0
