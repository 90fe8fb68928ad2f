"""An HTTP call as plain data, so that it can go to whichever replica suits it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import Scope

SCOPE_KEYS = ("type", "http_version", "method", "scheme", "path", "query_string", "headers", "client")
"""What of an ASGI scope is plain data and about the call."""
PREFIX_CHARS = 512
"""Characters of a text that say which prompts begin alike."""


@dataclass(frozen=True)
class HTTPCall:
    """A call: its ASGI scope, its body, and the key of the branch prompts that it leads to.

    Calls of one key have branches that begin alike, so that a replica which has answered one has computed
    the beginning of the others.
    """

    scope: dict[str, Any]
    body: bytes = b""
    key: bytes = field(default=b"")

    @classmethod
    def from_scope(cls, scope: Scope, body: bytes) -> HTTPCall:
        """The call that a server was asked."""
        return cls({name: scope[name] for name in SCOPE_KEYS if name in scope}, body, prefix_key(body))

    @classmethod
    def get(cls, path: str) -> HTTPCall:
        """A call of ours."""
        scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": path}
        return cls({**scope, "query_string": b"", "headers": []})


def prefix_key(body: bytes) -> bytes:
    """A digest of how a body's branch prompts begin: of the system text and the objectives, or where there
    are none of how the conversation begins. Nothing for what is no such body."""
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
