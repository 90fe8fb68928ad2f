"""Many concurrent clients of one server, each with a steered stream; some disconnect midway."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing, suppress

from ....kernels.common.errors import RunError
from .client import HTTPClient, HTTPStatusError
from .stream import CHAT_ENDPOINT

QUESTION_TEMPLATE = "What happens if an earthworm is cut in {} parts?"
OBJECTIVES = {"Your answer should be uplifting.": 0.7, "Your answer should be one short sentence.": 0.3}


async def run_swarm(
    port: int, num_clients: int, max_tokens: int, leave_seed: int | None = None
) -> list[tuple[str, float]]:
    """Return each client's outcome and the seconds it took.

    Outcomes: "done", "left" (the client disconnected), "error" (sent by the server), "broken" (the stream
    ended early), or the HTTP status of a refusal.
    leave_seed: a third of the clients disconnect after a random number of chunks; without it none does.
    """
    rng = random.Random(leave_seed)
    leave_after = [
        rng.randrange(1, max_tokens) if leave_seed is not None and index % 3 == 0 else None
        for index in range(num_clients)
    ]
    return await asyncio.gather(
        *(_run_client(port, index, max_tokens, leave_after[index]) for index in range(num_clients))
    )


async def _run_client(port: int, index: int, max_tokens: int, leave_after: int | None) -> tuple[str, float]:
    objectives = [{"text": text, "weight": weight} for text, weight in OBJECTIVES.items()]
    body = {
        "messages": [{"role": "user", "content": QUESTION_TEMPLATE.format(index)}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "steering": {"objectives": objectives, "trace": True},
    }
    start, outcome, num_chunks = time.perf_counter(), "broken", 0
    with suppress(RunError):
        try:
            async with aclosing(
                HTTPClient(f"http://127.0.0.1:{port}").stream_lines(CHAT_ENDPOINT, body)
            ) as lines:
                async for line in lines:
                    num_chunks += line.startswith(b"data: {")
                    if b'"error"' in line:
                        outcome = "error"
                    if line.startswith(b"data: [DONE]") and outcome == "broken":
                        outcome = "done"
                    if leave_after is not None and num_chunks >= leave_after:
                        outcome = "left"
                        break
        except HTTPStatusError as error:
            outcome = str(error.status)
    return outcome, time.perf_counter() - start
