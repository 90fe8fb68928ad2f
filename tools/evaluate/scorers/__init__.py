"""Registry of scorers, which measure answers. A scorer never sees how an answer was decoded."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Protocol, cast

from ....kernels.common.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .answer import Answer

SCORERS = {
    "vader": ("sentiment", "Vader", "sentiment from -1 to 1"),
    "length": ("length", "Length", "length in words, characters, sentences or tokens"),
    "textstat": (
        "readability",
        "Readability",
        "a readability index of textstat, such as flesch_reading_ease",
    ),
    "lexical": ("lexical", "Lexical", "the share of words that a regular expression matches"),
    "style": ("style", "Style", "words of a style, such as style:pirate, each counted once"),
    "format": ("format", "Format", "the number of bullets, headings, sentences or paragraphs"),
    "repetition": ("repetition", "Repetition", "the share of word triples that occurred before"),
    "perplexity": ("perplexity", "Perplexity", "perplexity under the model without objectives"),
    "reward": ("reward", "Reward", "a reward model from a folder"),
    "judge": ("judge", "Judge", "ratings from 1 to 5 by a model at an OpenAI-compatible URL"),
}
"""Module, class and meaning of each name."""


class Scorer(Protocol):
    """A measure of answers. `scale` is its lowest and highest score, None if unbounded."""

    name: str
    scale: tuple[float, float] | None

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """One score for each answer, higher for more of the measured quantity; None if not scorable."""
        ...


def make_scorer(text: str) -> Scorer:
    """Create the scorer `NAME` or `NAME:ARGUMENT`.

    Raises InputError for an unknown name, an invalid argument, or if the scorer's package is missing.
    """
    name, _, argument = text.partition(":")
    if name not in SCORERS:
        raise InputError(f"unknown scorer {name!r}; scorers are {', '.join(SCORERS)}")
    module, class_name, _ = SCORERS[name]
    try:
        imported = importlib.import_module(f".{module}", __package__)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("trimtab"):
            raise
        raise missing_package_error(f"the scorer {name!r}", error.name) from None
    return cast("Callable[[str], Scorer]", getattr(imported, class_name))(argument)


def missing_package_error(feature: str, package: str | None) -> InputError:
    """The error for an optional package that is not installed."""
    return InputError(f"{feature} needs the package {package}; pip install 'trimtab[evaluate]' brings it")


def require_packages(feature: str, *names: str) -> None:
    """Raises InputError unless these optional packages are installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise missing_package_error(feature, name)
