"""Access to private parts of an engine; tests use these functions only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trimtab.engine.async_engine import AsyncEngine
    from trimtab.engine.base_engine import BaseEngine
    from trimtab.engine.core.background_loop import EngineThread
    from trimtab.engine.core.engine_core import EngineCore
    from trimtab.engine.execution.model_runner import ModelRunner
    from trimtab.engine.scheduling.block_manager import BlockManager
    from trimtab.engine.scheduling.scheduler import Scheduler


def get_core(engine: BaseEngine) -> EngineCore:
    """The core, which schedules and executes steps."""
    return engine._core


def get_runner(engine: BaseEngine) -> ModelRunner:
    """The model runner, which executes a step on the device."""
    return engine._core.runner


def get_scheduler(engine: BaseEngine) -> Scheduler:
    """The scheduler, which selects the tokens of a step."""
    return engine._core.scheduler


def get_block_manager(engine: BaseEngine) -> BlockManager:
    """The block manager of the KV cache."""
    return engine._core.scheduler.block_manager


def get_thread(engine: AsyncEngine) -> EngineThread:
    """The thread that runs the steps of an AsyncEngine."""
    return engine._thread


def set_async_scheduling(engine: BaseEngine, on: bool = True) -> None:
    """Set whether a step is launched before the previous step's tokens are known, as on a GPU."""
    engine._core.async_scheduling = on
