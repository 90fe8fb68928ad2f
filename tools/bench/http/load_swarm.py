"""Many clients of a server at once, each with a steered stream of its own, of whom some leave it midway."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing, suppress

from ....kernels.common.errors import RunError
from .client import Client, RefusedError
from .stream import CHAT

QUESTION = "What happens if an earthworm is cut in {} parts?"
WISHES = {"Your answer should be uplifting.": 0.7, "Your answer should be one short sentence.": 0.3}


async def wave(port: int, clients: int, tokens: int, leaving: int | None = None) -> list[tuple[str, float]]:
    """How each client's stream ended, and after how many seconds.

    It ends "done", "left", with an "error" of the server's, "broken" off, or with the status of a refusal.
    leaving: the seed of who leaves and when, a third of them; without it nobody does.
    """
    chance = random.Random(leaving)
    leaves = [
        chance.randrange(1, tokens) if leaving is not None and index % 3 == 0 else None
        for index in range(clients)
    ]
    return await asyncio.gather(*(_stream(port, index, tokens, leaves[index]) for index in range(clients)))


async def _stream(port: int, index: int, tokens: int, leave_at: int | None) -> tuple[str, float]:
    objectives = [{"text": text, "weight": weight} for text, weight in WISHES.items()]
    body = {
        "messages": [{"role": "user", "content": QUESTION.format(index)}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "steering": {"objectives": objectives, "trace": True},
    }
    start, end, pieces = time.perf_counter(), "broken", 0
    with suppress(RunError):
        try:
            async with aclosing(Client(f"http://127.0.0.1:{port}").lines(CHAT, body)) as lines:
                async for line in lines:
                    pieces += line.startswith(b"data: {")
                    if b'"error"' in line:
                        end = "error"
                    if line.startswith(b"data: [DONE]") and end == "broken":
                        end = "done"
                    if leave_at is not None and pieces >= leave_at:
                        end = "left"
                        break
        except RefusedError as error:
            end = str(error.status)
    return end, time.perf_counter() - start
