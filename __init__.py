"""trimtab: an LLM inference engine that steers decoding toward several weighted objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import engine as _engine
from .engine import (
    DEFAULT_METHOD,
    Amulet,
    Base,
    ContextSteering,
    EngineConfig,
    Guidance,
    LinearAlignment,
    Mato,
    Method,
    Mixture,
    Objective,
    Opad,
    Prompt,
    Request,
    SamplingParams,
    Trim,
)
from .kernels.common.errors import BusyError, InputError, RunError, SteeringWarning
from .kernels.common.version import VERSION

if TYPE_CHECKING:
    from .engine import AsyncEngine, Engine

__version__ = VERSION

__all__ = [
    "DEFAULT_METHOD",
    "Amulet",
    "AsyncEngine",
    "Base",
    "BusyError",
    "ContextSteering",
    "Engine",
    "EngineConfig",
    "Guidance",
    "InputError",
    "LinearAlignment",
    "Mato",
    "Method",
    "Mixture",
    "Objective",
    "Opad",
    "Prompt",
    "Request",
    "RunError",
    "SamplingParams",
    "SteeringWarning",
    "Trim",
]


def __getattr__(name: str) -> Any:
    """Import the engines on first use: they import torch, which building a request does not need."""
    if name in ("AsyncEngine", "Engine"):
        return getattr(_engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
