"""An HTTP call as plain data, so that it can go to whichever replica suits it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Scope

KEPT = ("type", "http_version", "method", "scheme", "path", "query_string", "headers", "client")
"""What of an ASGI scope is plain data and about the call."""
LEADING = 512
"""Characters of a text that say which prompts begin alike."""


@dataclass(frozen=True)
class Call:
    """A call: its ASGI scope, its body, and the key of the branch prompts that it leads to.

    Calls of one key have branches that begin alike, so that a replica which has answered one has computed
    the beginning of the others.
    """

    scope: dict[str, Any]
    body: bytes = b""
    key: bytes = field(default=b"")

    @classmethod
    def of(cls, scope: Scope, body: bytes) -> Call:
        """The call that a server was asked."""
        return cls({name: scope[name] for name in KEPT if name in scope}, body, key_of(body))

    @classmethod
    def get(cls, path: str) -> Call:
        """A call of ours."""
        scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": path}
        return cls({**scope, "query_string": b"", "headers": []})


def key_of(body: bytes) -> bytes:
    """A digest of how a body's branch prompts begin: of the system text and the wishes, or where there are
    none of how the conversation begins. Nothing for what is no such body."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return b""
    if not isinstance(values, Mapping):
        return b""
    leading = [
        *_system(values.get("messages")),
        *_wishes(values.get("steering")),
        values.get("negative_prompt"),
    ]
    parts = [part for part in leading if part] or [_first(values)]
    text = json.dumps([part if isinstance(part, str) else json.dumps(part) for part in parts])
    return blake2b(text.encode(errors="replace"), digest_size=16).digest()


def _system(messages: Any) -> list[Any]:
    if not isinstance(messages, list):
        return []
    found = [each for each in messages if isinstance(each, Mapping) and each.get("role") == "system"]
    return [each.get("content") for each in found]


def _wishes(steering: Any) -> list[Any]:
    if not isinstance(steering, Mapping):
        return [steering]
    found = steering.get("objectives")
    if not isinstance(found, list):
        return []
    return [each.get("text") if isinstance(each, Mapping) else each for each in found]


def _first(values: Mapping[str, Any]) -> str:
    found = values.get("messages", values.get("prompt"))
    first = found[0] if isinstance(found, list) and found else found
    return json.dumps(first)[:LEADING]
