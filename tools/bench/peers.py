"""`trimtab bench peers`: the same prompts and the same weights on other engines, in turn.

Each engine works in a process of its own, in the environment that --peer names, and all are stopped but the
one whose turn it is. Every round runs all contestants once, so that a drift of the machine touches all of
them; a ratio is taken within each round, and its median, lowest and highest are printed. Greedy, every answer
of the same length; a peer that is not installed is skipped by name.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine.config import DTYPES
from ...engine.utils.fields import check_fields, option, require_fields
from ...engine.utils.json import dumps
from ...kernels.common.errors import InputError
from ..cli import flags, method_args
from ..cli.terminal import say
from ..common import environment, statistics
from .runners.competitors import CONTESTANTS, RATIOS, Contestant, Prompts, Score, compared
from .runners.process import MissingError, Worker

if TYPE_CHECKING:
    import argparse

    from ..cli.parser import Parser

QUESTION = (
    "What happens if an earthworm is cut in {} parts? Answer at length and kindly, with examples, "
    "so that a child can follow it."
)
WISHES = (("Your answer should be uplifting.", 0.7), ("Your answer should be one short sentence.", 0.3))
PEERS = {"trimtab": "trimtab", "transformers": "transformers", "vllm": "vllm", "llama.cpp": "llama_cpp"}
"""By the names that --peer takes, the workers."""


@dataclass(frozen=True)
class Match:
    """What all contestants are given."""

    model: str = option("demo", "'demo', a folder, or a .gguf file, which llama.cpp then reads itself")
    gguf: str | None = option(None, "a GGUF file of the same model for llama.cpp")
    dtype: str = option("bfloat16", "type of the weights", DTYPES[1:])
    output_len: int = option(64, "tokens of every answer, at least 2")
    num_prompts: int = option(2, "prompts that each contestant decodes in a round, up to 90")
    batch_size: int = option(1, "how many of them at once; contestants that take one sit out larger ones")
    rounds: int = option(5, "rounds that count, after one that warms up")

    def __post_init__(self) -> None:
        check_fields(self)
        require_fields(
            self,
            ("output_len", self.output_len >= 2, "at least 2: a first token, and one that is decoded"),
            ("num_prompts", 1 <= self.num_prompts <= 90, "a whole number from 1 to 90"),
            (
                "batch_size",
                1 <= self.batch_size <= self.num_prompts,
                f"from 1 to num_prompts ({self.num_prompts})",
            ),
            ("rounds", self.rounds >= 1, "a whole number ≥ 1"),
            ("gguf", self.gguf is None or Path(self.gguf).is_file(), "a file that is there"),
        )


def add_arguments(parser: Parser) -> None:
    group = flags.add_fields(parser, "match", Match)
    method_args.add_prefer(group)
    group.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help=f"the Python that has a peer, of {', '.join(PEERS)}; without it this one "
        "(may be given several times)",
    )
    group.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="NAME",
        help="leave out contestants whose name begins so, such as amulet (may be given several times)",
    )


def run(args: argparse.Namespace) -> int:
    """Measures and prints. Raises RunError when a contestant that is installed fails."""
    match = Match(**flags.given(Match, args))
    wishes = [(wish.text, wish.weight) for wish in method_args.wishes(args)] or list(WISHES)
    pythons = dict(_peer(text) for text in args.peer)
    field = _chosen(args.skip, match.batch_size)
    with ExitStack() as stack:
        about, workers, prompts = _opened(stack, match, wishes, pythons, {each.peer for each in field})
        scores = _played(match, workers, prompts, [each for each in field if each.peer in workers])
    ratios = {
        f"{ratio.ours} / {ratio.theirs}": compared(ratio, scores)
        for ratio in RATIOS
        if ratio.ours in scores and ratio.theirs in scores
    }
    tokens = match.num_prompts * match.output_len
    print("\n".join(_lines(about, scores, ratios, tokens)))
    said = {"bench": "peers", "config": {**asdict(match), "wishes": wishes}, **environment.where()}
    raw = {
        name: {"whole": score.whole, "decoding": score.decoding, "rates": score.rates(tokens)}
        for name, score in scores.items()
    }
    lengths = [[len(ids) for ids in prompt] for prompt in prompts]
    print(dumps({**said, "peers": about, "prompt_tokens": lengths, "ratios": ratios, "raw": raw}))
    return 0


def _played(
    match: Match, workers: dict[str, Worker], prompts: Prompts, field: list[Contestant]
) -> dict[str, Score]:
    """What each contestant has done in all rounds, by its name."""
    scores = {each.name: Score(each) for each in field}
    for index in range(match.rounds + 1):
        say(f"round {index} of {match.rounds}" if index else "warming up")
        for score in scores.values():
            worker = workers[score.contestant.peer]
            score.play(worker, prompts, match.output_len, match.batch_size, counts=index > 0)
    return scores


def _peer(text: str) -> tuple[str, str]:
    name, equals, python = text.partition("=")
    if not equals or not python or name not in PEERS:
        raise InputError(f"--peer is {text!r}; it must be like vllm=/path/to/python, of {', '.join(PEERS)}")
    return PEERS[name], python


def _chosen(skipped: list[str], batch: int) -> list[Contestant]:
    """Raises InputError for a name that nobody has."""
    for name in skipped:
        if not any(each.name.startswith(name) for each in CONTESTANTS):
            known = ", ".join(each.name for each in CONTESTANTS)
            raise InputError(f"--skip is {name!r}; contestants are {known}")
    found = [each for each in CONTESTANTS if not any(each.name.startswith(name) for name in skipped)]
    return [each for each in found if batch == 1 or not each.single]


def _opened(
    stack: ExitStack,
    match: Match,
    wishes: list[tuple[str, float]],
    pythons: dict[str, str],
    wanted: set[str],
) -> tuple[dict[str, dict[str, Any]], dict[str, Worker], Prompts]:
    """What is said of each peer, the workers of those that there are, and the prompts' branches.

    trimtab comes first in any case: it renders the prompts, and says where the model's folder is.
    """
    rows = match.batch_size * (1 + len(wishes))
    options: dict[str, Any] = {"model": match.model, "dtype": match.dtype, "wishes": wishes, "rows": rows}
    ours = stack.enter_context(Worker("trimtab", pythons.get("trimtab", sys.executable)))
    about: dict[str, dict[str, Any]] = {"trimtab": ours.ask("open", **options)["about"]}
    questions = [QUESTION.format(10 + index) for index in range(match.num_prompts)]
    prompts: Prompts = ours.ask("render", prompts=questions)["prompts"]
    longest = max(len(ids) for prompt in prompts for ids in prompt)
    gguf = match.gguf or (match.model if match.model.lower().endswith(".gguf") else None)
    options |= {**about["trimtab"], "length": longest + match.output_len, "gguf": gguf}
    workers = {"trimtab": ours}
    for peer in dict.fromkeys(each.peer for each in CONTESTANTS if each.peer in wanted - {"trimtab"}):
        if peer == "llama_cpp" and gguf is None:
            about[peer] = {"skipped": "it needs the model as a file; name one with --gguf"}
            continue
        worker = stack.enter_context(Worker(peer, pythons.get(peer, sys.executable)))
        try:
            about[peer] = worker.ask("open", **options)["about"]
            workers[peer] = worker
        except MissingError as error:
            about[peer] = {"skipped": f"{error}; name one that has it with --peer"}
    return about, workers, prompts


def _lines(
    about: dict[str, dict[str, Any]], scores: dict[str, Score], ratios: dict[str, dict[str, Any]], tokens: int
) -> list[str]:
    """The figures for people."""
    lines = []
    for peer, facts in about.items():
        threads = f"{facts['threads']} threads" if "threads" in facts else ""
        known = [facts.get("version", ""), threads, facts.get("weights", "")]
        what = f"skipped: {facts['skipped']}" if "skipped" in facts else ", ".join(filter(None, known))
        lines.append(statistics.line(peer, what))
    for name, score in scores.items():
        lines.append(statistics.line(f"{name}, tok/s", statistics.spread(score.rates(tokens))))
    for name, ratio in ratios.items():
        same = f", {ratio['equal']:.0%} of tokens equal" if "equal" in ratio else ""
        lines.append(statistics.line(name, statistics.spread(ratio["values"]) + same))
    return lines
