"""Batch generation from a JSON-lines file of prompts to a JSON-lines file of answers, which can be resumed.

An input line is a JSON string, the prompt, or an object: `prompt` or `messages`, and optionally `id`,
`prefer` (a list of "TEXT=WEIGHT") and any field of SamplingParams, each overriding the flag of its name. An
output line has the number, id and digest of the input line, a digest of the settings, and what `--json`
prints, or the error of an invalid line. Answers are written as they finish, in any order. Lines that an
earlier run has answered are skipped; answers of other settings are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine.request import Request
from ...engine.sampling_params import SamplingParams, from_json
from ...engine.utils.fields import coerce
from ...engine.utils.json import dumps
from ...kernels.common.errors import InputError, short_repr
from ..cli import common_args, formatting, method_args, open_engine
from ..cli.display import progress
from ..cli.terminal import log_line
from .answer_digest import describe_model, digest
from .jsonl import JSONLFile
from .run_many import generate_many

if TYPE_CHECKING:
    import argparse

    from ...engine.async_engine import AsyncEngine

SAMPLING_FIELDS = {field.name for field in fields(SamplingParams)}
LINE_FIELDS = ("prompt", "messages", "id", "prefer")
ANSWER_PREFIX = b'{"line": '
"""The prefix of each output line."""


@dataclass(frozen=True)
class PromptLine:
    """An input line: its number, from 1, and its text."""

    number: int
    text: str

    @property
    def digest(self) -> str:
        """A digest of the text, to detect a changed input file."""
        return blake2b(self.text.encode(), digest_size=8).hexdigest()


def run(args: argparse.Namespace) -> int:
    """Answer every line that has no answer yet. Return 1 if a line failed."""
    method_args.method_from_args(args, method_args.parse_objectives(args))
    sampling, config = common_args.sampling_params(args), common_args.engine_config(args)
    input_path, output_path = Path(args.input), Path(args.output)
    if output_path.exists() and input_path.exists() and output_path.samefile(input_path):
        raise InputError(f"--output {args.output!r} is the same file as --input; name another --output")
    lines = read_prompt_lines(input_path)
    answered_lines = read_answered(input_path, output_path, lines, settings_digest(args))
    pending = [line for line in lines if line.number not in answered_lines]
    if not pending:
        return report_all_answered(str(input_path), str(output_path), sum(answered_lines.values()))
    num_failed = 0
    engine = open_engine.open_async_engine(config)
    with ExitStack() as stack:
        stack.callback(engine.shutdown)
        show_progress = stack.enter_context(progress("trimtab: answering …"))
        for num_done, record in enumerate(answer_lines(engine, pending, args, sampling), 1):
            num_failed += bool(record.get("error"))
            answers_file(output_path).append([dumps(record)])
            if show_progress:
                show_progress(len(answered_lines) + num_done, len(lines))
    return report_answered(len(pending), num_failed)


def report_all_answered(input_path: str, output_path: str, num_failed: int) -> int:
    """Log that every line is answered, `num_failed` of them with an error. Return the exit status."""
    failures = f"; {num_failed} of them with an error" if num_failed else ""
    log_line(f"every line of {input_path!r} is answered in {output_path!r}{failures}")
    return 1 if num_failed else 0


def report_answered(num_lines: int, num_failed: int) -> int:
    """Log how many of this run's lines were answered. Return the exit status."""
    log_line(
        f"answered {num_lines - num_failed} of {num_lines} lines"
        + (f"; {num_failed} failed" if num_failed else "")
    )
    return 1 if num_failed else 0


def answer_lines(
    engine: AsyncEngine, lines: list[PromptLine], args: argparse.Namespace, sampling: SamplingParams
) -> Iterator[dict[str, Any]]:
    """Yield the output record of each line as it finishes."""
    settings = settings_digest(args)
    headers: dict[PromptLine, dict[str, Any]] = {}
    methods: dict[PromptLine, str] = {}

    def make_request(line: PromptLine) -> Request:
        header = headers[line] = {"line": line.number, "input": line.digest, "settings": settings}
        values = _parse_line(line)
        header |= {"id": values["id"]} if "id" in values else {}
        request = _build_request(values, args, sampling)
        methods[line] = request.steering.name
        return request

    for line, result in generate_many(engine, lines, make_request):
        if isinstance(result, InputError):
            yield {**headers.pop(line), "error": str(result)}
        else:
            yield {**headers.pop(line), **formatting.output_to_dict(result, methods.pop(line))}


