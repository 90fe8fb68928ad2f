"""`trimtab bench compare BASE`: is what lies here slower than another commit?

First the tests: a speed that is had by being wrong is worth nothing, so red tests end it. Then BASE is
checked out beside this tree, and both decode the same prompts in processes of their own, in turn: plain and
steered with three branches alone, and some steered requests at once. A measure is slower when the median of
the ratios within a round and the milliseconds a token are both beyond their thresholds; then the exit status
is 1.
"""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...engine.config import DTYPES
from ...engine.utils.fields import check_fields, option, require_fields
from ...engine.utils.json import dumps
from ...kernels.common.errors import InputError, RunError
from ..cli import flags
from ..cli.terminal import say
from ..common import environment, statistics
from .peers import QUESTION, WISHES
from .runners.process import Worker
from .worktree import resolved, side_by_side

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from ..cli.parser import Parser
    from .runners.competitors import Prompts

SLOWER = 1
"""The exit status when it is."""
STDERR = 2


@dataclass(frozen=True)
class Measure:
    """What both commits do: a way to decode, as the worker of trimtab calls it, and how many at once."""

    name: str
    asks: str
    requests: int


@dataclass(frozen=True)
class Terms:
    """How it is measured, and what counts as slower."""

    model: str = option("demo", "'demo', a folder or a .gguf file")
    dtype: str = option("bfloat16", "type of the weights", DTYPES[1:])
    output_len: int = option(32, "tokens of every answer, at least 2")
    batch_size: int = option(8, "requests of the measure that decodes some at once, up to 90")
    rounds: int = option(7, "rounds that count, after one that warms up")
    relative: float = option(0.05, "how much slower is too slow, as a share")
    absolute_ms: float = option(0.5, "and by how many milliseconds a token at least")
    tests: str = option("./tools/test", "the command that must succeed first, run where the code lies")

    def __post_init__(self) -> None:
        check_fields(self)
        require_fields(
            self,
            ("output_len", self.output_len >= 2, "at least 2"),
            ("batch_size", 1 <= self.batch_size <= 90, "a whole number from 1 to 90"),
            ("rounds", self.rounds >= 1, "a whole number ≥ 1"),
            ("relative", self.relative >= 0, "a number ≥ 0"),
            ("absolute_ms", self.absolute_ms >= 0, "a number ≥ 0"),
            ("tests", bool(self.tests.strip()), "a command; it compares no speeds of untested code"),
        )

    @property
    def measures(self) -> tuple[Measure, ...]:
        """A plain request alone, a steered one alone, and steered ones at once."""
        return (
            Measure("base", "base", 1),
            Measure("mato", "mato", 1),
            Measure(f"{self.batch_size} x mato", "mato", self.batch_size),
        )


@dataclass(frozen=True)
class Verdict:
    """Milliseconds a token of each, the ratios this / base by round, and whether that is too slow."""

    this: list[float]
    base: list[float]
    relative: float
    absolute_ms: float

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.this, self.base, strict=True)]

    @property
    def slower(self) -> bool:
        """Beyond both thresholds."""
        more = statistics.median(self.this) - statistics.median(self.base)
        return statistics.median(self.ratios) > 1 + self.relative and more > self.absolute_ms


def add_arguments(parser: Parser) -> None:
    parser.add_argument("base", metavar="BASE", help="the other commit, such as HEAD~1 or main")
    flags.add_fields(parser, "terms", Terms)


def run(args: argparse.Namespace) -> int:
    """0 when nothing is slower, 1 when something is. Raises RunError when the tests are red."""
    terms, root = Terms(**flags.given(Terms, args)), environment.ROOT
    commit = resolved(root, args.base)
    this = str(environment.commit(root))
    if this.endswith("-dirty"):
        say("the tree differs from its commit; it is measured as it is")
    _require_green(terms.tests, root)
    with side_by_side(root, commit) as (ours, theirs):
        verdicts = _measured(terms, root, ours, theirs)
    for name, verdict in verdicts.items():
        beside = f"{statistics.number(statistics.median(verdict.base))} at {commit[:9]}"
        print(statistics.line(f"{name}, ms a token", f"{statistics.spread(verdict.this)}, {beside}"))
        word = ": slower" if verdict.slower else ""
        print(statistics.line("  this / base", f"{statistics.spread(verdict.ratios)}{word}"))
    slower = [name for name, verdict in verdicts.items() if verdict.slower]
    raw = {name: {"this": v.this, "base": v.base, "ratios": v.ratios} for name, v in verdicts.items()}
    said = {"bench": "compare", "config": asdict(terms), **environment.where(), "base": commit}
    print(dumps({**said, "slower": slower, "raw": raw}))
    return SLOWER if slower else 0


def _require_green(command: str, root: Path) -> None:
    """Runs the tests; what they say goes to stderr, for stdout ends with JSON."""
    say(f"running the tests: {command}")
    try:
        words = shlex.split(command)
        done = subprocess.run(words, cwd=root, stdout=STDERR, check=False)
    except (OSError, ValueError) as error:
        raise InputError(f"tests is {command!r}, which cannot be run: {error}") from None
    if done.returncode:
        raise RunError(f"the tests are red ({command!r} gave {done.returncode}); no speed is compared")


def _measured(terms: Terms, root: Path, ours: Path, theirs: Path) -> dict[str, Verdict]:
    options: dict[str, Any] = {"model": terms.model, "dtype": terms.dtype, "wishes": WISHES}
    rows = terms.batch_size * (1 + len(WISHES))
    questions = [QUESTION.format(10 + index) for index in range(terms.batch_size)]
    found = {m.name: Verdict([], [], terms.relative, terms.absolute_ms) for m in terms.measures}
    with Worker("trimtab", path=ours) as this, Worker("trimtab", path=theirs) as base:
        for worker, where in ((this, root), (base, theirs / "trimtab")):
            package = worker.ask("open", **options, rows=rows)["about"]["package"]
            if package != str(where.resolve()):
                raise RunError(f"Python imported {package}, not {where.resolve()}")
        prompts: Prompts = this.ask("render", prompts=questions)["prompts"]
        for index in range(terms.rounds + 1):
            say(f"round {index} of {terms.rounds}" if index else "warming up")
            for measure in terms.measures:
                verdict = found[measure.name]
                turns = [(this, verdict.this), (base, verdict.base)]
                for worker, values in turns if index % 2 else reversed(turns):
                    milliseconds = _once(worker, measure, prompts, terms.output_len)
                    if index:
                        values.append(milliseconds)
    return found


def _once(worker: Worker, measure: Measure, prompts: Prompts, tokens: int) -> float:
    """Milliseconds a token of each request, prompts included."""
    asked = prompts[: measure.requests]
    answer = worker.ask("run", contestant=measure.asks, prompts=asked, tokens=tokens)
    return 1e3 * float(answer["seconds"]) / tokens
