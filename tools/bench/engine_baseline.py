"""Baseline process for `trimtab bench overhead`: the server's streams, from an AsyncEngine without a server.

    python -m trimtab.tools.bench.engine_baseline MODEL STREAMS TOKENS

It prints an empty line when the engine is ready. For each line on standard input it runs all streams, then
prints an empty line.
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
    """Run the streams once per input line, until standard input ends."""
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