def settings_digest(args: argparse.Namespace) -> str:
    """A digest of the flags that change answers: objectives, method, sampling, system text and model."""
    objectives = method_args.parse_objectives(args)
    spec = method_args.method_from_args(args, objectives)
    defaults = {field.name: field.default for field in fields(spec.method) if field.name != "objectives"}
    return digest(
        {
            "objectives": [[objective.text, objective.weight] for objective in objectives],
            "method": args.method and spec.method.name,
            "settings": {**defaults, **spec.settings},
            "sampling": asdict(common_args.sampling_params(args)),
            "system": args.system,
            "model": describe_model(common_args.engine_config(args)),
        },
        num_bytes=8,
    )


def _parse_line(line: PromptLine) -> dict[str, Any]:
    try:
        parsed = json.loads(line.text)
        dumps(parsed)  # the id must be serializable in the answer
    except (ValueError, RecursionError) as error:
        raise InputError(f"the line is invalid JSON ({error}); it must be a JSON string or object") from error
    values = {"prompt": parsed} if isinstance(parsed, str) else parsed
    if not isinstance(values, dict):
        raise InputError(f"the line is {short_repr(values)}; it must be a string or an object")
    for name in values:
        if name not in LINE_FIELDS and name not in SAMPLING_FIELDS:
            raise InputError(
                f"unknown key {short_repr(name)}; keys are {', '.join(LINE_FIELDS)} and the fields of "
                f"SamplingParams"
            )
    return values


def _build_request(values: Mapping[str, Any], args: argparse.Namespace, sampling: SamplingParams) -> Request:
    prefer = coerce("prefer", values.get("prefer", args.prefer), Sequence[str])
    objectives = [method_args.parse_objective(text) for text in prefer]
    if "prompt" in values and "messages" in values:
        raise InputError("the line has both prompt and messages; give only one")
    prompt = values.get("messages", values.get("prompt"))
    if args.system is not None and isinstance(prompt, str):
        prompt = common_args.build_messages(prompt, args.system)
    overrides = from_json({name: value for name, value in values.items() if name in SAMPLING_FIELDS})
    return Request(
        prompt,
        steering=method_args.method_from_args(args, objectives).build(objectives),
        sampling=replace(sampling, **overrides),
        trace=args.trace,
    )


def read_prompt_lines(input_path: Path) -> list[PromptLine]:
    """The lines of a file that are not blank. Raises InputError if it is not UTF-8 text."""
    try:
        texts = input_path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{str(input_path)!r} is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    return [PromptLine(number, text.strip()) for number, text in enumerate(texts, 1) if text.strip()]


def read_answered(
    input_path: Path, output_path: Path, lines: list[PromptLine], settings: str
) -> dict[int, bool]:
    """Map each line number that an earlier run has answered to whether it failed.

    Removes an incomplete last line of the output file. Raises InputError if the file contains anything
    else, or answers of another input or other settings.
    """
    answers = answers_file(output_path)
    digests = {line.number: line.digest for line in lines}
    answered_lines = {}
    for index, text in enumerate(answers.complete_lines(), 1):
        number, line_digest, line_settings, failed = _parse_answer(text, answers.mismatch(index))
        if line_settings != settings:
            raise InputError(
                f"line {index} of {str(output_path)!r} is an answer of a run with other objectives, method, "
                "sampling, system text or model; name another --output, or repeat its flags"
            )
        if digests.get(number) != line_digest:
            raise InputError(
                f"line {index} of {str(output_path)!r} answers a line {number} that differs from the one in "
                f"{str(input_path)!r}; name another --output"
            )
        answered_lines[number] = failed
    answers.truncate_partial()
    return answered_lines


def answers_file(output_path: Path) -> JSONLFile:
    """The output file."""
    return JSONLFile(output_path, ANSWER_PREFIX, "not an answer of an earlier run")


def _parse_answer(text: bytes, mismatch: InputError) -> tuple[int, str, str | None, bool]:
    """Of an output line: number and digest of its input line, its settings, and whether it failed."""
    try:
        answer = json.loads(text)
        failed = bool(answer.get("error"))
        return int(answer["line"]), str(answer["input"]), answer.get("settings"), failed
    except (ValueError, KeyError, TypeError, AttributeError):
        raise mismatch from None
