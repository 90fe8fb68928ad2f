"""One streamed response of an OpenAI-compatible server, with the arrival times of its chunks."""

from __future__ import annotations

import json
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ....kernels.common.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .client import HTTPClient

CHAT_ENDPOINT = "/v1/chat/completions"


@dataclass
class StreamResult:
    """Timing of one response, in seconds.

    first: arrival of the first chunk with text, None without text. gaps: times between chunks; a chunk may
    hold several tokens. steered: whether the request had objectives. prompt_tokens, tokens: the server's
    usage counts; without usage each chunk counts as a token. error: why the request failed.
    """

    steered: bool
    start: float
    end: float = 0.0
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Time to the first chunk; the whole latency if there is no text."""
        return (self.end if self.first is None else self.first) - self.start

    @property
    def latency(self) -> float:
        """Time from sending the request to the last line."""
        return self.end - self.start

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None with fewer than two tokens."""
        return (self.latency - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None

    def relative_to(self, origin: float) -> StreamResult:
        """A copy with times relative to `origin`."""
        first = None if self.first is None else self.first - origin
        return replace(self, start=self.start - origin, end=self.end - origin, first=first)


async def stream_request(
    client: HTTPClient, path: str, body: Mapping[str, Any], steered: bool
) -> StreamResult:
    """Send a request and read the stream to its end. Server failures are returned in `error`, not raised."""
    result = StreamResult(steered, time.perf_counter())
    try:
        await _read_events(client, path, body, result)
    except RunError as error:
        result.error = str(error)
    except (ValueError, LookupError, TypeError) as error:
        result.error = f"the server sent an invalid stream event ({type(error).__name__}: {error})"
    result.end = time.perf_counter()
    return result


async def _read_events(client: HTTPClient, path: str, body: Mapping[str, Any], result: StreamResult) -> None:
    last_time, num_chunks, done = result.start, 0, False
    async with aclosing(client.stream_lines(path, body)) as lines:
        async for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
                continue
            event = json.loads(data)
            if event.get("error"):
                raise RunError(f"the server sent an error: {event['error']}")
            if usage := event.get("usage"):
                result.prompt_tokens, result.tokens = usage["prompt_tokens"], usage["completion_tokens"]
            if any(_delta_text(choice) for choice in event.get("choices", ())):
                now = time.perf_counter()
                if result.first is None:
                    result.first = now
                else:
                    result.gaps.append(now - last_time)
                last_time, num_chunks = now, num_chunks + 1
    if not done:
        raise RunError("the stream ended without [DONE]")
    result.tokens = result.tokens or num_chunks


def _delta_text(choice: Mapping[str, Any]) -> str:
    """The text of a chat or completion chunk. Reasoning models use `reasoning_content`."""
    delta = choice.get("delta") or {}
    return str(choice.get("text") or delta.get("content") or delta.get("reasoning_content") or "")
