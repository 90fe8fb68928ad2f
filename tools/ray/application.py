"""The Ray Serve application, and `trimtab serve --ray`, which runs it until a signal stops it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine.config import EngineConfig
from ...engine.server.config import ServerConfig
from ...engine.utils.fields import reject_unknown_fields
from ...kernels.common.errors import RunError
from ..cli import open_engine
from ..cli.terminal import log_line
from .cluster import actor_options, check_model, connect_cluster, require_ray
from .config import RayConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ray.serve import Application

    from ...engine.async_engine import AsyncEngine

APP_NAME = "trimtab"
ROUTER = f"{__package__}.router.PrefixRouter"
MAX_GATEWAY_CALLS = 10_000
"""Maximum concurrent calls of one gateway. A call costs it little, so few gateways are needed."""
REPLICAS_PER_GATEWAY = 4
GATEWAY_GRACE = 10.0
"""Seconds that a gateway outlives the replicas, so that it can report failures of unfinished calls."""


@dataclass(frozen=True)
class Service:
    """The settings of an application."""

    engine: EngineConfig
    server: ServerConfig
    ray: RayConfig

    @property
    def target_concurrency(self) -> int:
        """Concurrent calls that fill an engine's batch, with 2 or 3 branches each."""
        return max(1, self.engine.max_num_seqs // 3)

    def build_app(self, engine_factory: Callable[[], AsyncEngine] | None = None) -> Application:
        """Build gateways in front of replicas. `engine_factory` creates the engine in a replica's process."""
        from ray import serve  # noqa: PLC0415

        from .gateway import Gateway  # noqa: PLC0415
        from .replica import Replica  # noqa: PLC0415

        drain_timeout = self.server.drain_timeout
        replica = serve.deployment(Replica).options(
            **self._scaling_options(),
            ray_actor_options=actor_options(self.ray, self.engine),
            max_ongoing_requests=self.engine.max_waiting,
            max_queued_requests=self.engine.max_waiting,
            graceful_shutdown_timeout_s=drain_timeout,
            max_constructor_retry_count=3,
            request_router_config={
                "request_router_class": ROUTER,
                "request_router_kwargs": {"slack": max(1, self.target_concurrency // 2)},
            },
        )
        gateway = serve.deployment(serve.ingress()(Gateway)).options(
            num_replicas=-(-self.ray.max_replicas // REPLICAS_PER_GATEWAY),
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=MAX_GATEWAY_CALLS,
            max_surge_percent=100,  # a new gateway starts before the old one stops
            graceful_shutdown_timeout_s=drain_timeout + GATEWAY_GRACE,
        )
        factory = engine_factory or partial(open_engine.open_async_engine, self.engine)
        return gateway.bind(replica.bind(factory, self.server), self.server)

    def _scaling_options(self) -> dict[str, Any]:
        min_replicas, max_replicas = self.ray.min_replicas, self.ray.max_replicas
        if min_replicas == max_replicas:
            return {"num_replicas": min_replicas}
        return {
            "autoscaling_config": {
                "min_replicas": min_replicas,
                "max_replicas": max_replicas,
                "target_ongoing_requests": self.target_concurrency,
            }
        }


def build(args: Mapping[str, Any]) -> Application:
    """Build the application for `serve deploy` and `serve run trimtab.tools.ray.application:build`.

    `args` are fields of EngineConfig, ServerConfig (without host and port, which Ray Serve sets) and
    RayConfig. Raises InputError for an unknown field, or a value out of range.
    """
    require_ray()
    config_classes = (EngineConfig, ServerConfig, RayConfig)
    kwargs = [{f.name: args[f.name] for f in fields(cls) if f.name in args} for cls in config_classes]
    known_fields = {f.name for cls in config_classes for f in fields(cls)}
    for name in args:
        if name not in known_fields:
            reject_unknown_fields(EngineConfig, [name])
    engine, server, ray = kwargs
    ray["ray"] = True
    return Service(EngineConfig(**engine), ServerConfig(**server), RayConfig(**ray)).build_app()


def run(service: Service) -> int:
    """Serve until a signal arrives; then reject new calls and finish the running ones."""
    from ...engine.server.http import base_url  # noqa: PLC0415 - needs the extra `serve`
    from ...engine.server.steering import Profiles  # noqa: PLC0415

    require_ray()
    if service.server.profiles:
        Profiles.from_file(Path(service.server.profiles))
    host = service.server.host
    port = _free_port(host, service.server.port)
    check_model(service.engine)
    with connect_cluster():
        from ray import serve  # noqa: PLC0415

        serve.start(http_options={"host": host, "port": port})
        try:
            _deploy(service)
            url = base_url(host, port)
            log_line(f"serving {service.engine.model} at {url}; the API is described at /docs")
            threading.Event().wait()
        finally:
            serve.delete(APP_NAME)
            serve.shutdown()
    return 0


def _deploy(service: Service) -> None:
    from ray import serve  # noqa: PLC0415

    try:
        serve.run(service.build_app(), name=APP_NAME)
    except RuntimeError as error:
        raise RunError(f"the engines did not start on Ray: {str(error).strip().splitlines()[-1]}") from error


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises OSError if it is in use, which Ray would not report."""
    from ...engine.server.http import listen  # noqa: PLC0415 - needs the extra `serve`

    with listen(host, port) as listener:
        free_port: int = listener.getsockname()[1]
        return free_port
