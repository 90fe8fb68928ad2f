"""Open an engine with a progress bar."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .display import progress

if TYPE_CHECKING:
    from ...engine.async_engine import AsyncEngine
    from ...engine.config import EngineConfig
    from ...engine.engine import Engine


def open_engine(config: EngineConfig) -> Engine:
    """Open the engine of a config. Raises InputError or RunError if the model is missing or does not fit."""
    with progress(f"trimtab: loading {config.model} …") as on_progress:
        from ...engine.engine import Engine  # noqa: PLC0415 - imports torch, which --help does not need

        return Engine(config, progress=on_progress)


def open_async_engine(config: EngineConfig) -> AsyncEngine:
    """Like `open_engine`, but opens an AsyncEngine."""
    with progress(f"trimtab: loading {config.model} …") as on_progress:
        from ...engine.async_engine import AsyncEngine  # noqa: PLC0415

        return AsyncEngine(config, progress=on_progress)
