"""The record of one answer, a line of answers.jsonl."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ....engine.utils.fields import validate_types

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ....engine.outputs import Output
    from .study import Cell


@dataclass(frozen=True)
class AnswerRecord:
    """The answer of a cell with index `sample` of its n.

    base_logprob: mean log-probability of its tokens, the stop token included, in the branch without
    objectives. kl, strength: means over its tokens; None if the method has none.
    seed: the sampling seed; None for a greedy answer.
    """

    key: str
    sample: int
    question: int
    method: str
    weights: tuple[float, ...]
    text: str
    tokens: int
    finish_reason: str
    base_logprob: float | None
    kl: float | None
    strength: float | None
    seed: int | None
    error: str | None = None

    def __post_init__(self) -> None:
        validate_types(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-serialisable dict."""
        return asdict(self)


def record_from_output(cell: Cell, sample: int, output: Output) -> AnswerRecord:
    """Create the record of an output, which must have a trace."""
    trace = output.trace
    return AnswerRecord(
        key=cell.key,
        sample=sample,
        question=cell.question.index,
        method=cell.label,
        weights=cell.weights,
        text=output.text,
        tokens=len(output.token_ids),
        finish_reason=output.finish_reason,
        base_logprob=_finite_mean(row[0] for row in trace.branch_logprobs) if trace else None,
        kl=_finite_mean(trace.kl) if trace else None,
        strength=_finite_mean(trace.strength) if trace else None,
        seed=None if cell.request.sampling.seed is None else output.seed,
        error=output.error,
    )


def _finite_mean(values: Iterable[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
