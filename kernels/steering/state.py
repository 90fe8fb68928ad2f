"""Steering state of running requests, and the request layout of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.transfer import to_device
from ..distributed.vocab_parallel import UNSHARDED, UnshardedVocab
from .coefficients import SteeringCoefficients
from .gumbel import wrap_int64

if TYPE_CHECKING:
    from collections.abc import Sequence


GREEDY_BELOW = 1e-5
"""A lower temperature is greedy: scores divided by it would overflow float32."""


@dataclass(frozen=True)
class RowSampling:
    """Sampling parameters of one request: temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


class SteeringState:
    """Structure of arrays with one row per running request; the number of rows doubles when it is full.

    params:        the fields of `SteeringCoefficients` and `RowSampling` by name, [rows] float64 or int64.
    prior_weights: w⁰ [rows, K], 0 beyond the request's objectives.
    rewards:       R_k [rows, K], without β.
    steps:         tokens generated so far [rows].
    contrast_slot: an OPAD request's row of `prev_contrast`, −1 for other methods.
    prev_contrast: OPAD's z_1 − z_0 of the previous step, [slots, columns of the logits]; undefined at step 0.
    host_params:   host copy of each row's coefficients and sampling parameters.
    vocab_size:    columns at or beyond it are never chosen (padding rows of the embedding).
    shard:         the part of the vocabulary that the columns hold.
    """

    def __init__(
        self, vocab_size: int, device: torch.device | str = "cpu", shard: UnshardedVocab = UNSHARDED
    ) -> None:
        self.vocab_size, self.device, self.shard = vocab_size, torch.device(device), shard
        defaults = {**vars(SteeringCoefficients()), **vars(RowSampling())}
        self.params = {
            name: torch.zeros(0, dtype=torch.int64 if isinstance(v, int) else torch.float64, device=device)
            for name, v in defaults.items()
        }
        self.prior_weights = torch.zeros(0, 1, dtype=torch.float64, device=device)
        self.rewards = torch.zeros_like(self.prior_weights)
        self.steps = torch.zeros(0, dtype=torch.int64, device=device)
        self.contrast_slot = torch.zeros_like(self.steps)
        self.prev_contrast = torch.zeros(0, 0, device=device)
        self.host_params: dict[int, tuple[SteeringCoefficients, RowSampling]] = {}
        self._contrast_slots: dict[int, int] = {}

    def add_request(
        self, row: int, coefficients: SteeringCoefficients, weights: Sequence[float], sampling: RowSampling
    ) -> None:
        """Add a request in `row`: its coefficients, w⁰ (one weight per objective branch) and sampling."""
        values = {**vars(coefficients), **vars(sampling), "seed": wrap_int64(sampling.seed)}
        self._reserve(row + 1, len(weights))
        row_slice = slice(row, row + 1)  # an integer index would block the host on a GPU
        for name, value in values.items():
            self.params[name][row_slice] = value
        self.prior_weights[row_slice] = 0
        (prior,) = to_device(self.device, np.array(weights, np.float64))
        self.prior_weights[row, : len(weights)] = prior
        self.rewards[row_slice] = 0
        self.steps[row_slice] = 0
        self.host_params[row] = coefficients, sampling
        self.contrast_slot[row_slice] = (
            self._contrast_slots.setdefault(row, len(self._contrast_slots))
            if coefficients.prev_contrast_coef
            else -1
        )

    def reserve_contrast(self, num_logits: int) -> Tensor:
        """Grow `prev_contrast` to `num_logits` columns and a row per OPAD request so far, and return it."""
        new_rows, new_columns = (
            len(self._contrast_slots) - len(self.prev_contrast),
            num_logits - self.prev_contrast.shape[1],
        )
        if new_rows > 0 or new_columns > 0:
            self.prev_contrast = pad(self.prev_contrast, (0, max(new_columns, 0), 0, max(new_rows, 0)))
        return self.prev_contrast

    def _reserve(self, num_rows: int, num_objectives: int) -> None:
        capacity = len(self.steps)
        new_rows, new_columns = (
            max(num_rows, 2 * capacity) - capacity if num_rows > capacity else 0,
            num_objectives - self.prior_weights.shape[1],
        )
        if new_rows:
            self.params = {name: pad(param, (0, new_rows)) for name, param in self.params.items()}
            self.steps, self.contrast_slot = (
                pad(self.steps, (0, new_rows)),
                pad(self.contrast_slot, (0, new_rows), value=-1),
            )
        if new_rows or new_columns > 0:
            self.prior_weights, self.rewards = (
                pad(x, (0, max(new_columns, 0), 0, new_rows)) for x in (self.prior_weights, self.rewards)
            )


