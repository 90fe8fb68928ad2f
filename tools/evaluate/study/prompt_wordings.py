"""Wordings of weighted objectives for the prompt baseline.

Each wording turns objectives and weights above 0, which sum to 1, into one text. A single objective is used
verbatim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GRADE_BOUNDS = (
    (0.45, "Only a little"),
    (0.9, "To a smaller degree"),
    (1.1, "To an equal degree"),
    (1.5, "More importantly"),
)
"""The phrase for a weight up to this multiple of the mean weight."""
TOP_GRADE = "Above all"


def join_objectives(objectives: Sequence[str], weights: Sequence[float]) -> str:
    """The objectives one after the other, without weights."""
    return " ".join(objectives)


def list_with_percentages(objectives: Sequence[str], weights: Sequence[float]) -> str:
    """Each objective with its weight: `Your answer should be kind. (importance: 70 %)`."""
    shares = [f"{weight * 100:.0f} %" for weight in weights]
    listed = " ".join(
        f"{objective} (importance: {share})" for objective, share in zip(objectives, shares, strict=True)
    )
    return f"Follow each objective as much as its importance says. {listed}"


def list_with_grades(objectives: Sequence[str], weights: Sequence[float]) -> str:
    """Each objective after a phrase for its weight, the highest first: `Above all: … Only a little: …`."""
    mean = sum(weights) / len(weights)
    return " ".join(
        f"{_grade_label(weight / mean)}: {objective}"
        for objective, weight in _sort_by_weight(objectives, weights)
    )


def list_in_order(objectives: Sequence[str], weights: Sequence[float]) -> str:
    """The objectives by descending weight, after a sentence that says so; equal weights: as joined."""
    if max(weights) - min(weights) < 1e-9:
        return join_objectives(objectives, weights)
    ranked = " ".join(objective for objective, _ in _sort_by_weight(objectives, weights))
    return f"These objectives stand in the order of their importance, the most important one first. {ranked}"


def _sort_by_weight(objectives: Sequence[str], weights: Sequence[float]) -> list[tuple[str, float]]:
    return sorted(zip(objectives, weights, strict=True), key=lambda pair: -pair[1])


def _grade_label(ratio: float) -> str:
    return next((grade for bound, grade in GRADE_BOUNDS if ratio <= bound), TOP_GRADE)


WORDINGS: dict[str, Callable[[Sequence[str], Sequence[float]], str]] = {
    "joined": join_objectives,
    "percent": list_with_percentages,
    "words": list_with_grades,
    "order": list_in_order,
}
