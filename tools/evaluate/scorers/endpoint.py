"""A model behind an OpenAI-compatible URL, asked until it answers."""

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

from ....kernels.common.errors import InputError, RunError, cut

if TYPE_CHECKING:
    from collections.abc import Sequence

KEY = "OPENAI_API_KEY"
ADDRESS = re.compile(
    r"(?P<url>https?://(?:[\w.-]+|\[[\da-f:]+\])(?::\d{1,5})?(?:/[\w.~%/-]*)?)(?:\?model=(?P<model>[^&#\s]+))?",
    re.ASCII,
)
TIMEOUT = 300.0
PAUSES = (1.0, 2.0, 4.0)
LONGEST_PAUSE = 60.0
"""Seconds: to an answer, between tries, and at most where the server says how long."""
PASSING = (408, 429, 500, 502, 503, 504)
"""What may be over when the same is asked again."""
MOST_BYTES = 1 << 23
SHOWN = 200


class Endpoint:
    """One model of a server. `address` is its base URL, such as http://localhost:8000/v1?model=NAME.

    Any number of threads may ask. Raises InputError for what is no such address.
    """

    def __init__(self, address: str, key: str = "") -> None:
        found = ADDRESS.fullmatch(address)
        if not found:
            raise InputError(
                f"the judge's address is {address!r}; it must be like http://localhost:8000/v1, and may end "
                f"with ?model=NAME; a key is taken from {KEY}"
            )
        self.url, self._key = found["url"].rstrip("/"), key
        self._asked = unquote(found["model"] or "")
        self._opener = build_opener(_NoRedirect)

    @cached_property
    def model(self) -> str:
        """The name asked for, else the first that the server lists."""
        if self._asked:
            return self._asked
        found = self._call("/models", None)
        try:
            return str(found["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise RunError(f"{self.url}/models lists no model; name one with ?model=NAME") from None

    def complete(self, messages: Sequence[dict[str, str]], max_tokens: int) -> str:
        """The answer to a conversation at temperature 0.

        Raises RunError when the server cannot be reached, refuses, or answers in no such form.
        """
        asked = {"messages": list(messages), "temperature": 0, "max_tokens": max_tokens}
        found = self._call("/chat/completions", {"model": self.model, **asked})
        try:
            return str(found["choices"][0]["message"].get("content") or "")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._unlike(json.dumps(found)) from None

    def _call(self, path: str, body: dict[str, Any] | None) -> Any:
        text = self._insist(path, body)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise self._unlike(text.decode(errors="replace")) from None

    def _insist(self, path: str, body: dict[str, Any] | None) -> bytes:
        """What the server answers, asked again after each pause while it cannot."""
        for pause in PAUSES:
            try:
                return self._read(path, body)
            except HTTPError as error:
                if error.code not in PASSING:
                    raise self._refused(error) from None
                time.sleep(_asked_pause(error, pause))
            except (OSError, HTTPException):
                time.sleep(pause)
        try:
            return self._read(path, body)
        except HTTPError as error:
            raise self._refused(error) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise RunError(f"the judge at {self.url} cannot be reached: {reason}") from None

    def _read(self, path: str, body: dict[str, Any] | None) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "trimtab"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        with self._opener.open(Request(self.url + path, data, headers), timeout=TIMEOUT) as response:
            found: bytes = response.read(MOST_BYTES)
        return found

    def _refused(self, error: HTTPError) -> RunError:
        try:
            said = _short(error.read(MOST_BYTES).decode(errors="replace"))
        except (OSError, HTTPException):
            said = ""
        why = f"; is {KEY} right?" if error.code in (401, 403) else ""
        return RunError(f"the judge at {self.url} answers {error.code} {error.reason}{why}: {said}")

    def _unlike(self, said: str) -> RunError:
        return RunError(f"{self.url} does not answer as an OpenAI-compatible server does: {_short(said)}")


class _NoRedirect(HTTPRedirectHandler):
    """A key is for the server that was named, and a question that is redirected loses its body."""

    def redirect_request(self, *args: Any) -> None:
        """Follows none, which leaves the answer an error."""


def _asked_pause(error: HTTPError, pause: float) -> float:
    """The seconds that the server asks to wait, else `pause`."""
    asked = error.headers.get("Retry-After", "")
    return min(float(asked), LONGEST_PAUSE) if asked.isdecimal() and asked.isascii() else pause


def _short(text: str) -> str:
    return cut(" ".join(text.split()), SHOWN)
