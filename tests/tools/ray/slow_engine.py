"""An engine that sleeps a fixed time in each step, so that the throughput of several engines can be measured
on fewer cores. Tokens, caches and everything else are real."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.engine import AsyncEngine

from ...harness import get_core


def open_slow_engine(model: str, seconds: float, pid_folder: str, fields: dict[str, Any]) -> AsyncEngine:
    """The engine. Creates an empty file in `pid_folder`, named by the pid."""
    (Path(pid_folder) / str(os.getpid())).touch()
    engine = AsyncEngine.from_pretrained(model, **fields)
    step = get_core(engine).step

    def slow_step() -> None:
        time.sleep(seconds)
        step()

    get_core(engine).step = slow_step  # type: ignore[method-assign]
    return engine


def slow_engine_factory(
    model: Path, seconds: float, pid_folder: Path, **fields: Any
) -> Callable[[], AsyncEngine]:
    """A factory of such an engine for another process, which cannot import this file."""
    from ray import cloudpickle  # noqa: PLC0415

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return partial(open_slow_engine, str(model), seconds, str(pid_folder), fields)


@contextmanager
def ray_cluster() -> Iterator[None]:
    """The cluster of RAY_ADDRESS, or a small temporary one."""
    import ray  # noqa: PLC0415
    from trimtab.tools.ray.cluster import require_ray  # noqa: PLC0415

    require_ray()
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves the workers on a busy machine
    local_options = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 200_000_000}
    ray.init(**({} if os.environ.get("RAY_ADDRESS") else local_options), log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
