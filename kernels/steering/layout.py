"""The layout of one step: which rows of the logits belong to which request, and changes to single scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..common.transfer import to_device

if TYPE_CHECKING:
    from collections.abc import Sequence


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

    @property
    def has_base(self) -> Tensor:
        """Whether the base branch is among a request's rows, [requests]."""
        return self.branch_of_row[self.row_start] == 0

    def combine(self, logits: Tensor, coefficients: Tensor) -> Tensor:
        """Σ coefficients · logits over each request's rows: [rows, vocab], [rows] → [requests, vocab].

        Sums elementwise in row order, so that a request's sum does not depend on other requests.
        """
        stacked, stacked_coefs = self.stack(logits), self.stack(coefficients)
        out = logits.new_zeros(len(self.state_rows), logits.shape[1])
        for k in range(self.max_rows):
            coef = torch.where(self.num_rows > k, stacked_coefs[:, k], 0.0).to(logits.dtype)
            out.addcmul_(stacked[:, k], coef[:, None])
        return out

    def first_rows(self, logits: Tensor) -> Tensor:
        """The first row of each request, [requests, vocab]; a view if all requests have as many rows."""
        is_uniform = len(logits) == self.max_rows * len(self.state_rows)
        return logits.unflatten(0, (-1, self.max_rows))[:, 0] if is_uniform else logits[self.row_start]

    def stack(self, values: Tensor) -> Tensor:
        """values [rows, …] as [requests, max_rows, …]: a view if all requests have as many rows, otherwise a
        copy in which the last row of a request fills up its places.
        """
        if len(values) == self.max_rows * len(self.state_rows):
            stacked: Tensor = values.unflatten(0, (-1, self.max_rows))
            return stacked
        places = torch.arange(self.max_rows, device=values.device)
        return values[self.row_start[:, None] + (self.num_rows[:, None] - 1).minimum(places)]


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
