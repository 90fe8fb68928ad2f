"""What `trimtab bench overhead` holds a server against: the same streams from an AsyncEngine in this process.

    python -m trimtab.tools.bench.engine_baseline MODEL STREAMS TOKENS

It answers each line of standard input with an empty one, once all streams have ended, and begins with one.
"""

from __future__ import annotations

import asyncio
import sys

from ...engine.async_engine import AsyncEngine
from ...engine.methods.builtin import Mato
from ...engine.methods.objective import Objective
from ...engine.request import Request
from ...engine.sampling_params import SamplingParams
from .http.load_swarm import QUESTION, WISHES


async def main(model: str, streams: int, tokens: int) -> None:
    """Until standard input ends."""
    wishes = tuple(Objective(*wish) for wish in WISHES.items())
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)

    async def one(engine: AsyncEngine, index: int) -> None:
        async for _ in engine.stream(Request(QUESTION.format(index), Mato(wishes), params)):
            pass

    async with AsyncEngine.from_pretrained(model, dtype="bfloat16") as engine:
        print(flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            await asyncio.gather(*(one(engine, index) for index in range(streams)))
            print(flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:])))
