"""The one place where tests reach into an engine: its parts that are not public."""

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
    """What schedules and executes the engine's steps."""
    return engine._core


def get_runner(engine: BaseEngine) -> ModelRunner:
    """What executes a step on the device."""
    return engine._core.runner


def get_scheduler(engine: BaseEngine) -> Scheduler:
    """What chooses the tokens that a step computes."""
    return engine._core.scheduler


def get_block_manager(engine: BaseEngine) -> BlockManager:
    """Who holds which blocks of the KV cache."""
    return engine._core.scheduler.block_manager


def get_thread(engine: AsyncEngine) -> EngineThread:
    """The thread that steps an AsyncEngine."""
    return engine._thread


def set_async_scheduling(engine: BaseEngine, on: bool = True) -> None:
    """Has a step launched before the tokens of the step before it are known, as on a GPU; or not."""
    engine._core.async_scheduling = on
