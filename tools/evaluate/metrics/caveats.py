"""What a reader must know before trusting a number."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .result import PointResult
    from .table import Table

WEIGHTS = 7
TOKENS = 256
QUESTIONS = 30
CUT_OFF = 0.1
MANY_AIMS_DRAWS = 100
"""A front of more than two aims is costly to measure."""
BROKEN = 3.0


def notes(table: Table, points: Sequence[PointResult]) -> tuple[str, ...]:
    """Sentences, none where all is well."""
    return tuple(_notes(table, points))


def _notes(table: Table, points: Sequence[PointResult]) -> Iterator[str]:
    study = table.study
    settings = study.settings
    share = f"{100 * CUT_OFF:.0f} %"
    if settings.weights < WEIGHTS:
        yield f"Steerability is not to be trusted: --weights {settings.weights} is fewer than {WEIGHTS}."
    if settings.params.max_tokens < TOKENS:
        yield (
            f"Steerability and length are not to be trusted: answers end at {settings.params.max_tokens} "
            f"tokens, fewer than {TOKENS}."
        )
    if len(study.questions) < QUESTIONS:
        yield f"With {len(study.questions)} questions, fewer than {QUESTIONS}, intervals are too narrow."
    if len(study.aims) > 2:
        yield f"Intervals of fronts are from {MANY_AIMS_DRAWS} draws only, for there are more than two aims."
    for aim, (low, high) in zip(study.aims, table.ranges.T, strict=True):
        if not high > low:
            yield f"No point differs from another in {aim.label}; its normalised scores are all 0."
    cut = _labels(points, "truncated")
    if cut:
        yield f"More than {share} of the answers are cut off (max_tokens) at some weight of: {cut}."
    odd = [row.label for row in study.rows if not table.fluent(row, BROKEN).all()]
    if odd:
        yield (
            f"The median perplexity is more than {BROKEN:g} times that of base at some weight of: "
            f"{', '.join(odd)}. Scores there may be those of text that is no language; see --fluent."
        )
    if settings.fluent is not None:
        yield (
            f"Points of more than {settings.fluent:g} times the median perplexity of base are left out of "
            "ranges and fronts, and lose in win rates."
        )
    unscored = _labels(points, "unscored")
    if unscored:
        yield (
            f"More than {share} of the answers have no score (most are empty) at some weight of: "
            f"{unscored}. Means leave them out; in win rates they lose."
        )


def _labels(points: Sequence[PointResult], measure: str) -> str:
    """The rows that have a point at which the measure is high."""
    high = [point.label for point in points if (point.measures[measure].value or 0) > CUT_OFF]
    return ", ".join(dict.fromkeys(high))
