"""Fixtures for command tests: a fake engine with scripted answers, the command line, fast machine peaks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
from trimtab.engine.outputs import BranchPrompt, Delta, Output, Timings, TokenLogprobs, Trace
from trimtab.tools.cli import open_engine
from trimtab.tools.cli.main import main
from trimtab.tools.common import machine_peaks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from trimtab.engine.config import EngineConfig
    from trimtab.engine.request import Request


@dataclass
class FakeEngine:
    """Answers every request with `deltas`, one token each, and records it. `error`: the output's error."""

    deltas: list[str] = field(default_factory=lambda: ["Rain", " is", " water."])
    error: str | None = None
    before_delta: Callable[[int], None] = lambda index: None
    requests: list[Request] = field(default_factory=list)
    configs: list[EngineConfig] = field(default_factory=list)
    num_closed: int = 0

    def generate(self, request: Request) -> Output:
        self.requests.append(request)
        outputs = [self._output(request, index) for index in range(request.sampling.n)]
        return replace(outputs[0], outputs=outputs)

    def stream(self, request: Request) -> Iterator[Delta]:
        self.requests.append(request)
        trace = self._trace(request, 1) if request.trace else None
        try:
            for index, delta in enumerate(self.deltas):
                self.before_delta(index)
                yield Delta(0, delta, [index], trace)
            output = self._output(request, 0)
            yield Delta(0, "", [], output=replace(output, outputs=[output]))
        finally:
            self.num_closed += 1

    def _output(self, request: Request, index: int) -> Output:
        ids = list(range(len(self.deltas)))
        branch_names = ["base", *(o.text for o in request.steering.objectives)]
        seed = request.sampling.seed
        return Output(
            text="".join(self.deltas),
            token_ids=ids,
            finish_reason="error" if self.error else "stop",
            branches=[BranchPrompt(name, f"<{name}>", [1, 2]) for name in branch_names],
            trace=self._trace(request, len(ids)) if request.trace else None,
            logprobs=None if request.sampling.logprobs is None else [TokenLogprobs(0, -0.5, {0: -0.5})],
            timings=Timings(0.0, 0.1, 0.2, 15.0),
            seed=1000 + index if seed is None else seed + index,
            error=self.error,
            fulfilment=[0.5] * (len(branch_names) - 1),
        )

    def _trace(self, request: Request, num_tokens: int) -> Trace:
        weights = list(request.steering.weights()) if request.steering.objectives else []
        rows = [weights] * num_tokens
        logprobs = [[-1.0] * (len(weights) + 1)] * num_tokens
        strength, kl = [float("nan")] + [1.5] * (num_tokens - 1), [0.0] * num_tokens
        return Trace(rows, rows, strength, kl, logprobs, [[0.5] * len(weights)] * num_tokens)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """The fake engine that every command opens in this test."""
    fake = FakeEngine()

    def fake_open(config: EngineConfig) -> Any:
        fake.configs.append(config)
        return fake

    monkeypatch.setattr(open_engine, "open_engine", fake_open)
    return fake


@dataclass(frozen=True)
class CommandResult:
    """Exit status and output of a command."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., CommandResult]:
    """Run the command line in this process."""

    def run_command(*argv: str) -> CommandResult:
        status = main(argv)
        captured = capsys.readouterr()
        return CommandResult(status, captured.out, captured.err)

    return run_command


@pytest.fixture
def fast_machine_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the machine's peaks on 1 MiB and few rows: fast and inaccurate."""
    monkeypatch.setitem(machine_peaks.BENCH_SIZES, "cpu", machine_peaks.BenchSizes(1 << 20, 64, 5))


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The answers in a file, sorted by line, without timings."""

    def drop_timings(record: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in record.items() if key != "timings"}

    lines = [json.loads(line, object_hook=drop_timings) for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: line["line"])
