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

DEFAULT_METHODS = "base,prompt,amulet,mato,trim"
MIN_TABLE_WIDTH = 100
"""On a narrower terminal the answers are printed one below the other."""


class AnswersView(Protocol):
    """Displays the answers, one after another."""

    def begin(self, label: str) -> None:
        """Start the answer of a method."""

    def add(self, text: str) -> None:
        """Append text to the answer."""

    def end(self, caption: str) -> None:
        """End the answer with a caption."""


class PlainAnswersView:
    """Prints the answers one below the other as plain text."""

    def begin(self, label: str) -> None:
        print(f"--- {label} ---", flush=True)

    def add(self, text: str) -> None:
        sys.stdout.write(terminal.escape(text))
        sys.stdout.flush()

    def end(self, caption: str) -> None:
        print(f"\n({terminal.escape(caption)})\n", flush=True)


def add_arguments(parser: Parser) -> None:
    """Add PROMPT, --prefer, --methods, and the flags of sampling, model and output."""
    parser.epilog = (
        "Methods run one after another, so that their tokens per second are comparable. "
        "If tokens are sampled, all methods use the same seed."
    )
    common_args.add_prompt(parser)
    group = parser.add_argument_group("method")
    method_args.add_prefer(group)
    group.add_argument(
        "--methods",
        default=DEFAULT_METHODS,
        metavar="LIST",
        help="columns as NAME[:field=value...], separated by commas (default: %(default)s)",
    )
    common_args.add_sampling(parser, skip=("n",))
    common_args.add_model(parser)
    common_args.add_output(parser, json="print one line of JSON with the answers and their traces")


def run(args: argparse.Namespace) -> int:
    """Validate all arguments before the model is loaded, then run the methods in turn."""
    objectives = method_args.parse_objectives(args)
    if not objectives:
        raise InputError('compare needs at least one --prefer "TEXT=WEIGHT"')
    specs = method_args.parse_methods(args.methods)
    prompt, sampling = common_args.read_prompt(args.prompt), common_args.sampling_params(args)
    messages = common_args.build_messages(prompt, args.system)
    requests = {
        spec.label: Request(messages, spec.build_compatible(objectives), sampling, trace=args.trace)
        for spec in specs
    }
    engine = open_engine.open_engine(common_args.engine_config(args))
    if args.json:
        outputs = _run_each(requests, lambda label, request: engine.generate(request))
        print(dumps(comparison_to_dict(prompt, objectives, requests, outputs)))
    else:
        with _open_view(list(requests)) as view:
            outputs = _run_each(requests, lambda label, request: _stream(engine, label, request, view))
    return _exit_status(outputs)


def comparison_to_dict(
    prompt: str,
    objectives: Sequence[Objective],
    requests: Mapping[str, Request],
    outputs: Mapping[str, Output],
) -> dict[str, Any]:
    """The comparison as a dictionary; each column has the format of `generate --json`."""
    columns = [
        {"label": label, **formatting.output_to_dict(output, requests[label].steering.name)}
        for label, output in outputs.items()
    ]
    return {
        "prompt": prompt,
        "objectives": [asdict(objective) for objective in objectives],
        "columns": columns,
    }


def _run_each(
    requests: Mapping[str, Request], generate: Callable[[str, Request], Output]
) -> dict[str, Output]:
    """Run the requests in turn; all use the seed of the first output."""
    outputs: dict[str, Output] = {}
    seed: int | None = None
    for label, request in requests.items():
        seeded_request = (
            request if seed is None else replace(request, sampling=replace(request.sampling, seed=seed))
        )
        outputs[label] = generate(label, seeded_request)
        seed = outputs[label].seed
    return outputs


def _stream(engine: Engine, label: str, request: Request, view: AnswersView) -> Output:
    view.begin(label)
    output: Output | None = None
    for delta in live_answer.iter_deltas(engine, request):
        view.add(delta.text)
        output = delta.output or output
    assert output is not None, "a stream ends with its output"
    view.end(live_answer.error_message(output) or format_caption(output, request))
    return output


def format_caption(output: Output, request: Request) -> str:
    """Strength, tokens, speed and finish reason of an answer."""
    strength = formatting.format_strength(output) if request.steering.objective_arity != "none" else ""
    stats = formatting.format_caption(output, request.sampling.temperature > 0)
    return f"{strength} · {stats}" if strength else stats


@contextmanager
def _open_view(labels: list[str]) -> Iterator[AnswersView]:
    if not terminal.is_tty() or shutil.get_terminal_size().columns < MIN_TABLE_WIDTH:
        yield PlainAnswersView()
        return
    from ..cli import display  # noqa: PLC0415 - rich is needed on a terminal only

    with display.open_columns(display.make_console(), labels) as columns:
        yield columns


def _exit_status(outputs: Mapping[str, Output]) -> int:
    failures = {
        label: error for label, output in outputs.items() if (error := live_answer.error_message(output))
    }
    for label, error in failures.items():
        terminal.log_line(f"{label}: {error}")
    return 1 if failures else 0
