"""Ways to say in words how much each wish counts: the dial that a prompt has.

Each takes wishes and weights above 0 that sum to 1, and gives one text. A wish alone is said as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GRADES = (
    (0.45, "Only a little"),
    (0.9, "To a smaller degree"),
    (1.1, "To an equal degree"),
    (1.5, "More importantly"),
)
"""What a weight up to this multiple of the mean weight is called."""
HIGHEST = "Above all"


def joined(wishes: Sequence[str], weights: Sequence[float]) -> str:
    """One after the other, weights unsaid."""
    return " ".join(wishes)


def percent(wishes: Sequence[str], weights: Sequence[float]) -> str:
    """Each with its share: `Your answer should be kind. (importance: 70 %)`."""
    shares = [f"{weight * 100:.0f} %" for weight in weights]
    said = " ".join(f"{wish} (importance: {share})" for wish, share in zip(wishes, shares, strict=True))
    return f"Follow each wish as much as its importance says. {said}"


def words(wishes: Sequence[str], weights: Sequence[float]) -> str:
    """Each after its degree, the strongest first: `Above all: … Only a little: …`."""
    mean = sum(weights) / len(weights)
    return " ".join(f"{_grade(weight / mean)}: {wish}" for wish, weight in _strongest_first(wishes, weights))


def order(wishes: Sequence[str], weights: Sequence[float]) -> str:
    """The most important first, and said so; equal ones as they were given."""
    if max(weights) - min(weights) < 1e-9:
        return joined(wishes, weights)
    ranked = " ".join(wish for wish, _ in _strongest_first(wishes, weights))
    return f"These wishes stand in the order of their importance, the most important one first. {ranked}"


def _strongest_first(wishes: Sequence[str], weights: Sequence[float]) -> list[tuple[str, float]]:
    return sorted(zip(wishes, weights, strict=True), key=lambda pair: -pair[1])


def _grade(multiple: float) -> str:
    return next((grade for bound, grade in GRADES if multiple <= bound), HIGHEST)


WORDINGS: dict[str, Callable[[Sequence[str], Sequence[float]], str]] = {
    "joined": joined,
    "percent": percent,
    "words": words,
    "order": order,
}
