"""The key `steering` of a body: a method toward objectives, written out or by the name of a profile."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, SteeringWarning, quoted, said
from ..methods.base import Method
from ..methods.builtin import Base
from ..methods.objective import Objective
from ..methods.registry import default_method, method_class, require_setting
from ..utils.fields import fitted, refusal
from .errors import api_error

if sys.version_info >= (3, 11):
    import tomllib as toml
else:
    import tomli as toml

if TYPE_CHECKING:
    from pathlib import Path

PARAM = "steering"
LONG_KEY = re.compile(r"""((?<![\w-])[\w-]+\s*\.\s*|"[^"\n]*"\s*\.\s*|'[^'\n]*'\s*\.\s*){16}""")
"""A dotted key of more parts than any steering has: reading one takes time and memory with their square."""


@dataclass(frozen=True)
class Steering:
    """How a request is steered, and whether each token's trace is wanted."""

    method: Method = field(default_factory=Base)
    trace: bool = False


class Profiles:
    """Steerings by name, as a TOML file has them: a table each, written as the key `steering` is."""

    def __init__(self, written: Mapping[str, Any]) -> None:
        self.written = dict(written)
        self._made = {name: _made(value) for name, value in self.written.items()}

    @classmethod
    def from_file(cls, path: Path) -> Profiles:
        """Raises InputError that names the profile when one is wrong."""
        try:
            text = path.read_text(encoding="utf-8")
            if LONG_KEY.search(text):
                raise ValueError("a key has too many parts")
            written = toml.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"the profiles {str(path)!r} cannot be read: {said(error)}") from error
        for name, value in written.items():
            try:
                _made(value)
            except InputError as error:
                raise InputError(f"profile {name!r} of {str(path)!r}: {error}") from error
        return cls(written)

    def steering(self, value: Any) -> Steering:
        """The steering that a body asks for. Raises ApiError."""
        if value is None:
            return Steering()
        try:
            return self._named(value) if isinstance(value, str) else _made(value)
        except InputError as error:
            raise api_error(error, PARAM) from error

    def _named(self, name: str) -> Steering:
        if name not in self._made:
            there = ", ".join(self._made) or "none"
            raise InputError(f"there is no profile {quoted(name)}; profiles are {there}")
        return self._made[name]


def _made(value: Any) -> Steering:
    """Raises InputError, whose field stands below `steering`."""
    if not isinstance(value, Mapping):
        right = "an object such as {'objectives': ['Be brief.']}, or a profile's name"
        raise refusal("the steering", value, right)
    settings = dict(value)
    trace = settings.pop("trace", False)
    if not isinstance(trace, bool):
        raise refusal("trace", trace, "true or false")
    objectives = _objectives(settings.pop("objectives", []))
    name = fitted("method", settings.pop("method", default_method(objectives)), str)
    cls = method_class(name)
    preset = settings.pop("preset", None)
    for key in settings:
        try:
            require_setting(cls, key, quoted(key))
        except InputError as error:
            error.field = key
            raise
    if preset is not None:
        settings = {**cls.preset_settings(fitted("preset", preset, str)), **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SteeringWarning)
        return Steering(cls(tuple(objectives), **settings), trace)


def _objectives(value: Any) -> list[Objective]:
    if not isinstance(value, list):
        raise refusal("objectives", value, "a list of objects such as {'text': 'Be brief.', 'weight': 0.7}")
    found = []
    for index, item in enumerate(value):
        written = {"text": item} if isinstance(item, str) else item
        try:
            if not isinstance(written, Mapping) or "text" not in written or {*written} - {"text", "weight"}:
                raise refusal(
                    f"objective {index}", item, "a text, or an object with a text and perhaps a weight"
                )
            found.append(Objective(**written))
        except InputError as error:
            error.field = f"objectives[{index}]"
            raise
    return found
