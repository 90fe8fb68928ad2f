"""Read and validate values of a config.json, an untrusted file that determines allocation sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, short_repr

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_SIZE = 1 << 24
"""Far above any dimension of a real model; prevents huge allocations for a broken config."""


@dataclass(frozen=True)
class ConfigReader:
    """A JSON object. A null counts as absent. An invalid value raises InputError with key and value."""

    data: Mapping[str, Any]

    def get_int(
        self, key: str, default: int | None = None, *, min_value: int = 1, max_value: int = MAX_SIZE
    ) -> int:
        """An integer from `min_value` to `max_value`. A missing key without a default is an error."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not min_value <= value <= max_value:
            raise config_error(key, value, f"it must be an integer from {min_value} to {max_value}")
        return value

    def get_float(self, key: str, default: float | None, min_value: float, max_value: float) -> float:
        """A number from `min_value` to `max_value`. A missing key without a default is an error."""
        value = self._get(key, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not min_value <= value <= max_value
        ):
            raise config_error(key, value, f"it must be a number from {min_value:g} to {max_value:g}")
        return float(value)

    def get_bool(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise config_error(key, value, "it must be true or false")
        return value

    def get_dict(self, key: str) -> Mapping[str, Any]:
        """An object; {} if absent."""
        value = self.data.get(key) or {}
        if not isinstance(value, dict):
            raise config_error(key, value, "it must be an object")
        return value

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.data.get(key) is not None

    def _get(self, key: str, default: Any) -> Any:
        value = self.data[key] if self.has(key) else default
        if value is None:
            raise InputError(f"config.json has no {key}")
        return value


def config_error(key: str, value: Any, requirement: str) -> InputError:
    """The error for an invalid value in a config.json. `requirement` states the valid values."""
    return InputError(f"config.json has {key} {short_repr(value)}; {requirement}")
