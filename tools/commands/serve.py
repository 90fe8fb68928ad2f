"""`trimtab serve`: an OpenAI-compatible HTTP server with a playground page."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from ...engine.config import EngineConfig
from ...engine.server.config import ServerConfig
from ...kernels.common.errors import InputError
from ..cli import common_args, flags, open_engine
from ..cli.terminal import log_line
from ..ray.config import RayConfig

if TYPE_CHECKING:
    import argparse

    from ..cli.parser import Parser

API_KEY_ENV = "TRIMTAB_API_KEY"
LOG_FLUSH_SECONDS = 2.0
"""How long a server that ends waits for its last log lines to be written."""


def add_arguments(parser: Parser) -> None:
    flags.add_fields(parser, "server", ServerConfig)
    flags.add_fields(parser, "model", EngineConfig)
    flags.add_fields(parser, "ray", RayConfig)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. The socket is bound before the model is loaded."""
    config = ServerConfig(**flags.fields_from_args(ServerConfig, args))
    if config.api_key is None and os.environ.get(API_KEY_ENV):
        config = replace(config, api_key=os.environ[API_KEY_ENV])
    engine_config, ray_config = (
        common_args.engine_config(args),
        RayConfig(**flags.fields_from_args(RayConfig, args)),
    )
    try:
        import uvicorn  # noqa: PLC0415 - needs the extra `serve`

        from ...engine.server.app import create_app  # noqa: PLC0415
        from ...engine.server.http import base_url, listen  # noqa: PLC0415
        from ...engine.utils.log_writer import LogWriter  # noqa: PLC0415
    except ImportError as error:
        raise InputError(f"serving needs the package {error.name}; pip install 'trimtab[serve]'") from error
    if ray_config.ray:
        from ..ray import application  # noqa: PLC0415 - needs the extra `ray`

        return application.run(application.Service(engine_config, config, ray_config))
    with listen(config.host, config.port) as listener:
        engine = open_engine.open_async_engine(engine_config)
        try:
            app = create_app(engine, config)
            log_writer = LogWriter(sys.stdout.fileno())
            logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[log_writer])
            url = base_url(*listener.getsockname()[:2])
            log_line(f"serving {engine_config.model} at {url}; the API is described at /docs")
            uvicorn_config = uvicorn.Config(
                app,
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=round(config.drain_timeout),
            )
            try:
                uvicorn.Server(uvicorn_config).run(sockets=[listener])
            finally:
                log_writer.flush_for(LOG_FLUSH_SECONDS)
        finally:
            engine.shutdown()
    return 0
