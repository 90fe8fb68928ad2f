"""API errors: status codes and JSON bodies as in the OpenAI API."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response

from ...kernels.common.errors import BusyError, ContextError, InputError, RunError, short_repr
from ..utils.json import dumps

INVALID_REQUEST, SERVER_ERROR = "invalid_request_error", "server_error"
RETRY_AFTER = "1"
"""Seconds after which a client rejected with 429 may retry."""


class ApiError(Exception):
    """An error response. `param` is the request field that caused it."""

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
        """The JSON body in the OpenAI format."""
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
    """A 400 error for an invalid request."""
    return ApiError(400, message, INVALID_REQUEST, param, code)


def unknown_model(name: str, served_name: str) -> ApiError:
    """A 404 error for a model other than the served one."""
    message = f"the model {short_repr(name)} does not exist; this server serves {short_repr(served_name)}"
    return ApiError(404, message, INVALID_REQUEST, "model", "model_not_found")


def client_disconnected() -> ApiError:
    """The client closed the connection; 499 is nginx's status code for that."""
    return ApiError(499, "the client disconnected")


def shutting_down() -> ApiError:
    """A 503 error: the server is shutting down and the drain timeout has passed."""
    return ApiError(503, "the server is shutting down", SERVER_ERROR)


def to_api_error(error: BaseException, param: str = "") -> ApiError:
    """Convert an exception to an ApiError. The field of an InputError is relative to the path `param`."""
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
    return ApiError(500, "internal server error; see the server log", SERVER_ERROR)
