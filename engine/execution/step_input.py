"""Serializable input of one step, the same for every tensor-parallel rank."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels.attention_metadata import SequenceChunk
from ...kernels.common.transfer import to_device
from ...kernels.steering.coefficients import SteeringCoefficients
from ...kernels.steering.layout import LogitEdits
from ...kernels.steering.sampling import RowSampling

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from ..scheduling.scheduler import SchedulerOutput
    from ..sequence.sequence import SequenceGroup

TokenValue = tuple[int, int, float]
"""(index of the group, token id, value)."""


@dataclass(frozen=True)
class NewRequestData:
    """A request that starts: its row of the steering state, and the values of that row."""

    state_row: int
    coefficients: SteeringCoefficients
    weights: list[float]
    sampling: RowSampling

    @classmethod
    def from_group(cls, group: SequenceGroup) -> NewRequestData:
        """Read the group's method and sampling parameters."""
        sampling, method = group.request.sampling, group.request.steering
        row_sampling = RowSampling(
            sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, group.seed
        )
        return cls(group.state_row, method.cached_coefficients, list(method.weights()), row_sampling)


@dataclass(frozen=True)
class StepInput:
    """Input of one step.

    blocks_to_swap, blocks_to_zero: see `SchedulerOutput`. chunks: input of the forward pass, with token_ids
    and rope_lengths per token. uses_prev_tokens: token_ids are indices into the previous step's sampled
    tokens, which only the device has. logits_indices: tokens whose hidden states are used for sampling;
    request_branches: (state row, branches) of each group that they belong to. logit_bias, repetition_penalty:
    edits of single scores. score_token_ids: tokens to score instead of a step.
    """

    new_requests: list[NewRequestData] = field(default_factory=list)
    blocks_to_swap: list[tuple[int, int]] = field(default_factory=list)
    blocks_to_zero: list[int] = field(default_factory=list)
    chunks: list[SequenceChunk] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    uses_prev_tokens: bool = False
    rope_lengths: list[int] = field(default_factory=list)
    logits_indices: list[int] = field(default_factory=list)
    request_branches: list[tuple[int, list[int]]] = field(default_factory=list)
    logit_bias: list[TokenValue] = field(default_factory=list)
    repetition_penalty: list[TokenValue] = field(default_factory=list)
    trace: bool = False
    top: bool = False
    score_token_ids: list[int] = field(default_factory=list)

    @classmethod
    def from_scheduler_output(cls, scheduler_output: SchedulerOutput) -> StepInput:
        """Build the input of a scheduled step."""
        chunk_ends = accumulate(count for _, _, count in scheduler_output.scheduled)
        last_index = {
            branch: end - 1
            for (_, branch, _), end in zip(scheduler_output.scheduled, chunk_ends, strict=True)
        }
        prev_index = scheduler_output.prev_index
        return cls(
            new_requests=[NewRequestData.from_group(group) for group in scheduler_output.new_groups],
            blocks_to_swap=scheduler_output.blocks_to_swap,
            blocks_to_zero=scheduler_output.blocks_to_zero,
            chunks=[
                SequenceChunk(branch.num_computed_tokens, count, branch.block_table)
                for _, branch, count in scheduler_output.scheduled
            ],
            token_ids=[
                token
                for group, branch, count in scheduler_output.scheduled
                for token in (
                    [prev_index[group]]
                    if prev_index
                    else group.get_token_ids(branch, branch.num_computed_tokens, count)
                )
            ],
            uses_prev_tokens=bool(prev_index),
            rope_lengths=[
                group.rope_length for group, _, count in scheduler_output.scheduled for _ in range(count)
            ],
            logits_indices=[
                last_index[branch] for group in scheduler_output.to_sample for branch in group.branches
            ],
            request_branches=[
                (group.state_row, [branch.index for branch in group.branches])
                for group in scheduler_output.to_sample
            ],
            logit_bias=[
                (index, *entry)
                for index, group in enumerate(scheduler_output.to_sample)
                for entry in _iter_logit_bias(group, num_unknown=1 if prev_index else 0)
            ],
            repetition_penalty=[
                (index, *entry)
                for index, group in enumerate(scheduler_output.to_sample)
                for entry in _iter_repetition_penalty(group)
            ],
            trace=any(group.request.trace for group in scheduler_output.to_sample),
            top=any(group.request.sampling.logprobs is not None for group in scheduler_output.to_sample),
        )

    def to_json(self) -> bytes:
        """Serialize for `from_json`."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, payload: bytes) -> StepInput:
        """Deserialize the output of `to_json`."""
        data: dict[str, Any] = json.loads(payload)
        data["chunks"] = [SequenceChunk(**item) for item in data["chunks"]]
        data["new_requests"] = [
            NewRequestData(
                item["state_row"],
                SteeringCoefficients(**item["coefficients"]),
                item["weights"],
                RowSampling(**item["sampling"]),
            )
            for item in data["new_requests"]
        ]
        return cls(**data)

    def build_logit_edits(self, vocab_range: range, device: torch.device) -> LogitEdits | None:
        """Edits to the logits of `vocab_range`, the columns of this shard; None without edits."""
        if not self.logit_bias and not self.repetition_penalty:
            return None
        tensors = to_device(
            device,
            *_edit_arrays(self.logit_bias, vocab_range),
            *_edit_arrays(self.repetition_penalty, vocab_range),
        )
        return LogitEdits((tensors[0], tensors[1]), tensors[2], (tensors[3], tensors[4]), tensors[5])


def _iter_logit_bias(group: SequenceGroup, num_unknown: int) -> Iterator[tuple[int, float]]:
    """num_unknown: tokens of the answer that are sampled but not on the host yet."""
    sampling = group.request.sampling
    yield from sampling.logit_bias.items()
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, count in Counter(group.output_ids).items():
            yield token, -sampling.presence_penalty - sampling.frequency_penalty * count
    if len(group.output_ids) + num_unknown < sampling.min_tokens:
        yield from ((token, -np.inf) for token in group.output_state.stop_token_ids)


def _iter_repetition_penalty(group: SequenceGroup) -> Iterator[tuple[int, float]]:
    penalty = group.request.sampling.repetition_penalty
    if penalty != 1:
        yield from ((token, penalty) for token in {*group.prompts[0].prompt_token_ids, *group.output_ids})


def _edit_arrays(entries: list[TokenValue], vocab_range: range) -> list[np.ndarray[Any, Any]]:
    """Group indices, columns and values of the entries whose token is in `vocab_range`."""
    entries_in_range = [
        (group, token - vocab_range.start, value) for group, token, value in entries if token in vocab_range
    ]
    group_indices, token_indices = (
        np.array([entry[i] for entry in entries_in_range], np.int64) for i in (0, 1)
    )
    return [group_indices, token_indices, np.array([entry[2] for entry in entries_in_range], np.float32)]
