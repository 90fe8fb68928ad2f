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
from .http.load_swarm import OBJECTIVES, QUESTION_TEMPLATE


async def main(model: str, num_streams: int, num_tokens: int) -> None:
    """Until standard input ends."""
    objectives = tuple(Objective(*objective) for objective in OBJECTIVES.items())
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)

    async def run_stream(engine: AsyncEngine, index: int) -> None:
        async for _ in engine.stream(Request(QUESTION_TEMPLATE.format(index), Mato(objectives), params)):
            pass

    async with AsyncEngine.from_pretrained(model, dtype="bfloat16") as engine:
        print(flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            await asyncio.gather(*(run_stream(engine, index) for index in range(num_streams)))
            print(flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:])))
