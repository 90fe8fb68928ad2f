"""Opening an engine, with its progress shown to a person who waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .display import progress

if TYPE_CHECKING:
    from ...engine.async_engine import AsyncEngine
    from ...engine.config import EngineConfig
    from ...engine.engine import Engine


def open_engine(config: EngineConfig) -> Engine:
    """The engine of a config. Raises InputError or RunError when there is no such model or no room for it."""
    with progress(f"trimtab: loading {config.model} …") as on_progress:
        from ...engine.engine import Engine  # noqa: PLC0415 - it brings torch, which --help does not need

        return Engine(config, progress=on_progress)


def open_async_engine(config: EngineConfig) -> AsyncEngine:
    """As `open_engine`, for a service."""
    with progress(f"trimtab: loading {config.model} …") as on_progress:
        from ...engine.async_engine import AsyncEngine  # noqa: PLC0415

        return AsyncEngine(config, progress=on_progress)
