"""An engine whose steps take as long as they are told: what several of them do at once can be counted where
there are fewer cores than engines. The time is slept; tokens, caches and everything else are real."""

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
    """The engine; the file `pid_folder` gets a file with the number of its process for a name."""
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
    """What makes such an engine in another process, which has not read this file."""
    from ray import cloudpickle  # noqa: PLC0415

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return partial(open_slow_engine, str(model), seconds, str(pid_folder), fields)


@contextmanager
def ray_cluster() -> Iterator[None]:
    """That of RAY_ADDRESS, or a small one for as long as it is needed."""
    import ray  # noqa: PLC0415
    from trimtab.tools.ray.cluster import require_ray  # noqa: PLC0415

    require_ray()
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves where others work, too
    local_options = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 200_000_000}
    ray.init(**({} if os.environ.get("RAY_ADDRESS") else local_options), log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
