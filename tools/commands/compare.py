"""`trimtab compare`: one prompt, several methods side by side."""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Protocol

from ...engine.request import Request
from ...engine.utils.json import dumps
from ...kernels.common.errors import InputError
from ..cli import common_args, formatting, live_answer, method_args, open_engine, terminal

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ...engine.engine import Engine
    from ...engine.methods.objective import Objective
    from ...engine.outputs import Output
    from ..cli.parser import Parser

METHODS = "base,prompt,amulet,mato,mato:preset=balanced"
TABLE_WIDTH = 100
"""A terminal narrower than this gets the answers one below the other."""


class View(Protocol):
    """Where the answers appear, one after another."""

    def begin(self, label: str) -> None:
        """The answers that follow are this method's."""

    def add(self, text: str) -> None:
        """Shows a piece."""

    def end(self, caption: str) -> None:
        """The method's answer is complete."""


class Sections:
    """Answers one below the other, as plain text."""

    def begin(self, label: str) -> None:
        print(f"--- {label} ---", flush=True)

    def add(self, text: str) -> None:
        sys.stdout.write(terminal.safe(text))
        sys.stdout.flush()

    def end(self, caption: str) -> None:
        print(f"\n({terminal.safe(caption)})\n", flush=True)


def add_arguments(parser: Parser) -> None:
    """PROMPT, the wishes, --methods, and the flags of sampling, model and output."""
    parser.epilog = (
        "Methods run one after another, so that each one's tokens per second are its own. "
        "Where tokens are drawn, all methods draw with the same seed."
    )
    common_args.add_prompt(parser)
    group = parser.add_argument_group("method")
    method_args.add_prefer(group)
    group.add_argument(
        "--methods",
        default=METHODS,
        metavar="LIST",
        help="columns as NAME[:field=value...], separated by commas (default: %(default)s)",
    )
    common_args.add_sampling(parser, skip=("n",))
    common_args.add_model(parser)
    common_args.add_output(parser, json="print one line of JSON with everything about the answers")


def run(args: argparse.Namespace) -> int:
    """Everything typed is checked before the model is loaded."""
    wishes = method_args.wishes(args)
    if not wishes:
        raise InputError('compare needs at least one --prefer "TEXT=WEIGHT"')
    choices = method_args.columns(args.methods)
    prompt, sampling = common_args.prompt_text(args.prompt), common_args.sampling(args)
    asked = common_args.messages(prompt, args.system)
    requests = {c.label: Request(asked, c.toward(wishes), sampling, trace=args.trace) for c in choices}
    engine = open_engine.open_engine(common_args.config(args))
    if args.json:
        outputs = _each(requests, lambda label, request: engine.generate(request))
        print(dumps(describe(prompt, wishes, requests, outputs)))
    else:
        with _view(list(requests)) as view:
            outputs = _each(requests, lambda label, request: _stream(engine, label, request, view))
    return _status(outputs)


def describe(
    prompt: str, wishes: Sequence[Objective], requests: Mapping[str, Request], outputs: Mapping[str, Output]
) -> dict[str, Any]:
    """The comparison, with each column as generate tells an answer."""
    columns = [
        {"label": label, **formatting.describe(output, requests[label].steering.name)}
        for label, output in outputs.items()
    ]
    return {"prompt": prompt, "objectives": [asdict(wish) for wish in wishes], "columns": columns}


def _each(requests: Mapping[str, Request], answered: Callable[[str, Request], Output]) -> dict[str, Output]:
    """Answers the requests in turn; the seed that the first one drew is every one's."""
    outputs: dict[str, Output] = {}
    seed: int | None = None
    for label, request in requests.items():
        seeded = request if seed is None else replace(request, sampling=replace(request.sampling, seed=seed))
        outputs[label] = answered(label, seeded)
        seed = outputs[label].seed
    return outputs


def _stream(engine: Engine, label: str, request: Request, view: View) -> Output:
    view.begin(label)
    output: Output | None = None
    for delta in live_answer.pieces(engine, request):
        view.add(delta.text)
        output = delta.output or output
    assert output is not None, "a stream ends with its output"
    view.end(live_answer.error_of(output) or caption(output, request))
    return output


def caption(output: Output, request: Request) -> str:
    """Strength, tokens, speed and end of an answer."""
    strength = formatting.strength(output) if request.steering.wishes != "none" else ""
    rest = formatting.caption(output, request.sampling.temperature > 0)
    return f"{strength} · {rest}" if strength else rest


@contextmanager
def _view(labels: list[str]) -> Iterator[View]:
    if not terminal.watched() or shutil.get_terminal_size().columns < TABLE_WIDTH:
        yield Sections()
        return
    from ..cli import display  # noqa: PLC0415 - rich is for a terminal

    with display.live_columns(display.screen(), labels) as columns:
        yield columns


def _status(outputs: Mapping[str, Output]) -> int:
    failures = {label: error for label, output in outputs.items() if (error := live_answer.error_of(output))}
    for label, error in failures.items():
        terminal.say(f"{label}: {error}")
    return 1 if failures else 0
