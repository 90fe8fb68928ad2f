"""`trimtab generate`: decode one prompt toward weighted objectives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...engine.request import Request
from ...engine.utils.json import dumps
from ...kernels.common.errors import InputError
from ..cli import common_args, flags, formatting, live_answer, method_args, open_engine, terminal
from ..common import batch
from ..ray.config import RayConfig

if TYPE_CHECKING:
    import argparse

    from ...engine.engine import Engine
    from ...engine.outputs import Output
    from ..cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add PROMPT and the flags of objectives, method, sampling, model and output."""
    parser.epilog = "Put a prompt that starts with a dash last, after --. Flag values may start with a dash."
    common_args.add_prompt(parser, optional=True)
    group = parser.add_argument_group(
        "many prompts", "Read prompts from a file instead of PROMPT; see the README."
    )
    group.add_argument(
        "--input", metavar="FILE", help="JSON Lines file with one prompt per line; with --ray also a folder"
    )
    group.add_argument(
        "--output", metavar="FILE", help="file to append one answer per line to; with --ray a folder"
    )
    method_args.add_method_flags(parser)
    common_args.add_sampling(parser)
    common_args.add_model(parser)
    flags.add_fields(parser, "ray", RayConfig)
    common_args.add_output(parser, json="print one line of JSON with the answer and its trace")


def run(args: argparse.Namespace) -> int:
    """Validate all arguments before the model is loaded, then answer."""
    ray_config = RayConfig(**flags.fields_from_args(RayConfig, args))
    if args.input is not None or args.output is not None:
        _check_file_args(args)
        return _answer_files(args, ray_config)
    if ray_config.ray:
        raise InputError("--ray requires --input and --output")
    if args.prompt is None:
        raise InputError("expected a prompt, or --input FILE and --output FILE")
    objectives = method_args.parse_objectives(args)
    request = Request(
        common_args.build_messages(common_args.read_prompt(args.prompt), args.system),
        steering=method_args.method_from_args(args, objectives).build(objectives),
        sampling=common_args.sampling_params(args),
        trace=args.trace,
    )
    engine = open_engine.open_engine(common_args.engine_config(args))
    if args.json:
        output = engine.generate(request)
        print(dumps(formatting.output_to_dict(output, request.steering.name)))
    elif request.sampling.n > 1:
        output = engine.generate(request)
        _print_outputs(output, request)
    else:
        output = _stream(engine, request)
    return _exit_status(output)


def _answer_files(args: argparse.Namespace, ray_config: RayConfig) -> int:
    if not ray_config.ray:
        return batch.run(args)
    from ..ray import batch as on_ray  # noqa: PLC0415 - needs the extra `ray`

    return on_ray.run(args, ray_config)


def _check_file_args(args: argparse.Namespace) -> None:
    if args.input is None or args.output is None:
        raise InputError("--input and --output must be given together")
    if args.prompt is not None:
        raise InputError(f"expected a prompt or --input, got both: {args.prompt!r} and {args.input!r}")


def _stream(engine: Engine, request: Request) -> Output:
    output: Output | None = None
    with live_answer.open_view(request) as view:
        for delta in live_answer.iter_deltas(engine, request):
            view.add(delta)
            output = delta.output or output
        assert output is not None, "a stream ends with its output"
        view.finish(formatting.format_caption_and_notes(output, request))
    return output


def _print_outputs(output: Output, request: Request) -> None:
    """Print n answers separated by blank lines; streamed, they would interleave."""
    for index, each in enumerate(formatting.all_outputs(output)):
        if index:
            print()
        print(terminal.escape(each.text).removesuffix("\n"))
        if terminal.is_tty():
            print(f"({formatting.format_caption(each, request.sampling.temperature > 0)})")


def _exit_status(output: Output) -> int:
    failures = [
        error for each in formatting.all_outputs(output) if (error := live_answer.error_message(each))
    ]
    for error in dict.fromkeys(failures):
        terminal.log_line(error)
    return 1 if failures else 0
