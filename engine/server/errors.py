"""What goes wrong, in the words and numbers of the OpenAI API."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from ...kernels.common.errors import BusyError, ContextError, InputError, RunError, short_repr
from ..utils.json import dumps

INVALID_REQUEST, SERVER_ERROR = "invalid_request_error", "server_error"
RETRY_AFTER = "1"
"""Seconds after which a client that was refused for too much waiting may try again."""


class ApiError(Exception):
    """An answer other than 200. `param` is the field of the body that it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        error_type: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.error_type, self.param, self.code = (
            status,
            message,
            error_type,
            param,
            code,
        )

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "error": {
                "message": self.message,
                "type": self.error_type,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def response(self) -> Response:
        headers = {"Retry-After": RETRY_AFTER} if self.status == 429 else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(dumps(self.body), self.status, headers, "application/json")


def bad_request(message: str, param: str | None, code: str | None = None) -> ApiError:
    """A body that cannot be served."""
    return ApiError(400, message, INVALID_REQUEST, param, code)


def unknown_model(name: str, served_name: str) -> ApiError:
    """A model that is not here."""
    message = f"unknown model {short_repr(name)}; the one here is {short_repr(served_name)}"
    return ApiError(404, message, INVALID_REQUEST, "model", "model_not_found")


def client_disconnected() -> ApiError:
    """Nobody waits for the answer any more; the number is nginx's."""
    return ApiError(499, "the client left")


def shutting_down() -> ApiError:
    """The server stops, and has waited long enough."""
    return ApiError(503, "the server is stopping", SERVER_ERROR)


def to_api_error(error: BaseException, param: str = "") -> ApiError:
    """What a failure of the engine is to a client. `param` is where the fields that it names are."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(429, str(error), "rate_limit_error", None, "rate_limit_exceeded")
    if isinstance(error, RunError):
        return ApiError(503, str(error), SERVER_ERROR)
    if isinstance(error, InputError):
        param_path = ".".join(filter(None, (param, error.field)))
        code = "context_length_exceeded" if isinstance(error, ContextError) else None
        return bad_request(str(error), param_path or None, code)
    return ApiError(500, "the server failed; its log says why", SERVER_ERROR)
