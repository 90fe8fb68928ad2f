"""The Ray cluster that a command runs on, and what can be found out before it is asked for anything."""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError
from ..cli.display import progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...engine.config import EngineConfig
    from .config import RayConfig

MISSING_EXTRA = "--ray needs the ray extra: pip install 'trimtab[ray]'"
ENV_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # a library tells nobody who uses it
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # Ray's 5 are too few where disks are slow
}
"""Of Ray, for a cluster that is started here; what the environment says goes before."""


def require_ray() -> None:
    """Raises InputError where there is no Ray."""
    for name, value in ENV_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        import ray.data  # noqa: PLC0415 - of the extra `ray`, as whatever this floor imports of it
        import ray.serve  # noqa: F401, PLC0415
    except ImportError as error:
        raise InputError(MISSING_EXTRA) from error


@contextmanager
def connect_cluster() -> Iterator[None]:
    """Within, there is a cluster: the one that this process is in, that of RAY_ADDRESS, or one of its own.

    Raises InputError where Ray is not installed.
    """
    require_ray()
    import ray  # noqa: PLC0415

    if ray.is_initialized():
        yield
        return
    sigterm_handler = signal.getsignal(signal.SIGTERM)
    ray.init(include_dashboard=False, logging_level=logging.WARNING)
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGTERM, sigterm_handler
        )  # Ray's own ends the process before anything is drained
    try:
        yield
    finally:
        ray.shutdown()


def check_model(config: EngineConfig) -> None:
    """Reads all of a model but its weights, so that what is wrong with it is said here and once, and what is
    fetched is fetched once. Raises as opening it does."""
    from ...models.loader.loader import load_bundle  # noqa: PLC0415 - it brings torch, which --help does not need

    with progress(f"trimtab: looking at {config.model} …") as on_progress:
        load_bundle(config.model, config.load_format, config.chat_template, on_progress, config.dtype)


def actor_options(config: RayConfig, engine: EngineConfig) -> dict[str, Any]:
    """What Ray sets aside for an engine."""
    import ray  # noqa: PLC0415

    num_gpus = config.replica_gpus
    if num_gpus is None:
        num_gpus = float(engine.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)
    return {"num_cpus": config.replica_cpus, "num_gpus": num_gpus}
