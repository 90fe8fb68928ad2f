"""FastAPI application: routes, API key check and error handlers of the HTTP server."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response

from ...kernels.common.version import VERSION
from ..methods.builtin import METHODS
from ..methods.registry import setting_names
from .config import ServerConfig
from .errors import SERVER_ERROR, ApiError, to_api_error, unknown_model
from .http import read_json_body
from .metrics import Metrics
from .openapi import body_openapi
from .protocol import ChatCompletionRequest, CompletionRequest
from .requests import RequestParser
from .serving import CallHandler
from .steering import Profiles

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from ..async_engine import AsyncEngine

PAGE_DIR = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",  # the browser never parses strings as HTML
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(engine: AsyncEngine, config: ServerConfig | None = None) -> FastAPI:
    """Create the FastAPI application for an engine. The caller owns the engine and closes it.

    Raises InputError if the profiles file is invalid.
    """
    config = config or ServerConfig()
    model = engine.config.served_model_name or engine.config.model
    profiles = Profiles.from_file(Path(config.profiles)) if config.profiles else Profiles({})
    metrics, parser = Metrics(engine), RequestParser(engine, model, profiles)
    token_bytes = lru_cache(maxsize=1 << 16)(engine.tokenizer.token_bytes)
    handler = CallHandler(engine, config, model, metrics, token_bytes)
    created = int(time.time())

    app = FastAPI(title="trimtab", version=VERSION)
    _add_error_handlers(app)
    if config.api_key is not None:
        app.add_middleware(APIKeyMiddleware, key=config.api_key)

    @app.post("/v1/chat/completions", openapi_extra=body_openapi(ChatCompletionRequest))
    async def chat_completions(http: Request) -> Response:
        """Generate the answer to a conversation, steered toward the objectives of `steering`."""
        return await handler.serve(http, parser.parse_chat)

    @app.post("/v1/completions", openapi_extra=body_openapi(CompletionRequest))
    async def completions(http: Request) -> Response:
        """Continue a text. In a branch prompt the objective precedes the text, separated by an empty line."""
        return await handler.serve(http, parser.parse_completion)

    @app.post("/v1/steer/preview", openapi_extra=body_openapi(ChatCompletionRequest))
    async def preview(http: Request) -> dict[str, Any]:
        """Return the branch prompts of a chat request and their token counts, without generating."""
        return await asyncio.to_thread(_preview_prompts, engine, parser, await read_json_body(http, config))

    @app.get("/v1/steer/methods")
    async def methods() -> dict[str, Any]:
        """List the steering methods and their settings with the published defaults."""
        return {"methods": [_method_info(cls) for cls in METHODS]}

    @app.get("/v1/steer/profiles")
    async def named() -> dict[str, Any]:
        """List the steering profiles of this server."""
        return {"profiles": profiles.definitions}

    model_card = {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "trimtab",
        "max_model_len": engine.config.max_model_len or engine.model_config.context_length,
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the served model."""
        return {"object": "list", "data": [model_card]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        """Describe the served model."""
        if name != model:
            raise unknown_model(name, model)
        return model_card

    @app.get("/health")
    async def health() -> Response:
        """Return 200 when the engine serves requests, otherwise 503 with the reason."""
        if reason := await engine.health_error():
            raise ApiError(503, reason, SERVER_ERROR)
        return JSONResponse({"status": "ok"})

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Return the version of trimtab."""
        return {"version": VERSION}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Return the metrics in the Prometheus text format."""
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    for path, file in (("/", "index.html"), ("/page.css", "page.css"), ("/page.js", "page.js")):
        app.add_api_route(path, _page_route(file), include_in_schema=False)
    return app


def _preview_prompts(engine: AsyncEngine, parser: RequestParser, values: dict[str, Any]) -> dict[str, Any]:
    request = parser.parse_chat(values).requests[0]
    try:
        prompts = engine.render(request)
    except Exception as error:
        raise to_api_error(error, "messages") from error
    return {
        "method": request.steering.name,
        "weights": list(request.steering.weights()),
        "notes": request.steering.notes(),
        "branches": [
            {"name": branch.name, "prompt": branch.prompt, "tokens": len(branch.prompt_token_ids)}
            for branch in prompts
        ],
    }


def _method_info(cls: Any) -> dict[str, Any]:
    fields_by_name = {field.name: field for field in fields(cls)}
    field_info = {
        name: {"default": fields_by_name[name].default, "help": fields_by_name[name].metadata["help"]}
        for name in setting_names(cls)
    }
    return {
        "name": cls.name,
        "objective_arity": cls.objective_arity,
        "wishes": cls.objective_arity,  # the key's name until 0.1, for one more release
        "fields": field_info,
        "presets": cls.presets,
    }


def _page_route(file: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return FileResponse(PAGE_DIR / file, headers=PAGE_HEADERS)

    return page


class APIKeyMiddleware:
    """ASGI middleware that requires the API key under /v1; the key is compared in constant time."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        app_path = path.removeprefix(scope.get("root_path", ""))  # when mounted in another application
        if scope["type"] == "http" and (path.startswith("/v1") or app_path.startswith("/v1")):
            scheme, _, token = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._key):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                await ApiError(401, message, code="invalid_api_key").response(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _add_error_handlers(app: FastAPI) -> None:
    """Return every error in the OpenAI format, without a stack trace."""

    @app.exception_handler(ApiError)
    async def handle_api_error(request: Request, error: ApiError) -> Response:
        return error.response

    @app.exception_handler(HTTPException)
    async def handle_http_error(request: Request, error: HTTPException) -> Response:
        route = f"{request.method} {request.url.path}"
        message = f"{route} does not exist" if error.status_code in (404, 405) else str(error.detail)
        response = ApiError(error.status_code, message).response
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def handle_validation_error(request: Request, error: RequestValidationError) -> Response:
        return ApiError(400, "the request is invalid for this route; see /docs").response

    @app.exception_handler(Exception)
    async def handle_unexpected_error(request: Request, error: Exception) -> Response:
        return to_api_error(error).response
