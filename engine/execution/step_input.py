"""A step in plain numbers: what a plan asks of every process that holds a part of the model."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels.attention_metadata import Segment
from ...kernels.common.transfer import send
from ...kernels.steering.coefficients import Program
from ...kernels.steering.state import Draw, Edits

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from ..scheduling.scheduler import Plan
    from ..sequence.sequence import Group

Entry = tuple[int, int, float]
"""Group, token and value."""


@dataclass(frozen=True)
class Admitted:
    """A request that starts: its row of the table, and what is written there."""

    row: int
    program: Program
    weights: list[float]
    draw: Draw

    @classmethod
    def of(cls, group: Group) -> Admitted:
        """The group's method and sampling."""
        sampling, method = group.request.sampling, group.request.steering
        draw = Draw(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, group.seed)
        return cls(group.row, method.compiled, list(method.weights()), draw)


@dataclass(frozen=True)
class Order:
    """One step.

    swaps, fresh: see `Plan`. segments, with token_ids and turned_by for each of their tokens: the forward.
    follows: token_ids are places among the tokens that the step before chose, of which only the device knows.
    last: of the tokens, those whose hidden states choose; groups: (row of the table, branches) of each group
    that they belong to. bias, repetition: single scores that change. scored: tokens to score instead.
    """

    admitted: list[Admitted] = field(default_factory=list)
    swaps: list[tuple[int, int]] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    follows: bool = False
    turned_by: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    groups: list[tuple[int, list[int]]] = field(default_factory=list)
    bias: list[Entry] = field(default_factory=list)
    repetition: list[Entry] = field(default_factory=list)
    trace: bool = False
    top: bool = False
    scored: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, plan: Plan) -> Order:
        """What the plan asks for."""
        ends = accumulate(count for _, _, count in plan.shares)
        last = {branch: end - 1 for (_, branch, _), end in zip(plan.shares, ends, strict=True)}
        follows = plan.follows
        return cls(
            admitted=[Admitted.of(group) for group in plan.admitted],
            swaps=plan.swaps,
            fresh=plan.fresh,
            segments=[Segment(branch.computed, count, branch.pages) for _, branch, count in plan.shares],
            token_ids=[
                token
                for group, branch, count in plan.shares
                for token in (
                    [follows[group]] if follows else group.token_ids(branch, branch.computed, count)
                )
            ],
            follows=bool(follows),
            turned_by=[group.turned_by for group, _, count in plan.shares for _ in range(count)],
            last=[last[branch] for group in plan.ready for branch in group.branches],
            groups=[(group.row, [branch.index for branch in group.branches]) for group in plan.ready],
            bias=[
                (index, *entry)
                for index, group in enumerate(plan.ready)
                for entry in _bias(group, unknown=1 if follows else 0)
            ],
            repetition=[
                (index, *entry) for index, group in enumerate(plan.ready) for entry in _repetition(group)
            ],
            trace=any(group.request.trace for group in plan.ready),
            top=any(group.request.sampling.logprobs is not None for group in plan.ready),
        )

    def to_json(self) -> bytes:
        """As text that `from_json` reads."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Order:
        """The order of a text."""
        data: dict[str, Any] = json.loads(text)
        data["segments"] = [Segment(**each) for each in data["segments"]]
        data["admitted"] = [
            Admitted(each["row"], Program(**each["program"]), each["weights"], Draw(**each["draw"]))
            for each in data["admitted"]
        ]
        return cls(**data)

    def edits(self, ids: range, device: torch.device) -> Edits | None:
        """The changes to the scores of these ids, which are the columns; None where there are none."""
        if not self.bias and not self.repetition:
            return None
        columns = send(device, *_columns(self.bias, ids), *_columns(self.repetition, ids))
        return Edits((columns[0], columns[1]), columns[2], (columns[3], columns[4]), columns[5])


def _bias(group: Group, unknown: int) -> Iterator[tuple[int, float]]:
    """unknown: tokens of the answer that are chosen and not known yet."""
    sampling = group.request.sampling
    yield from sampling.logit_bias.items()
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, count in Counter(group.tokens).items():
            yield token, -sampling.presence_penalty - sampling.frequency_penalty * count
    if len(group.tokens) + unknown < sampling.min_tokens:
        yield from ((token, -np.inf) for token in group.answer.stop_ids)


def _repetition(group: Group) -> Iterator[tuple[int, float]]:
    penalty = group.request.sampling.repetition_penalty
    if penalty != 1:
        yield from ((token, penalty) for token in {*group.prompts[0].prompt_token_ids, *group.tokens})


def _columns(entries: list[Entry], ids: range) -> list[np.ndarray[Any, Any]]:
    """Groups, columns and values of the entries whose token is one of these."""
    held = [(group, token - ids.start, value) for group, token, value in entries if token in ids]
    groups, columns = (np.array([entry[i] for entry in held], np.int64) for i in (0, 1))
    return [groups, columns, np.array([entry[2] for entry in held], np.float32)]
