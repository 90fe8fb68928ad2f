"""Warnings for the report: settings and results that make its numbers unreliable."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .result import PointResult
    from .table import ScoreTable

MIN_WEIGHTS = 7
MIN_TOKENS = 256
MIN_QUESTIONS = 30
MAX_BAD_SHARE = 0.1
MULTI_TARGET_DRAWS = 100
"""Draws for more than two objectives: an exact hypervolume is expensive there."""
MAX_PERPLEXITY_RATIO = 3.0


def find_caveats(table: ScoreTable, points: Sequence[PointResult]) -> tuple[str, ...]:
    """One sentence for each warning."""
    return tuple(_iter_caveats(table, points))


def _iter_caveats(table: ScoreTable, points: Sequence[PointResult]) -> Iterator[str]:
    study = table.study
    settings = study.settings
    share_text = f"{100 * MAX_BAD_SHARE:.0f} %"
    if settings.weights < MIN_WEIGHTS:
        yield f"Steerability is not to be trusted: --weights {settings.weights} is fewer than {MIN_WEIGHTS}."
    if settings.sampling_params.max_tokens < MIN_TOKENS:
        yield (
            "Steerability and length are not to be trusted: answers end at "
            f"{settings.sampling_params.max_tokens} tokens, fewer than {MIN_TOKENS}."
        )
    if len(study.questions) < MIN_QUESTIONS:
        yield f"With {len(study.questions)} questions, fewer than {MIN_QUESTIONS}, intervals are too narrow."
    if len(study.targets) > 2:
        yield (
            f"Intervals of fronts are from {MULTI_TARGET_DRAWS} draws only, as there are more than two aims."
        )
    for target, (low, high) in zip(study.targets, table.ranges.T, strict=True):
        if not high > low:
            yield f"No point differs from another in {target.label}; its normalised scores are all 0."
    truncated = _labels_above(points, "truncated")
    if truncated:
        yield (
            f"More than {share_text} of the answers are cut off (max_tokens) at some weight of: {truncated}."
        )
    disfluent = [row.label for row in study.rows if not table.is_fluent(row, MAX_PERPLEXITY_RATIO).all()]
    if disfluent:
        yield (
            f"The median perplexity is more than {MAX_PERPLEXITY_RATIO:g} times that of base at some weight "
            f"of: {', '.join(disfluent)}. Scores there may be those of text that is no language; see "
            f"--fluent."
        )
    if settings.fluent is not None:
        yield (
            f"Points of more than {settings.fluent:g} times the median perplexity of base are left out of "
            "ranges and fronts, and lose in win rates."
        )
    unscored = _labels_above(points, "unscored")
    if unscored:
        yield (
            f"More than {share_text} of the answers have no score (most are empty) at some weight of: "
            f"{unscored}. Means leave them out; in win rates they lose."
        )


def _labels_above(points: Sequence[PointResult], measure: str) -> str:
    """Labels of the rows with a point whose measure exceeds MAX_BAD_SHARE."""
    labels = [point.label for point in points if (point.measures[measure].value or 0) > MAX_BAD_SHARE]
    return ", ".join(dict.fromkeys(labels))
