"""Digests of all that changes an answer, so that answers of different settings are not mixed."""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...engine.config import EngineConfig
    from ...engine.methods.base import Method

MODEL_FIELDS = ("model", "dtype", "load_format", "max_model_len", "chat_template", "kernels")
"""Fields of EngineConfig that affect an answer."""


def describe_model(config: EngineConfig) -> dict[str, Any]:
    """The settings of the engine that affect an answer."""
    return {name: getattr(config, name) for name in MODEL_FIELDS}


def describe_method(method: Method) -> dict[str, Any]:
    """A method's name, settings, branches and weights."""
    values = {name: value for name, value in asdict(method).items() if name != "objectives"}
    return {
        "name": method.name,
        **values,
        "branches": method.branch_objectives(),
        "weights": [round(weight, 9) for weight in method.weights()],
    }


def digest(values: Mapping[str, Any], num_bytes: int = 16) -> str:
    """A hexadecimal digest of JSON-serialisable values, whatever the order of their keys."""
    return blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=num_bytes).hexdigest()
