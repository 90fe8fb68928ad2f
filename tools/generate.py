"""`trimtab generate`: decode one prompt toward weighted wishes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..engine.request import Request
from ..engine.strict_json import dumps
from . import answer, asking, loading, plain, report, steering

if TYPE_CHECKING:
    import argparse

    from ..engine.engine import Engine
    from ..engine.output import Output
    from .flags import Parser


def add_arguments(parser: Parser) -> None:
    """PROMPT and the flags of wishes, method, sampling, model and output."""
    parser.epilog = (
        "A prompt that starts with a dash stands after --, last; a value of a flag may start with one."
    )
    asking.add_prompt(parser)
    steering.add_flags(parser)
    asking.add_sampling(parser)
    asking.add_model(parser)
    asking.add_output(parser, json="print one line of JSON with everything about the answer")


def run(args: argparse.Namespace) -> int:
    """Everything typed is checked before the model is loaded."""
    wishes = steering.wishes(args)
    request = Request(
        asking.messages(asking.prompt_text(args.prompt), args.system),
        steering=steering.choice(args, wishes).build(wishes),
        sampling=asking.sampling(args),
        trace=args.trace,
    )
    engine = loading.open_engine(asking.config(args))
    if args.json:
        output = engine.generate(request)
        print(dumps(report.describe(output, request.steering.name)))
    elif request.sampling.n > 1:
        output = engine.generate(request)
        _print_all(output, request)
    else:
        output = _stream(engine, request)
    return _status(output)


def _stream(engine: Engine, request: Request) -> Output:
    output: Output | None = None
    with answer.view(request) as view:
        for delta in answer.pieces(engine, request):
            view.add(delta)
            output = delta.output or output
        assert output is not None, "a stream ends with its output"
        view.finish(report.caption(output, request.sampling.temperature > 0))
    return output


def _print_all(output: Output, request: Request) -> None:
    """n answers, a blank line between them; they would interleave if they were streamed."""
    for index, each in enumerate(report.answers(output)):
        if index:
            print()
        print(plain.safe(each.text).removesuffix("\n"))
        if plain.watched():
            print(f"({report.caption(each, request.sampling.temperature > 0)})")


def _status(output: Output) -> int:
    failures = [error for each in report.answers(output) if (error := answer.error_of(each))]
    for error in dict.fromkeys(failures):
        plain.say(error)
    return 1 if failures else 0
