"""Prompts from a file: a line of JSON in, a line of JSON out. What an earlier run has answered stays so.

A line is a prompt, as a JSON string, or an object: `prompt` or `messages`, and perhaps `id`, `prefer` (a list
of "TEXT=WEIGHT") and any field of SamplingParams, each in place of the flag of its name. An answer's line has
the number, the id and a digest of the line that it answers, and what `--json` prints; a wrong line's has the
error. Answers are written as they end, so in any order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine.request import Request
from ...engine.sampling_params import SamplingParams, from_json
from ...engine.utils.fields import fitted
from ...engine.utils.json import dumps
from ...kernels.common.errors import InputError, quoted
from ..cli import common_args, formatting, method_args, open_engine
from ..cli.display import progress
from ..cli.terminal import say
from .jsonl import Lines
from .run_many import decoded

if TYPE_CHECKING:
    import argparse

    from ...engine.async_engine import AsyncEngine

SAMPLING = {field.name for field in fields(SamplingParams)}
KNOWN = ("prompt", "messages", "id", "prefer")
BEGINNING = b'{"line": '
"""Of every line of the output."""


@dataclass(frozen=True)
class Line:
    """A line of the input: its number from 1, and its text."""

    number: int
    text: str

    @property
    def digest(self) -> str:
        """What tells it from another line."""
        return blake2b(self.text.encode(), digest_size=8).hexdigest()


def run(args: argparse.Namespace) -> int:
    """Answers every line that has no answer yet. 1 when a line of this run failed."""
    method_args.choice(args, method_args.wishes(args))
    sampling, config = common_args.sampling(args), common_args.config(args)
    source, target = Path(args.input), Path(args.output)
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"--output {args.output!r} is --input, too; name another --output")
    lines = lines_of(source)
    done = answered(source, target, lines)
    left = [line for line in lines if line.number not in done]
    if not left:
        return nothing_left(str(source), str(target), sum(done.values()))
    failed = 0
    engine = open_engine.open_async_engine(config)
    with ExitStack() as ending:
        ending.callback(engine.shutdown)
        show = ending.enter_context(progress("trimtab: answering …"))
        for count, found in enumerate(answers(engine, left, args, sampling), 1):
            failed += bool(found.get("error"))
            output(target).add([dumps(found)])
            if show:
                show(len(done) + count, len(lines))
    return ended(len(left), failed)


def nothing_left(source: str, target: str, failed: int) -> int:
    """Says that all is answered, of which so many lines with an error; the exit status."""
    failures = f"; {failed} of them with an error" if failed else ""
    say(f"every line of {source!r} is answered in {target!r}{failures}")
    return 1 if failed else 0


def ended(count: int, failed: int) -> int:
    """Says how many of the lines of this run were answered; the exit status."""
    say(f"answered {count - failed} of {count} lines" + (f"; {failed} failed" if failed else ""))
    return 1 if failed else 0


def answers(
    engine: AsyncEngine, left: list[Line], args: argparse.Namespace, sampling: SamplingParams
) -> Iterator[dict[str, Any]]:
    """What is to be written of each line, as it becomes known."""
    heads: dict[Line, dict[str, Any]] = {}
    methods: dict[Line, str] = {}

    def request(line: Line) -> Request:
        head = heads[line] = {"line": line.number, "input": line.digest}
        values = _read(line)
        head |= {"id": values["id"]} if "id" in values else {}
        made = _request(values, args, sampling)
        methods[line] = made.steering.name
        return made

    for line, found in decoded(engine, left, request):
        if isinstance(found, InputError):
            yield {**heads.pop(line), "error": str(found)}
        else:
            yield {**heads.pop(line), **formatting.describe(found, methods.pop(line))}


def _read(line: Line) -> dict[str, Any]:
    try:
        found = json.loads(line.text)
        dumps(found)  # an id is written again
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"the line is no JSON ({error}); it must be a text in quotes or an object"
        ) from error
    values = {"prompt": found} if isinstance(found, str) else found
    if not isinstance(values, dict):
        raise InputError(f"the line is {quoted(values)}; it must be a text or an object")
    for name in values:
        if name not in KNOWN and name not in SAMPLING:
            raise InputError(
                f"the line has {quoted(name)}; it may have {', '.join(KNOWN)} and fields of SamplingParams"
            )
    return values


def _request(values: Mapping[str, Any], args: argparse.Namespace, sampling: SamplingParams) -> Request:
    given = fitted("prefer", values.get("prefer", args.prefer), Sequence[str])
    wishes = [method_args.parse_wish(text) for text in given]
    if "prompt" in values and "messages" in values:
        raise InputError("the line has prompt and messages; it must have one of them")
    prompt = values.get("messages", values.get("prompt"))
    if args.system is not None and isinstance(prompt, str):
        prompt = common_args.messages(prompt, args.system)
    own = from_json({name: value for name, value in values.items() if name in SAMPLING})
    return Request(
        prompt,
        steering=method_args.choice(args, wishes).build(wishes),
        sampling=replace(sampling, **own),
        trace=args.trace,
    )


def lines_of(source: Path) -> list[Line]:
    """The lines of a file that are not blank. Raises InputError for what is no text."""
    try:
        texts = source.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(source)!r} is no UTF-8 text ({error.reason} at byte {error.start})") from None
    return [Line(number, text.strip()) for number, text in enumerate(texts, 1) if text.strip()]


def answered(source: Path, target: Path, lines: list[Line]) -> dict[int, bool]:
    """The lines that an earlier run has answered, and whether with an error. What it left half-written is
    cut off.

    Raises InputError when the file holds anything else, or answers to another input.
    """
    file = output(target)
    digests = {line.number: line.digest for line in lines}
    found = {}
    for index, text in enumerate(file.whole(), 1):
        number, digest, failed = _parsed(text, file.foreign(index))
        if digests.get(number) != digest:
            raise InputError(
                f"line {index} of {str(target)!r} answers another line {number} than {str(source)!r} has; "
                "name another --output"
            )
        found[number] = failed
    file.cut()
    return found


def output(target: Path) -> Lines:
    """The file of answers."""
    return Lines(target, BEGINNING, "no answer of an earlier run")


def _parsed(text: bytes, foreign: InputError) -> tuple[int, str, bool]:
    """The number and the digest of the line that a line of the output answers, and whether with an error."""
    try:
        answer = json.loads(text)
        return int(answer["line"]), str(answer["input"]), bool(answer.get("error"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise foreign from None
