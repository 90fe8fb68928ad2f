"""Settings of a study: command line flags, and reading and writing them as JSON."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....engine.config import EngineConfig
from ....engine.sampling_params import SamplingParams, from_json
from ....engine.utils.fields import config_field, invalid_value, validate_types
from ....kernels.common.errors import InputError, short_repr
from ...cli import flags
from ...common.questions import HALVES

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from ...cli.parser import Parser

DEFAULT_METHODS = (
    "base,prompt,linear-alignment,context-steering,opad,amulet,mato,mato:optimise_weights=off,"
    "mato:optimise_online=off,mato:kl_budget=0.2,mato:preset=balanced,trim"
)
STUDY_FILE = "study.json"
"""The file of settings in the output folder."""
DEFAULT_EXTRA_SCORERS = ("repetition", "perplexity")
IGNORED_SAMPLING_FIELDS = ("logprobs",)
"""Fields of SamplingParams that do not change an answer."""


@dataclass(frozen=True)
class StudySettings:
    """Settings of a study; each is a flag. `sampling` and `model` contain only the flags that were set."""

    aim: tuple[str, ...] = config_field(
        (),
        'an objective and its scorer, as "OBJECTIVE=SCORER", or "-SCORER" if lower is better; repeat for '
        'each objective; "=SCORER" takes the objectives from the preferences of each question',
    )
    methods: str = config_field(DEFAULT_METHODS, "rows as NAME[:field=value...], separated by commas")
    weights: int = config_field(
        7, "number of weights along each edge between two objectives; 1 is equal weights only"
    )
    questions: str | None = config_field(
        None, "a file of questions, JSON or JSON lines; none is the built-in set"
    )
    half: str = config_field("both", "only the questions of even (first) or of odd index (second)", HALVES)
    limit: int | None = config_field(None, "maximum number of questions; none is all")
    scorers: tuple[str, ...] = config_field(
        (),
        "additional scorers, separated by commas; replaces repetition,perplexity (repeatable)",
    )
    pairwise: str | None = config_field(
        None,
        "a judge (judge:URL) that compares each row's answers with base's and the best prompt's",
    )
    fluent: float | None = config_field(
        None,
        "exclude points with a median perplexity above this multiple of base's from ranges and fronts, and "
        "count them as losses in win rates; none is no limit",
    )
    system: str | None = config_field(
        None, "the system prompt, which the objectives follow; none is: You are a helpful assistant."
    )
    sampling: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate_types(self)
        object.__setattr__(self, "scorers", tuple(_split_names(self.scorers)))
        if self.weights < 1:
            raise invalid_value("weights", self.weights, "an integer ≥ 1")
        if self.limit is not None and self.limit < 1:
            raise invalid_value("limit", self.limit, "an integer ≥ 1, or none")
        if self.pairwise is not None and self.pairwise.partition(":")[0] != "judge":
            raise invalid_value("pairwise", self.pairwise, "judge:URL, or none")
        if self.fluent is not None and not 1 <= self.fluent < math.inf:
            raise invalid_value("fluent", self.fluent, "a finite number ≥ 1, or none")
        if self.sampling_params.n > 1 and self.sampling_params.temperature == 0:
            raise InputError(
                f"n is {self.sampling_params.n}, but greedy answers are all the same; raise the temperature"
            )

    @property
    def extra_scorers(self) -> tuple[str, ...]:
        """The additional scorers."""
        return self.scorers or DEFAULT_EXTRA_SCORERS

    @property
    def sampling_params(self) -> SamplingParams:
        """The sampling parameters. The seed defaults to 0, so that runs are reproducible."""
        values = {name: value for name, value in self.sampling.items() if name not in IGNORED_SAMPLING_FIELDS}
        params = SamplingParams(**values)
        return replace(params, seed=params.seed or 0) if params.temperature > 0 else params

    @property
    def engine_config(self) -> EngineConfig:
        """The engine configuration."""
        return EngineConfig(**self.model)

    @property
    def command(self) -> str:
        """The flags for these settings."""
        default = StudySettings()
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NESTED_FIELDS}
        changed = {name: value for name, value in values.items() if value != getattr(default, name)}
        # `model` and `sampling` may both have the seed, which is one flag.
        return " ".join(
            _format_flag(name, value) for name, value in {**changed, **self.model, **self.sampling}.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values; `settings_from_dict` reads them."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data


NESTED_FIELDS = ("sampling", "model")


def add_study_flags(parser: Parser) -> None:
    """Add a flag for each field."""
    flags.add_fields(parser, "study", StudySettings, NESTED_FIELDS)


def settings_from_args(args: argparse.Namespace, previous: StudySettings | None) -> StudySettings:
    """The settings from flags; an earlier study's are the defaults, if any."""
    base = previous or StudySettings()
    flag_values = flags.fields_from_args(StudySettings, args, NESTED_FIELDS)
    sampling = {**base.sampling, **flags.fields_from_args(SamplingParams, args)}
    return replace(
        base,
        **flag_values,
        sampling=sampling,
        model={**base.model, **flags.fields_from_args(EngineConfig, args)},
    )


def settings_from_file(path: Path) -> StudySettings:
    """Read settings from a study.json or report.json. Raises InputError if it has none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["settings"]
        return settings_from_dict(data)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{str(path)!r} has no study settings ({error}); expected a study.json or report.json"
        ) from None


def settings_from_dict(values: Mapping[str, Any]) -> StudySettings:
    """The settings of a `to_dict` result."""
    return StudySettings(**{**values, "sampling": from_json(dict(values["sampling"]))})


def _split_names(texts: tuple[str, ...]) -> list[str]:
    """Split names at commas, except in `lexical:`, whose argument is a regular expression."""
    names: list[str] = []
    for text in texts:
        names += [text] if text.startswith("lexical:") else [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(
            f"scorers has an empty name in {short_repr(','.join(texts))}; separate names with single commas"
        )
    return list(dict.fromkeys(names))


def _format_flag(name: str, value: Any) -> str:
    flag = flags.flag_name(name)
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    if isinstance(value, tuple | list):
        return " ".join(f"{flag} {shlex.quote(str(each))}" for each in value)
    if isinstance(value, dict):
        return " ".join(f"{flag} {key}={each}" for key, each in value.items())
    return f"{flag} {shlex.quote(flags.format_default(value) if value is None else str(value))}"
