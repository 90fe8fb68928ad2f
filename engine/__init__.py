"""The inference engine: requests, decoding methods, scheduler, KV cache blocks and model runner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import EngineConfig
from .methods.base import Method
from .methods.builtin import (
    Amulet,
    Base,
    ContextSteering,
    Guidance,
    LinearAlignment,
    Mato,
    Mixture,
    Opad,
    Prompt,
)
from .methods.objective import Objective
from .methods.registry import DEFAULT_METHOD
from .methods.trim import Trim
from .request import Request
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .async_engine import AsyncEngine
    from .engine import Engine

__all__ = [
    "DEFAULT_METHOD",
    "Amulet",
    "AsyncEngine",
    "Base",
    "ContextSteering",
    "Engine",
    "EngineConfig",
    "Guidance",
    "LinearAlignment",
    "Mato",
    "Method",
    "Mixture",
    "Objective",
    "Opad",
    "Prompt",
    "Request",
    "SamplingParams",
    "Trim",
]


def __getattr__(name: str) -> Any:
    """Import the engines on first use: they import torch, which describing a request does not need."""
    if name == "Engine":
        from .engine import Engine  # noqa: PLC0415

        return Engine
    if name == "AsyncEngine":
        from .async_engine import AsyncEngine  # noqa: PLC0415

        return AsyncEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
