"""`trimtab bench overhead`: what serving adds to the engine, and what it does under too many clients.

Cost: 16 streams of a MATO request with two wishes, from an AsyncEngine in a process of its own and from a
server, in turn; CPU seconds of the whole process, and of the thread that is not the engine's. Storm: 200
clients at once, a third of which leave at a random token, three times. Overload: 200 clients against a server
with room for 16 requests and a queue of 16, beside as many clients as just fit. Client and server share the
machine. `trimtab bench serve` asks any server and sees it from outside: this one starts the servers and
weighs their processes, by Linux's /proc.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine.utils.fields import check_fields, option, require_fields
from ...engine.utils.json import dumps
from ...kernels.common.errors import RunError
from ..cli import flags
from ..common import environment
from ..common.statistics import line, spread
from .http.load_swarm import WISHES, wave

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from ..cli.parser import Parser

STREAMS, CLIENTS, STORMS = 16, 200, 3
ANSWER = 16
"""Tokens of an answer, where its cost is not weighed."""
PROC = Path("/proc")


@dataclass(frozen=True)
class Trial:
    """Which model is served, and how its cost is measured."""

    model: str = option("demo", "'demo', a folder, or a .gguf file")
    tokens: int = option(64, "tokens of every answer whose cost is measured")
    rounds: int = option(5, "rounds that count, after one that warms up")

    def __post_init__(self) -> None:
        check_fields(self)
        require_fields(
            self,
            ("tokens", self.tokens >= 1, "a whole number ≥ 1"),
            ("rounds", self.rounds >= 1, "a whole number ≥ 1"),
        )


def add_arguments(parser: Parser) -> None:
    flags.add_fields(parser, "overhead", Trial)


def run(args: argparse.Namespace) -> int:
    """Measures and prints. Raises InputError without such a model, RunError without /proc."""
    from ...models.loader.resolve import resolve  # noqa: PLC0415 - it brings torch, which --help does not need

    trial = Trial(**flags.given(Trial, args))
    if not PROC.joinpath("self/stat").exists():
        raise RunError("there is no /proc, by which the server's process is weighed; this bench needs Linux")
    resolve(trial.model)
    cost, storm, overload = _cost(trial), _storm(trial), _overload(trial)
    found = {"cost": cost, "storm": storm, "overload": overload}
    said = {"bench": "overhead", "config": {**asdict(trial), "wishes": WISHES}, **environment.where()}
    print(dumps({**said, **found}))
    return 0


def _cost(trial: Trial) -> dict[str, list[float]]:
    """CPU seconds of a round: the engine's and the server's, and as shares of the engine's what the server
    adds, in all and in the thread that is not its engine's."""
    found: dict[str, list[float]] = {name: [] for name in ("engine", "server", "added", "loop")}
    with _alone(trial) as (engine_pid, in_engine), _serving(trial) as (pid, port):
        for index in range(trial.rounds + 1):
            engine, beside = _used(engine_pid, in_engine)
            server, loop = _used(pid, lambda: asyncio.run(wave(port, STREAMS, trial.tokens)))
            if index:  # the first round warms up
                values = engine, server, server / engine - 1, (loop - beside) / engine
                for name, value in zip(found, values, strict=True):
                    found[name].append(value)
    print(line(f"{STREAMS} streams, CPU seconds of the engine", spread(found["engine"])))
    print(line("  of the server", spread(found["server"])))
    print(line("  added by the server", spread(found["added"])))
    print(line("  in its own thread", spread(found["loop"])))
    return found


def _storm(trial: Trial) -> dict[str, Any]:
    with _serving(trial) as (pid, port):
        memory, ends = [], Counter[str]()
        for seed in range(STORMS):
            ends += Counter(end for end, _ in asyncio.run(wave(port, CLIENTS, ANSWER, seed)))
            while _metric(port, "num_requests_running"):
                time.sleep(0.05)
            memory.append(_resident(pid))
        held = _metric(port, "kv_cache_usage_perc")
    print(line(f"{STORMS} x {CLIENTS} clients", _told(ends)))
    print(line("  share of pages held; MiB after each", f"{held}; {', '.join(map(str, memory))}"))
    return {"ends": ends, "pages_held": held, "memory": memory}


def _overload(trial: Trial) -> dict[str, Any]:
    with _serving(trial, "--max-waiting", str(STREAMS)) as (_, port):
        asyncio.run(wave(port, STREAMS, ANSWER))
        running = _slowest(asyncio.run(wave(port, STREAMS, ANSWER)))
        full = _slowest(asyncio.run(wave(port, 2 * STREAMS, ANSWER)))
        ends = asyncio.run(wave(port, CLIENTS, ANSWER))
    statuses = Counter(end for end, _ in ends)
    found = {"running": running, "full": full, "overloaded": _slowest(ends), "ends": statuses}
    print(line(f"{CLIENTS} clients, room for {STREAMS} and a queue of {STREAMS}", _told(statuses)))
    slowest = f"{found['overloaded']:.2f}; just full {full:.2f}, without a queue {running:.2f}"
    print(line("  slowest answer, s", slowest))
    return found


def _told(ends: Counter[str]) -> str:
    return ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))


def _slowest(ends: list[tuple[str, float]]) -> float:
    """Seconds. Raises RunError where no answer was whole."""
    seconds = [seconds for end, seconds in ends if end == "done"]
    if not seconds:
        raise RunError(f"none of {len(ends)} clients was answered whole; the first's end was {ends[0][0]!r}")
    return max(seconds)


@contextmanager
def _alone(trial: Trial) -> Iterator[tuple[int, Callable[[], None]]]:
    """The engine's process, and what has it stream once."""
    command = [sys.executable, "-m", "trimtab.tools.bench.engine_baseline"]
    asked = [*command, trial.model, str(STREAMS), str(trial.tokens)]
    with subprocess.Popen(asked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alone:
        assert alone.stdin is not None
        assert alone.stdout is not None
        turn, ended = alone.stdin, alone.stdout

        def streamed() -> None:
            print(file=turn, flush=True)
            _answer(ended.readline(), "the engine")

        try:
            _answer(ended.readline(), "the engine")
            yield alone.pid, streamed
        finally:
            alone.kill()


@contextmanager
def _serving(trial: Trial, *more: str) -> Iterator[tuple[int, int]]:
    """A server of its own: its process and its port."""
    command = [sys.executable, "-m", "trimtab", "serve", "--port", "0", "--dtype", "bfloat16"]
    asked = [*command, "--model", trial.model, *more]
    with subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            said = _answer(server.stderr.readline(), "the server")
            port = said.partition(";")[0].rpartition(":")[2]
            if not port.isdecimal():
                raise RunError(f"the server did not start: {said.strip()}")
            yield server.pid, int(port)
        finally:
            server.kill()


def _answer(said: str, who: str) -> str:
    if not said:
        raise RunError(f"{who}'s process ended before its work")
    return said


def _used(pid: int, call: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds that a process, and its first thread, spend while `call` runs."""
    before = _cpu(f"{pid}"), _cpu(f"{pid}/task/{pid}")
    call()
    return _cpu(f"{pid}") - before[0], _cpu(f"{pid}/task/{pid}") - before[1]


def _cpu(where: str) -> float:
    values = PROC.joinpath(where, "stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> int:
    """MiB of memory of its own."""
    status = PROC.joinpath(str(pid), "status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) >> 10


def _metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text: str = response.read().decode()
    return float(text.partition(f"\ntrimtab:{name} ")[2].split()[0])
