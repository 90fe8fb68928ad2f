"""Connect to a Ray cluster, check the model before anything starts, and choose resources of actors."""

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
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # Ray's 5 s are too short with slow disks
}
"""Environment variables for a cluster that is started here, unless they are already set."""


def require_ray() -> None:
    """Raises InputError if Ray is not installed."""
    for name, value in ENV_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        import ray.data  # noqa: PLC0415 - needs the extra `ray`, like all imports of ray in this folder
        import ray.serve  # noqa: F401, PLC0415
    except ImportError as error:
        raise InputError(MISSING_EXTRA) from error


@contextmanager
def connect_cluster() -> Iterator[None]:
    """Context manager: connect to the cluster of this process, that of RAY_ADDRESS, or a new local one.

    Raises InputError if Ray is not installed.
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
        )  # Ray's handler ends the process before requests are drained
    try:
        yield
    finally:
        ray.shutdown()


def check_model(config: EngineConfig) -> None:
    """Load a model without weights, to report errors here and once, and to download files only once. Raises
    the errors of opening an engine."""
    from ...models.loader.loader import load_bundle  # noqa: PLC0415 - imports torch, which --help does not need

    with progress(f"trimtab: checking {config.model} …") as on_progress:
        load_bundle(config.model, config.load_format, config.chat_template, on_progress, config.dtype)


def actor_options(config: RayConfig, engine: EngineConfig) -> dict[str, Any]:
    """CPUs and GPUs that Ray reserves for an engine."""
    import ray  # noqa: PLC0415

    num_gpus = config.replica_gpus
    if num_gpus is None:
        num_gpus = float(engine.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0)
    return {"num_cpus": config.replica_cpus, "num_gpus": num_gpus}
