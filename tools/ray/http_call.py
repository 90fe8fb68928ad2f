"""An HTTP call as plain data, which can be sent to a replica, and its routing key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Scope

SCOPE_KEYS = ("type", "http_version", "method", "scheme", "path", "query_string", "headers", "client")
"""Keys of an ASGI scope that describe the call and are plain data."""
PREFIX_CHARS = 512
"""Characters of the first message that enter the key of a call without objectives."""


@dataclass(frozen=True)
class HTTPCall:
    """A call: its ASGI scope, its body, and the routing key of its branch prompts.

    Branch prompts of calls with the same key share a prefix, which a replica that has answered one of them
    has in its prefix cache.
    """

    scope: dict[str, Any]
    body: bytes = b""
    key: bytes = field(default=b"")

    @classmethod
    def from_scope(cls, scope: Scope, body: bytes) -> HTTPCall:
        """The call of an ASGI scope and its body."""
        return cls({name: scope[name] for name in SCOPE_KEYS if name in scope}, body, prefix_key(body))

    @classmethod
    def get(cls, path: str) -> HTTPCall:
        """An internal GET call."""
        scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": path}
        return cls({**scope, "query_string": b"", "headers": []})


def prefix_key(body: bytes) -> bytes:
    """A digest of the system texts and objectives of a body or, without these, of the start of the
    conversation. Empty for an invalid body."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return b""
    if not isinstance(values, Mapping):
        return b""
    candidates = [
        *_system_texts(values.get("messages")),
        *_objective_texts(values.get("steering")),
        values.get("negative_prompt"),
    ]
    prefixes = [prefix for prefix in candidates if prefix] or [_first_text(values)]
    text = json.dumps([part if isinstance(part, str) else json.dumps(part) for part in prefixes])
    return blake2b(text.encode(errors="replace"), digest_size=16).digest()


def _system_texts(messages: Any) -> list[Any]:
    if not isinstance(messages, list):
        return []
    system_messages = [
        message for message in messages if isinstance(message, Mapping) and message.get("role") == "system"
    ]
    return [each.get("content") for each in system_messages]


def _objective_texts(steering: Any) -> list[Any]:
    if not isinstance(steering, Mapping):
        return [steering]
    objectives = steering.get("objectives")
    if not isinstance(objectives, list):
        return []
    return [
        objective.get("text") if isinstance(objective, Mapping) else objective for objective in objectives
    ]


def _first_text(values: Mapping[str, Any]) -> str:
    value = values.get("messages", values.get("prompt"))
    first = value[0] if isinstance(value, list) and value else value
    return json.dumps(first)[:PREFIX_CHARS]
