"""What the steering steps need to know: of each running request, and of one step's layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.transfer import send
from ..distributed.vocab_parallel import WHOLE, Whole
from .coefficients import Program
from .gumbel import signed

if TYPE_CHECKING:
    from collections.abc import Sequence


GREEDY_BELOW = 1e-5
"""A temperature under this is greedy: scores divided by it would leave float32."""


@dataclass(frozen=True)
class Draw:
    """How one request draws its tokens: temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


class SteerTable:
    """One row for each running request, in columns; has twice as many when they are not enough.

    columns:   the fields of `Program` and `Draw` by name, [rows] float64 or int64.
    asked:     w⁰ [rows, K], 0 beyond a request's own objectives.
    rewards:   R_k [rows, K], before β.
    steps:     tokens chosen so far [rows].
    slot:      which row of `contrast` a request of OPAD's has, −1 for others.
    contrast:  OPAD's z_1 − z_0 of the step before, [slots, width of the logits]; means nothing at step 0.
    admitted:  what each row was admitted with, known to the host.
    vocab:     columns at or beyond it are never chosen (rows of the embedding that no token uses).
    shard:     which part of the vocabulary the columns are.
    """

    def __init__(self, vocab: int, device: torch.device | str = "cpu", shard: Whole = WHOLE) -> None:
        self.vocab, self.device, self.shard = vocab, torch.device(device), shard
        defaults = {**vars(Program()), **vars(Draw())}
        self.columns = {
            name: torch.zeros(0, dtype=torch.int64 if isinstance(v, int) else torch.float64, device=device)
            for name, v in defaults.items()
        }
        self.asked = torch.zeros(0, 1, dtype=torch.float64, device=device)
        self.rewards = torch.zeros_like(self.asked)
        self.steps = torch.zeros(0, dtype=torch.int64, device=device)
        self.slot = torch.zeros_like(self.steps)
        self.contrast = torch.zeros(0, 0, device=device)
        self.admitted: dict[int, tuple[Program, Draw]] = {}
        self._slots: dict[int, int] = {}

    def admit(self, row: int, program: Program, weights: Sequence[float], draw: Draw) -> None:
        """Starts a request in `row`: its method, w⁰ (one weight for each objective branch) and its draw."""
        values = {**vars(program), **vars(draw), "seed": signed(draw.seed)}
        self._reserve(row + 1, len(weights))
        own = slice(row, row + 1)  # a number alone would be copied to a GPU while the host waits
        for name, value in values.items():
            self.columns[name][own] = value
        self.asked[own] = 0
        (asked,) = send(self.device, np.array(weights, np.float64))
        self.asked[row, : len(weights)] = asked
        self.rewards[own] = 0
        self.steps[own] = 0
        self.admitted[row] = program, draw
        self.slot[own] = self._slots.setdefault(row, len(self._slots)) if program.delay else -1

    def hold(self, width: int) -> Tensor:
        """`contrast`, with a row of this width for every request admitted with a delay so far."""
        down, right = len(self._slots) - len(self.contrast), width - self.contrast.shape[1]
        if down > 0 or right > 0:
            self.contrast = pad(self.contrast, (0, max(right, 0), 0, max(down, 0)))
        return self.contrast

    def _reserve(self, rows: int, objectives: int) -> None:
        held = len(self.steps)
        down, right = max(rows, 2 * held) - held if rows > held else 0, objectives - self.asked.shape[1]
        if down:
            self.columns = {name: pad(column, (0, down)) for name, column in self.columns.items()}
            self.steps, self.slot = pad(self.steps, (0, down)), pad(self.slot, (0, down), value=-1)
        if down or right > 0:
            self.asked, self.rewards = (
                pad(x, (0, max(right, 0), 0, down)) for x in (self.asked, self.rewards)
            )


class Columns(dict[str, Tensor]):
    """The table's columns for the rows of a step, [rows] each, gathered when they are first asked for."""

    def __init__(self, table: SteerTable, rows: Tensor) -> None:
        super().__init__()
        self._held, self._rows = table.columns, rows

    def __missing__(self, name: str) -> Tensor:
        found = self[name] = self._held[name][self._rows]
        return found


@dataclass(frozen=True)
class Groups:
    """Which rows of the logits belong to which request.

    table [groups]: the request's row of the SteerTable. first, count [groups]: its rows of the logits.
    branch, owner [rows]: which branch each row is, 0 for the base, and of which group. width: the most rows
    of a group. rows: `table` as the host knows it, empty where it does not. Rows stand in the order of
    branches; a branch that cannot matter may be left out, the base only where `Program.needs_base` is false.
    """

    table: Tensor
    first: Tensor
    count: Tensor
    branch: Tensor
    owner: Tensor
    width: int
    rows: tuple[int, ...] = ()

    @classmethod
    def of(cls, requests: Sequence[tuple[int, Sequence[int]]], device: torch.device | str = "cpu") -> Groups:
        """From (table row, branches run) of each request, in the order of the logits."""
        counts = [len(branches) for _, branches in requests]
        columns = (
            [table for table, _ in requests],
            [sum(counts[:index]) for index in range(len(counts))],
            counts,
            [branch for _, branches in requests for branch in branches],
            [index for index, count in enumerate(counts) for _ in range(count)],
        )
        tensors = send(torch.device(device), *(np.array(column, np.int64) for column in columns))
        table, first, count, branch, owner = tensors
        rows = tuple(columns[0])
        return cls(table, first, count, branch, owner, width=max(counts), rows=rows)

    def combine(self, logits: Tensor, coefficients: Tensor) -> Tensor:
        """Σ coefficients · logits over each group's rows: [rows, vocab], [rows] → [groups, vocab].

        In the order of the rows and elementwise, so that a group's sum does not depend on the others.
        """
        uniform = len(logits) == self.width * len(self.table)
        total = logits.new_zeros(len(self.table), logits.shape[1])
        for index in range(self.width):
            row = self.first + (self.count - 1).clamp(max=index)
            factor = torch.where(self.count > index, coefficients[row], 0.0).to(logits.dtype)
            term = logits.unflatten(0, (-1, self.width))[:, index] if uniform else logits[row]
            total.addcmul_(term, factor[:, None])
        return total


@dataclass(frozen=True)
class Edits:
    """Changes to single scores of a step, before temperature.

    bias_at, repetition_at: (groups, tokens) that index the scores. bias is added, −inf bans (logit_bias,
    presence and frequency penalties); repetition divides positive scores and multiplies negative ones.
    """

    bias_at: tuple[Tensor, Tensor]
    bias: Tensor
    repetition_at: tuple[Tensor, Tensor]
    repetition: Tensor

    @classmethod
    def none(cls, device: torch.device) -> Edits:
        """Those that change nothing."""
        nowhere, nothing = torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, device=device)
        return cls((nowhere, nowhere), nothing, (nowhere, nowhere), nothing)

    def apply(self, scores: Tensor) -> None:
        """Changes scores [groups, vocab] in place."""
        scores.index_put_(self.bias_at, self.bias.to(scores.dtype), accumulate=True)
        held = scores[self.repetition_at]
        scores[self.repetition_at] = torch.where(held > 0, held / self.repetition, held * self.repetition)
