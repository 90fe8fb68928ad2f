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


def opened(model: str, seconds: float, pids: str, fields: dict[str, Any]) -> AsyncEngine:
    """The engine; the file `pids` gets a file with the number of its process for a name."""
    (Path(pids) / str(os.getpid())).touch()
    engine = AsyncEngine.from_pretrained(model, **fields)
    step = engine._core.step

    def slow() -> None:
        time.sleep(seconds)
        step()

    engine._core.step = slow  # type: ignore[method-assign]
    return engine


def opening(model: Path, seconds: float, pids: Path, **fields: Any) -> Callable[[], AsyncEngine]:
    """What makes such an engine in another process, which has not read this file."""
    from ray import cloudpickle  # noqa: PLC0415

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return partial(opened, str(model), seconds, str(pids), fields)


@contextmanager
def cluster() -> Iterator[None]:
    """That of RAY_ADDRESS, or a small one for as long as it is needed."""
    import ray  # noqa: PLC0415
    from trimtab.tools.ray.cluster import require  # noqa: PLC0415

    require()
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves where others work, too
    own = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": 200_000_000}
    ray.init(**({} if os.environ.get("RAY_ADDRESS") else own), log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
