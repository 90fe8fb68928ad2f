"""Parse the request key `steering`: a method with objectives, or the name of a profile."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, SteeringWarning, error_text, short_repr
from ..methods.base import Method
from ..methods.builtin import Base
from ..methods.objective import Objective
from ..methods.registry import default_method, method_class, require_setting
from ..utils.fields import coerce, invalid_value
from .errors import to_api_error

if sys.version_info >= (3, 11):
    import tomllib as toml
else:
    import tomli as toml

if TYPE_CHECKING:
    from pathlib import Path

PARAM = "steering"
OVERLONG_KEY = re.compile(r"""((?<![\w-])[\w-]+\s*\.\s*|"[^"\n]*"\s*\.\s*|'[^'\n]*'\s*\.\s*){16}""")
"""A TOML key with too many dotted parts: parsing one takes time and memory quadratic in their number."""


@dataclass(frozen=True)
class Steering:
    """The method of a request, and whether to return the trace of each token."""

    method: Method = field(default_factory=Base)
    trace: bool = False


class Profiles:
    """Named steerings of a TOML file: one table each, in the format of the request key `steering`."""

    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self.definitions = dict(definitions)
        self._steerings = {name: _parse_steering(value) for name, value in self.definitions.items()}

    @classmethod
    def from_file(cls, path: Path) -> Profiles:
        """Read a TOML file. Raises InputError that names the invalid profile."""
        try:
            text = path.read_text(encoding="utf-8")
            if OVERLONG_KEY.search(text):
                raise ValueError("a key has too many parts")
            definitions = toml.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"cannot read the profiles file {str(path)!r}: {error_text(error)}") from error
        for name, value in definitions.items():
            try:
                _parse_steering(value)
            except InputError as error:
                raise InputError(f"profile {name!r} of {str(path)!r}: {error}") from error
        return cls(definitions)

    def resolve(self, value: Any) -> Steering:
        """The steering of a request value: None, a profile name or an object. Raises ApiError if invalid."""
        if value is None:
            return Steering()
        try:
            return self._lookup(value) if isinstance(value, str) else _parse_steering(value)
        except InputError as error:
            raise to_api_error(error, PARAM) from error

    def _lookup(self, name: str) -> Steering:
        if name not in self._steerings:
            names = ", ".join(self._steerings) or "none"
            raise InputError(f"unknown profile {short_repr(name)}; the profiles are {names}")
        return self._steerings[name]


def _parse_steering(value: Any) -> Steering:
    """Parse a steering object. Raises InputError whose field is relative to `steering`."""
    if not isinstance(value, Mapping):
        expected = "an object such as {'objectives': ['Be brief.']}, or a profile's name"
        raise invalid_value("the steering", value, expected)
    settings = dict(value)
    trace = settings.pop("trace", False)
    if not isinstance(trace, bool):
        raise invalid_value("trace", trace, "true or false")
    objectives = _parse_objectives(settings.pop("objectives", []))
    name = coerce("method", settings.pop("method", default_method(objectives)), str)
    cls = method_class(name)
    preset = settings.pop("preset", None)
    for key in settings:
        try:
            require_setting(cls, key, short_repr(key))
        except InputError as error:
            error.field = key
            raise
    if preset is not None:
        settings = {**cls.preset_settings(coerce("preset", preset, str)), **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteeringWarning)
        return Steering(cls(tuple(objectives), **settings), trace)


def _parse_objectives(value: Any) -> list[Objective]:
    if not isinstance(value, list):
        raise invalid_value(
            "objectives", value, "a list of objects such as {'text': 'Be brief.', 'weight': 0.7}"
        )
    objectives = []
    for index, item in enumerate(value):
        spec = {"text": item} if isinstance(item, str) else item
        try:
            if not isinstance(spec, Mapping) or "text" not in spec or {*spec} - {"text", "weight"}:
                raise invalid_value(
                    f"objective {index}", item, "a string, or an object with a text and optionally a weight"
                )
            objectives.append(Objective(**spec))
        except InputError as error:
            error.field = f"objectives[{index}]"
            raise
    return objectives
