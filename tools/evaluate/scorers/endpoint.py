"""Client of an OpenAI-compatible chat endpoint, with retries."""

from __future__ import annotations

import json
import re
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import httpx2 as httpx

from ....kernels.common.errors import InputError, RunError, truncate

if TYPE_CHECKING:
    from collections.abc import Sequence

API_KEY_ENV = "OPENAI_API_KEY"
ADDRESS_PATTERN = re.compile(
    r"(?P<url>https?://(?:[\w.-]+|\[[\da-f:]+\])(?::\d{1,5})?(?:/[\w.~%/-]*)?)(?:\?model=(?P<model>[^&#\s]+))?",
    re.ASCII,
)
HEADER_VALUE_PATTERN = re.compile("[!-~]*")
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
        if not HEADER_VALUE_PATTERN.fullmatch(api_key):
            raise InputError(f"{API_KEY_ENV} must be printable ASCII without spaces")
        self.url = match["url"].rstrip("/")
        self._requested_model = unquote(match["model"] or "")
        headers = {"Accept-Encoding": "identity", "User-Agent": "trimtab"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        try:
            if (httpx.URL(self.url).port or 0) >= 1 << 16:
                raise httpx.InvalidURL("a port is at most 65535")
            # no redirects: the API key is for the named server only, and a redirected POST loses its body
            self._client = httpx.Client(headers=headers, timeout=TIMEOUT, follow_redirects=False)
        except (httpx.InvalidURL, ValueError, ImportError) as error:
            raise InputError(
                f"the judge's address {address!r}, or the proxy of the environment, cannot be used: {error}"
            ) from None

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
        content = self._request_with_retries(path, body)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise self._format_error(content.decode(errors="replace")) from None

    def _request_with_retries(self, path: str, body: dict[str, Any] | None) -> bytes:
        """The response body; retries transient errors after each of RETRY_DELAYS."""
        for delay in (*RETRY_DELAYS, None):
            try:
                response, content = self._send(path, body)
            except httpx.TransportError as error:
                if delay is None:
                    reason = _shorten(str(error) or type(error).__name__)
                    raise RunError(f"the judge at {self.url} cannot be reached: {reason}") from None
                time.sleep(delay)
                continue
            if response.is_success:
                return content
            if delay is None or response.status_code not in RETRY_STATUSES:
                raise self._status_error(response, content)
            time.sleep(_retry_delay(response, delay))
        raise AssertionError("the last try returns or raises")

    def _send(self, path: str, body: dict[str, Any] | None) -> tuple[httpx.Response, bytes]:
        """The response and the first MAX_RESPONSE_BYTES of its body."""
        method, content = "GET" if body is None else "POST", bytearray()
        with self._client.stream(method, self.url + path, json=body) as response:
            try:
                for chunk in response.iter_raw():
                    content += chunk
                    if len(content) >= MAX_RESPONSE_BYTES:
                        break
            except httpx.TransportError:
                if response.is_success:
                    raise
        return response, bytes(content[:MAX_RESPONSE_BYTES])

    def _status_error(self, response: httpx.Response, content: bytes) -> RunError:
        status, detail = response.status_code, _shorten(content.decode(errors="replace"))
        hint = f"; is {API_KEY_ENV} right?" if status in (401, 403) else ""
        return RunError(f"the judge at {self.url} answers {status} {response.reason_phrase}{hint}: {detail}")

    def _format_error(self, text: str) -> RunError:
        return RunError(f"{self.url} does not answer as an OpenAI-compatible server does: {_shorten(text)}")


def _retry_delay(response: httpx.Response, default: float) -> float:
    """Seconds to wait by the Retry-After header, else `default`."""
    retry_after = response.headers.get("Retry-After", "")
    return (
        min(float(retry_after), MAX_RETRY_DELAY)
        if retry_after.isdecimal() and retry_after.isascii()
        else default
    )


def _shorten(text: str) -> str:
    return truncate(" ".join(text.split()), MAX_SHOWN_CHARS)
