"""What a study is made of, as it is typed, kept in its files, and read again."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....engine.config import EngineConfig
from ....engine.sampling_params import SamplingParams, from_json
from ....engine.utils.fields import check_fields, option, refusal
from ....kernels.common.errors import InputError, quoted
from ...cli import flags
from ...common.questions import HALVES

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from ...cli.parser import Parser

METHODS = (
    "base,prompt,linear-alignment,context-steering,opad,amulet,mato,mato:optimise_weights=off,"
    "mato:optimise_online=off,mato:kl_budget=0.2,mato:preset=balanced"
)
STUDY = "study.json"
"""Where a folder keeps them."""
EXTRAS = ("repetition", "perplexity")
NOT_SAMPLED = ("logprobs",)
"""Fields of SamplingParams that change no answer."""


@dataclass(frozen=True)
class Settings:
    """All that decides a study, and each is a flag. `sampling` and `model` hold only what was given."""

    aim: tuple[str, ...] = option(
        (),
        'a wish and what measures it, as "WISH=SCORER", with "-SCORER" where less is better (once for each '
        'wish); "=SCORER" stands for the preferences that each question has of its own',
    )
    methods: str = option(METHODS, "rows as NAME[:field=value...], separated by commas")
    weights: int = option(7, "points of weight along each edge between two wishes; 1 is equal weights only")
    questions: str | None = option(None, "a file of questions, JSON or JSON lines; none is the project's own")
    half: str = option("both", "only the questions of even (first) or of odd index (second)", HALVES)
    limit: int | None = option(None, "only the first so many questions; none takes all")
    scorers: tuple[str, ...] = option(
        (),
        "what else to measure, separated by commas, in place of repetition,perplexity (may be given several "
        "times)",
    )
    pairwise: str | None = option(
        None,
        "a judge (judge:URL) that compares each row's answers with base's and the best prompt's",
    )
    fluent: float | None = option(
        None,
        "leave points out of ranges and fronts whose median perplexity is above this many times base's; in "
        "win rates they lose. none leaves none out",
    )
    system: str | None = option(
        None, "the system text, which the wishes follow; none is: You are a helpful assistant."
    )
    sampling: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "scorers", tuple(_separated(self.scorers)))
        if self.weights < 1:
            raise refusal("weights", self.weights, "a whole number ≥ 1")
        if self.limit is not None and self.limit < 1:
            raise refusal("limit", self.limit, "a whole number ≥ 1, or none")
        if self.pairwise is not None and self.pairwise.partition(":")[0] != "judge":
            raise refusal("pairwise", self.pairwise, "judge:URL, or none")
        if self.fluent is not None and not 1 <= self.fluent < math.inf:
            raise refusal("fluent", self.fluent, "a finite number ≥ 1, or none")
        if self.params.n > 1 and self.params.temperature == 0:
            raise InputError(
                f"n is {self.params.n}, but greedy answers are all the same; set a temperature, too"
            )

    @property
    def extras(self) -> tuple[str, ...]:
        """The further scorers."""
        return self.scorers or EXTRAS

    @property
    def params(self) -> SamplingParams:
        """The sampling parameters. Draws are seeded, 0 unless given, so that they can be repeated."""
        given = {name: value for name, value in self.sampling.items() if name not in NOT_SAMPLED}
        params = SamplingParams(**given)
        return replace(params, seed=params.seed or 0) if params.temperature > 0 else params

    @property
    def config(self) -> EngineConfig:
        """The engine's config."""
        return EngineConfig(**self.model)

    @property
    def command(self) -> str:
        """The flags that ask for this."""
        default = Settings()
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NESTED}
        given = {name: value for name, value in own.items() if value != getattr(default, name)}
        # A seed may stand for both; it is one flag.
        return " ".join(
            _typed(name, value) for name, value in {**given, **self.model, **self.sampling}.items()
        )

    def described(self) -> dict[str, Any]:
        """As JSON has it; `from_description` reads it again."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found


NESTED = ("sampling", "model")


def add_flags(parser: Parser) -> None:
    """A flag for each field."""
    flags.add_fields(parser, "study", Settings, NESTED)


def read(namespace: argparse.Namespace, before: Settings | None) -> Settings:
    """The settings that flags ask for, in place of those of an earlier study, if any."""
    start = before or Settings()
    given = flags.given(Settings, namespace, NESTED)
    sampling = {**start.sampling, **flags.given(SamplingParams, namespace)}
    return replace(
        start, **given, sampling=sampling, model={**start.model, **flags.given(EngineConfig, namespace)}
    )


def from_file(path: Path) -> Settings:
    """The settings in a study.json or report.json. Raises InputError when there are none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["settings"]
        return from_description(found)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{str(path)!r} holds no settings of a study ({error}); name its report.json"
        ) from None


def from_description(values: Mapping[str, Any]) -> Settings:
    """The settings that `described` describes."""
    return Settings(**{**values, "sampling": from_json(dict(values["sampling"]))})


def _separated(texts: tuple[str, ...]) -> list[str]:
    """Names between commas; an argument of `lexical` is a regular expression and keeps its own."""
    found: list[str] = []
    for text in texts:
        found += [text] if text.startswith("lexical:") else [part.strip() for part in text.split(",")]
    if not all(found):
        raise InputError(
            f"scorers has an empty name in {quoted(','.join(texts))}; name scorers between commas"
        )
    return list(dict.fromkeys(found))


def _typed(name: str, value: Any) -> str:
    flag = flags.flag(name)
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    if isinstance(value, tuple | list):
        return " ".join(f"{flag} {shlex.quote(str(each))}" for each in value)
    if isinstance(value, dict):
        return " ".join(f"{flag} {key}={each}" for key, each in value.items())
    return f"{flag} {shlex.quote(flags.shown(value) if value is None else str(value))}"