class StateView(dict[str, Tensor]):
    """The state's parameters for the requests of a step, [requests] each, gathered on first access."""

    def __init__(self, state: SteeringState, state_rows: Tensor) -> None:
        super().__init__()
        self._params, self._state_rows = state.params, state_rows

    def __missing__(self, name: str) -> Tensor:
        values = self[name] = self._params[name][self._state_rows]
        return values


@dataclass(frozen=True)
class RequestLayout:
    """Which rows of the logits belong to which request.

    state_rows [requests]: the request's row of the `SteeringState`. row_start, num_rows [requests]: its rows
    of the logits. branch_of_row, request_of_row [rows]: each row's branch, 0 for the base, and its request.
    max_rows: the most rows of a request. host_state_rows: host copy of `state_rows`, empty if unknown. Rows
    are in branch order; a branch without influence may be left out, the base only where
    `SteeringCoefficients.needs_base` is false.
    """

    state_rows: Tensor
    row_start: Tensor
    num_rows: Tensor
    branch_of_row: Tensor
    request_of_row: Tensor
    max_rows: int
    host_state_rows: tuple[int, ...] = ()

    @classmethod
    def from_branches(
        cls, requests: Sequence[tuple[int, Sequence[int]]], device: torch.device | str = "cpu"
    ) -> RequestLayout:
        """Build from (state row, branches run) of each request, in the order of the logits."""
        counts = [len(branches) for _, branches in requests]
        arrays = (
            [state_rows for state_rows, _ in requests],
            [sum(counts[:index]) for index in range(len(counts))],
            counts,
            [branch_of_row for _, branches in requests for branch_of_row in branches],
            [index for index, num_rows in enumerate(counts) for _ in range(num_rows)],
        )
        tensors = to_device(torch.device(device), *(np.array(array, np.int64) for array in arrays))
        table, row_start, count, branch, request_of_row = tensors
        host_state_rows = tuple(arrays[0])
        return cls(
            table,
            row_start,
            count,
            branch,
            request_of_row,
            max_rows=max(counts),
            host_state_rows=host_state_rows,
        )

    def combine(self, logits: Tensor, coefficients: Tensor) -> Tensor:
        """Σ coefficients · logits over each request's rows: [rows, vocab], [rows] → [requests, vocab].

        Sums elementwise in row order, so that a request's sum does not depend on other requests.
        """
        uniform = len(logits) == self.max_rows * len(self.state_rows)
        out = logits.new_zeros(len(self.state_rows), logits.shape[1])
        for k in range(self.max_rows):
            row = self.row_start + (self.num_rows - 1).clamp(max=k)
            coef = torch.where(self.num_rows > k, coefficients[row], 0.0).to(logits.dtype)
            term = logits.unflatten(0, (-1, self.max_rows))[:, k] if uniform else logits[row]
            out.addcmul_(term, coef[:, None])
        return out


@dataclass(frozen=True)
class LogitEdits:
    """Sparse edits of a step's scores, before temperature.

    bias_index, repetition_index: (requests, tokens) that index the scores. bias is added, −inf bans
    (logit_bias, presence and frequency penalties); repetition divides positive scores and multiplies
    negative ones.
    """

    bias_index: tuple[Tensor, Tensor]
    bias: Tensor
    repetition_index: tuple[Tensor, Tensor]
    repetition: Tensor

    @classmethod
    def empty(cls, device: torch.device) -> LogitEdits:
        """Edits that change nothing."""
        no_index, no_values = torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, device=device)
        return cls((no_index, no_index), no_values, (no_index, no_index), no_values)

    def apply(self, scores: Tensor) -> None:
        """Edit scores [requests, vocab] in place."""
        scores.index_put_(self.bias_index, self.bias.to(scores.dtype), accumulate=True)
        values = scores[self.repetition_index]
        scores[self.repetition_index] = torch.where(
            values > 0, values / self.repetition, values * self.repetition
        )
