"""Steering state of running requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..common.transfer import to_device
from ..distributed.vocab_parallel import UNSHARDED, UnshardedVocab
from .coefficients import SteeringCoefficients
from .feature import Feature, StepFeatures
from .features import FEATURES
from .gumbel import wrap_int64
from .sampling import RowSampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .layout import RequestLayout


INT_COLUMNS = {
    name: type(value) is int
    for name, value in (*vars(RowSampling()).items(), *vars(SteeringCoefficients()).items())
    if name != "seed"
}
"""The columns of `SteeringState.params`, and whether each is an integer."""
COLUMN_INDEX = {name: index for index, name in enumerate(INT_COLUMNS)}
"""Temperature is the first: the fused head reads it as a tensor of its own, which must be aligned."""


class SteeringState:
    """Structure of arrays with one row per running request; the number of rows doubles when it is full.

    params:        the fields of `SteeringCoefficients` and `RowSampling` but the seed, in the order of
                   `COLUMN_INDEX`, [columns, rows] float64.
    seeds:         sampling seeds [rows] int64.
    prior_weights: w⁰, or with gains the intensities, [rows, K], 0 beyond the request's objectives.
    rewards:       R_k [rows, K], without β.
    branch_rewards, base_rewards: E_k and P_k [rows, K], see `gains`.
    steps:         tokens generated so far [rows].
    contrast_slot: an OPAD request's row of `prev_contrast`, −1 for other methods.
    prev_contrast: OPAD's z_1 − z_0 of the previous step, [slots, columns of the logits]; undefined at step 0.
    host_params:   host copy of each row's coefficients and sampling parameters.
    host_features: the features that each row uses.
    vocab_size:    columns at or beyond it are never chosen (padding rows of the embedding).
    shard:         the part of the vocabulary that the columns hold.
    """

    def __init__(
        self, vocab_size: int, device: torch.device | str = "cpu", shard: UnshardedVocab = UNSHARDED
    ) -> None:
        self.vocab_size, self.device, self.shard = vocab_size, torch.device(device), shard
        self.params = torch.zeros(len(COLUMN_INDEX), 0, dtype=torch.float64, device=device)
        self.prior_weights = torch.zeros(0, 1, dtype=torch.float64, device=device)
        self.rewards = torch.zeros_like(self.prior_weights)
        self.branch_rewards = torch.zeros_like(self.prior_weights)
        self.base_rewards = torch.zeros_like(self.prior_weights)
        self.steps = torch.zeros(0, dtype=torch.int64, device=device)
        self.seeds, self.contrast_slot = torch.zeros_like(self.steps), torch.zeros_like(self.steps)
        self.prev_contrast = torch.zeros(0, 0, device=device)
        self.host_params: dict[int, tuple[SteeringCoefficients, RowSampling]] = {}
        self.host_features: dict[int, frozenset[Feature]] = {}
        self._contrast_slots: dict[int, int] = {}

    def add_request(
        self, row: int, coefficients: SteeringCoefficients, weights: Sequence[float], sampling: RowSampling
    ) -> None:
        """Add a request in `row`: its coefficients, w⁰ (one weight per objective branch) and sampling."""
        columns = {**vars(coefficients), **vars(sampling)}
        self._reserve(row + 1, len(weights))
        row_slice = slice(row, row + 1)  # an integer index would block the host on a GPU
        values, prior = to_device(
            self.device,
            np.array([columns[name] for name in COLUMN_INDEX], np.float64),
            np.array(weights, np.float64),
        )
        self.params[:, row], self.seeds[row_slice] = values, wrap_int64(sampling.seed)
        self.prior_weights[row_slice] = 0
        self.prior_weights[row, : len(weights)] = prior
        for values in (self.rewards, self.branch_rewards, self.base_rewards):
            values[row_slice] = 0
        self.steps[row_slice] = 0
        self.host_params[row] = coefficients, sampling
        self.host_features[row] = frozenset(f for f in FEATURES if f.is_used(columns))
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

    def features(self, layout: RequestLayout) -> StepFeatures:
        """The features that the requests of a step use; all requests where the host does not know which."""
        rows = layout.host_state_rows or tuple(self.host_features)
        return StepFeatures(frozenset[Feature]().union(*(self.host_features[row] for row in rows)))

    def _reserve(self, num_rows: int, num_objectives: int) -> None:
        capacity = len(self.steps)
        new_rows, new_columns = (
            max(num_rows, 2 * capacity) - capacity if num_rows > capacity else 0,
            num_objectives - self.prior_weights.shape[1],
        )
        if new_rows:
            self.params = pad(self.params, (0, new_rows))
            self.steps, self.seeds, self.contrast_slot = (
                pad(self.steps, (0, new_rows)),
                pad(self.seeds, (0, new_rows)),
                pad(self.contrast_slot, (0, new_rows), value=-1),
            )
        if new_rows or new_columns > 0:
            self.prior_weights, self.rewards, self.branch_rewards, self.base_rewards = (
                pad(x, (0, max(new_columns, 0), 0, new_rows))
                for x in (self.prior_weights, self.rewards, self.branch_rewards, self.base_rewards)
            )


class StateView(dict[str, Tensor]):
    """The state's columns for the requests of a step by name, [requests] each."""

    def __init__(self, state: SteeringState, state_rows: Tensor) -> None:
        super().__init__()
        self._params = state.params[:, state_rows]
        self["seed"] = state.seeds[state_rows]

    def __missing__(self, name: str) -> Tensor:
        column = self._params[COLUMN_INDEX[name]]
        values = self[name] = column.long() if INT_COLUMNS[name] else column
        return values
