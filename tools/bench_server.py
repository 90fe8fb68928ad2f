"""What serving adds to the engine, and what it does under clients that leave and under too many of them.

    python -m trimtab.tools.bench_server [--model demo] [--tokens 64] [--rounds 5]

Cost: 16 streams of a MATO request with two wishes, from an AsyncEngine in a process of its own and from a
server, in turn; CPU seconds of the whole process, and of the thread that is not the engine's. Storm: 200
clients at once, a third of which leave at a random token, three times. Overload: 200 clients against a server
with room for 16 requests and a queue of 16, beside as many clients as just fit. Client and server share the
machine. It is not `trimtab bench serve`, which asks any server and sees it from outside: this one starts the
servers and weighs their processes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..kernels.errors import RunError
from . import machine
from .bench.client import Client, RefusedError
from .bench.figures import spread
from .bench.stream import CHAT

STREAMS, CLIENTS = 16, 200
QUESTION = "What happens if an earthworm is cut in {} parts?"
WISHES = {"Your answer should be uplifting.": 0.7, "Your answer should be one short sentence.": 0.3}
TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Runs the benchmark and prints it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        asyncio.run(_alone(args.model, args.tokens))
        return
    found = {"cost": _cost(args), "storm": _storm(args), "overload": _overload(args)}
    print(json.dumps({**vars(args), **machine.where(), **found}))


def _cost(args: argparse.Namespace) -> dict[str, list[float]]:
    command = [sys.executable, "-m", __spec__.name, "--alone", *_asked(args), "--tokens", str(args.tokens)]
    found: dict[str, list[float]] = {name: [] for name in ("engine", "server", "added", "loop")}
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alone,
        _serving(args) as (pid, port),
    ):
        assert alone.stdin is not None
        assert alone.stdout is not None

        turn, ended = alone.stdin, alone.stdout

        def in_engine() -> None:
            print(file=turn, flush=True)
            ended.readline()

        ended.readline()
        for index in range(args.rounds + 1):
            engine, beside = _used(alone.pid, in_engine)
            server, loop = _used(pid, lambda: asyncio.run(wave(port, STREAMS, args.tokens)))
            if index:  # the first round warms up
                for name, value in zip(
                    found, (engine, server, server / engine - 1, (loop - beside) / engine), strict=True
                ):
                    found[name].append(value)
        turn.close()
    print(f"{STREAMS} streams, CPU seconds of the engine {spread(found['engine'])},")
    print(f"  of the server {spread(found['server'])}")
    print(f"  added by the server: {spread(found['added'])}; in its own thread {spread(found['loop'])}")
    return found


def _storm(args: argparse.Namespace) -> dict[str, Any]:
    with _serving(args) as (pid, port):
        memory, ends = [], Counter[str]()
        for seed in range(3):
            ends += Counter(end for end, _ in asyncio.run(wave(port, CLIENTS, 16, seed)))
            while _metric(port, "num_requests_running"):
                time.sleep(0.05)
            memory.append(_resident(pid))
        held = _metric(port, "kv_cache_usage_perc")
    print(f"3 x {CLIENTS} clients: {dict(ends)}; pages held {held}; MiB after each: {memory}")
    return {"ends": ends, "pages_held": held, "memory": memory}


def _overload(args: argparse.Namespace) -> dict[str, Any]:
    with _serving(args, "--max-waiting", str(STREAMS)) as (_, port):
        asyncio.run(wave(port, STREAMS, 16))
        running = _latency(asyncio.run(wave(port, STREAMS, 16)))
        full = _latency(asyncio.run(wave(port, 2 * STREAMS, 16)))
        ends = asyncio.run(wave(port, CLIENTS, 16))
    statuses = Counter(end for end, _ in ends)
    found = {"running": running, "full": full, "overloaded": _latency(ends), "ends": statuses}
    print(f"{CLIENTS} clients, room for {STREAMS} and a queue of {STREAMS}: {dict(statuses)}")
    print(
        f"  slowest answer {found['overloaded']:.2f} s; just full {full:.2f}, without a queue {running:.2f}"
    )
    return found


def _latency(ends: list[tuple[str, float]]) -> float:
    return max(seconds for end, seconds in ends if end == "done")


async def wave(port: int, clients: int, tokens: int, leaving: int | None = None) -> list[tuple[str, float]]:
    """How each client's stream ended, and after how long. `leaving` is the seed of who leaves and when."""
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


async def _alone(model: str, tokens: int) -> None:
    """Streams from an AsyncEngine, each time that a line comes on stdin."""
    from trimtab import AsyncEngine, Mato, Objective, Request, SamplingParams  # noqa: PLC0415

    wishes = tuple(Objective(*wish) for wish in WISHES.items())
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)

    async def one(engine: AsyncEngine, index: int) -> None:
        async for _ in engine.stream(Request(QUESTION.format(index), Mato(wishes), params)):
            pass

    async with AsyncEngine.from_pretrained(model, dtype="bfloat16") as engine:
        print(flush=True)
        while await asyncio.to_thread(sys.stdin.readline):
            await asyncio.gather(*(one(engine, index) for index in range(STREAMS)))
            print(flush=True)


@contextmanager
def _serving(args: argparse.Namespace, *more: str) -> Iterator[tuple[int, int]]:
    """A server of its own: its process and its port."""
    command = [sys.executable, "-m", "trimtab", "serve", "--port", "0", "--dtype", "bfloat16"]
    with subprocess.Popen(
        [*command, *_asked(args), *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stderr is not None
            yield server.pid, int(server.stderr.readline().partition(";")[0].rpartition(":")[2])
        finally:
            server.kill()


def _asked(args: argparse.Namespace) -> list[str]:
    return ["--model", args.model]


def _used(pid: int, call: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds that a process, and its first thread, spend while `call` runs."""
    before = _cpu(f"{pid}"), _cpu(f"{pid}/task/{pid}")
    call()
    return _cpu(f"{pid}") - before[0], _cpu(f"{pid}/task/{pid}") - before[1]


def _cpu(where: str) -> float:
    fields = Path(f"/proc/{where}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) >> 10


def _metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text: str = response.read().decode()
    return float(text.partition(f"\ntrimtab:{name} ")[2].split()[0])


if __name__ == "__main__":
    main()
