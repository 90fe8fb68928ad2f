"""The application for Ray Serve, and `trimtab serve --ray`, which runs it until it is told to stop."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine.config import EngineConfig
from ...engine.server.config import ServerConfig
from ...engine.utils.fields import check_known
from ...kernels.common.errors import RunError
from ..cli import open_engine
from ..cli.terminal import say
from .cluster import actor_options, check_model, connected, require
from .config import RayConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ray.serve import Application

    from ...engine.async_engine import AsyncEngine

NAME = "trimtab"
ROUTER = f"{__package__}.router.PrefixRouter"
GATEWAY_CALLS = 10_000
"""Calls under way that one gateway takes; it does little for each, so few are needed."""
REPLICAS_A_GATEWAY = 4
LAST_WORDS = 10.0
"""Seconds that a gateway outlives the replicas by, so that it can tell whom they have not answered."""


@dataclass(frozen=True)
class Service:
    """All that an application is made of."""

    engine: EngineConfig
    server: ServerConfig
    ray: RayConfig

    @property
    def fits(self) -> int:
        """Calls that keep an engine's batch full when each has a branch for one or two wishes."""
        return max(1, self.engine.max_num_seqs // 3)

    def application(self, opening: Callable[[], AsyncEngine] | None = None) -> Application:
        """Gateways before replicas. `opening` makes the engine where each replica is."""
        from ray import serve  # noqa: PLC0415

        from .gateway import Gateway  # noqa: PLC0415
        from .replica import Replica  # noqa: PLC0415

        deadline = self.server.drain_timeout
        replica = serve.deployment(Replica).options(
            **self._scaling(),
            ray_actor_options=actor_options(self.ray, self.engine),
            max_ongoing_requests=self.engine.max_waiting,
            max_queued_requests=self.engine.max_waiting,
            graceful_shutdown_timeout_s=deadline,
            max_constructor_retry_count=3,
            request_router_config={
                "request_router_class": ROUTER,
                "request_router_kwargs": {"slack": max(1, self.fits // 2)},
            },
        )
        gateway = serve.deployment(serve.ingress()(Gateway)).options(
            num_replicas=-(-self.ray.most // REPLICAS_A_GATEWAY),
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=GATEWAY_CALLS,
            max_surge_percent=100,  # a new one is there before the old one goes
            graceful_shutdown_timeout_s=deadline + LAST_WORDS,
        )
        engine = opening or partial(open_engine.open_async_engine, self.engine)
        return gateway.bind(replica.bind(engine, self.server), self.server)

    def _scaling(self) -> dict[str, Any]:
        least, most = self.ray.least, self.ray.most
        if least == most:
            return {"num_replicas": least}
        return {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": self.fits,
            }
        }


def build(args: Mapping[str, Any]) -> Application:
    """For `serve deploy` and `serve run trimtab.tools.ray.application:build`: `args` are the fields of
    EngineConfig, ServerConfig (but host and port, which are Serve's) and RayConfig.

    Raises InputError for another field, or a value out of range.
    """
    require()
    parts = (EngineConfig, ServerConfig, RayConfig)
    given = [{f.name: args[f.name] for f in fields(cls) if f.name in args} for cls in parts]
    known = {f.name for cls in parts for f in fields(cls)}
    for name in args:
        if name not in known:
            check_known(EngineConfig, [name])
    engine, server, ray = given
    ray["ray"] = True
    return Service(EngineConfig(**engine), ServerConfig(**server), RayConfig(**ray)).application()


def run(service: Service) -> int:
    """Serves until it is told to stop; then takes no more, and lets answers end."""
    from ...engine.server.steering import Profiles  # noqa: PLC0415 - of the extra `serve`

    require()
    if service.server.profiles:
        Profiles.from_file(Path(service.server.profiles))
    host = service.server.host
    port = _free(host, service.server.port)
    check_model(service.engine)
    with connected():
        from ray import serve  # noqa: PLC0415

        serve.start(http_options={"host": host, "port": port})
        try:
            _deploy(service)
            say(f"serving {service.engine.model} at http://{host}:{port}; the API is described at /docs")
            threading.Event().wait()
        finally:
            serve.delete(NAME)
            serve.shutdown()
    return 0


def _deploy(service: Service) -> None:
    from ray import serve  # noqa: PLC0415

    try:
        serve.run(service.application(), name=NAME)
    except RuntimeError as error:
        raise RunError(f"the engines did not start on Ray: {str(error).strip().splitlines()[-1]}") from error


def _free(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises OSError where it is taken, which Ray would not say."""
    with socket.create_server((host, port)) as listener:
        number: int = listener.getsockname()[1]
        return number
