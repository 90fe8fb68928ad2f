"""Client of an OpenAI-compatible chat endpoint, with retries."""

from __future__ import annotations

import json
import re
import time
from functools import cached_property
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import unquote
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ....kernels.common.errors import InputError, RunError, truncate

if TYPE_CHECKING:
    from collections.abc import Sequence

API_KEY_ENV = "OPENAI_API_KEY"
ADDRESS_PATTERN = re.compile(
    r"(?P<url>https?://(?:[\w.-]+|\[[\da-f:]+\])(?::\d{1,5})?(?:/[\w.~%/-]*)?)(?:\?model=(?P<model>[^&#\s]+))?",
    re.ASCII,
)
TIMEOUT = 300.0
RETRY_DELAYS = (1.0, 2.0, 4.0)
MAX_RETRY_DELAY = 60.0
"""Seconds: request timeout, delays between tries, and the maximum for the server's Retry-After."""
RETRY_STATUSES = (408, 429, 500, 502, 503, 504)
"""Transient errors, worth a retry."""
MAX_RESPONSE_BYTES = 1 << 23
MAX_SHOWN_CHARS = 200


class ChatEndpoint:
    """One model of a server. `address` is its base URL, such as http://localhost:8000/v1?model=NAME.

    Thread-safe. Raises InputError for an invalid address.
    """

    def __init__(self, address: str, api_key: str = "") -> None:
        match = ADDRESS_PATTERN.fullmatch(address)
        if not match:
            raise InputError(
                f"the judge's address is {address!r}; it must be like http://localhost:8000/v1, and may end "
                f"with ?model=NAME; a key is taken from {API_KEY_ENV}"
            )
        self.url, self._api_key = match["url"].rstrip("/"), api_key
        self._requested_model = unquote(match["model"] or "")
        self._opener = build_opener(_NoRedirect)

    @cached_property
    def model(self) -> str:
        """The requested model, else the first that the server lists."""
        if self._requested_model:
            return self._requested_model
        models = self._request_json("/models", None)
        try:
            return str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise RunError(f"{self.url}/models lists no model; name one with ?model=NAME") from None

    def complete(self, messages: Sequence[dict[str, str]], max_tokens: int) -> str:
        """Complete a conversation at temperature 0.

        Raises RunError if the server cannot be reached, returns an error, or sends an unexpected response.
        """
        params = {"messages": list(messages), "temperature": 0, "max_tokens": max_tokens}
        response = self._request_json("/chat/completions", {"model": self.model, **params})
        try:
            return str(response["choices"][0]["message"].get("content") or "")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._format_error(json.dumps(response)) from None

    def _request_json(self, path: str, body: dict[str, Any] | None) -> Any:
        text = self._request_with_retries(path, body)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise self._format_error(text.decode(errors="replace")) from None

    def _request_with_retries(self, path: str, body: dict[str, Any] | None) -> bytes:
        """The response body; retries transient errors after each of RETRY_DELAYS."""
        for delay in RETRY_DELAYS:
            try:
                return self._send(path, body)
            except HTTPError as error:
                if error.code not in RETRY_STATUSES:
                    raise self._status_error(error) from None
                time.sleep(_retry_delay(error, delay))
            except (OSError, HTTPException):
                time.sleep(delay)
        try:
            return self._send(path, body)
        except HTTPError as error:
            raise self._status_error(error) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise RunError(f"the judge at {self.url} cannot be reached: {reason}") from None

    def _send(self, path: str, body: dict[str, Any] | None) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "trimtab"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        payload = None if body is None else json.dumps(body).encode()
        with self._opener.open(Request(self.url + path, payload, headers), timeout=TIMEOUT) as response:
            content: bytes = response.read(MAX_RESPONSE_BYTES)
        return content

    def _status_error(self, error: HTTPError) -> RunError:
        try:
            detail = _shorten(error.read(MAX_RESPONSE_BYTES).decode(errors="replace"))
        except (OSError, HTTPException):
            detail = ""
        hint = f"; is {API_KEY_ENV} right?" if error.code in (401, 403) else ""
        return RunError(f"the judge at {self.url} answers {error.code} {error.reason}{hint}: {detail}")

    def _format_error(self, text: str) -> RunError:
        return RunError(f"{self.url} does not answer as an OpenAI-compatible server does: {_shorten(text)}")


class _NoRedirect(HTTPRedirectHandler):
    """Refuses redirects: the API key is for the named server only, and a redirected POST loses its body."""

    def redirect_request(self, *args: Any) -> None:
        """Return None, so that the redirect is an HTTPError."""


def _retry_delay(error: HTTPError, default: float) -> float:
    """Seconds to wait by the Retry-After header, else `default`."""
    retry_after = error.headers.get("Retry-After", "")
    return (
        min(float(retry_after), MAX_RETRY_DELAY)
        if retry_after.isdecimal() and retry_after.isascii()
        else default
    )


def _shorten(text: str) -> str:
    return truncate(" ".join(text.split()), MAX_SHOWN_CHARS)
