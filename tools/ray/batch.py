"""`trimtab generate --ray`: files of prompts, answered by several engines on a Ray cluster.

Answers come back to this process, which alone writes: a line has one answer, whatever becomes of the engines,
and the files are those of a run without Ray, so that either goes on where the other stopped.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, RunError
from ..cli import common_args, method_args, open_engine
from ..cli.display import progress
from ..common import batch
from .batch_actor import Answerer
from .cluster import actor_options, check_model, connected, require
from .file_shards import shards_of

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from ...engine.async_engine import AsyncEngine
    from .config import RayConfig
    from .file_shards import Shard

CHUNK = 16
"""Lines that an engine is given at once, and that are decoded again when it dies."""
RETRIES = 3
"""How often a chunk is given to another engine when one dies over it."""
ROOM = 1 << 20
"""Answers that may wait in an engine: all who ask are ours."""


@dataclass
class Work:
    """What is to be done: of each file of answers the lines that it lacks, as [target, number, text]."""

    left: list[tuple[str, int, str]] = field(default_factory=list)
    lines: int = 0
    failed_before: int = 0

    @classmethod
    def of(cls, shards: list[Shard]) -> Work:
        """Reads all files. Raises InputError for one that is not what it should be."""
        work = cls()
        for shard in shards:
            lines = shard.lines()
            done = batch.answered(shard.source, shard.target, lines)
            target = str(shard.target)
            work.left += [(target, each.number, each.text) for each in lines if each.number not in done]
            work.lines += len(lines)
            work.failed_before += sum(done.values())
        return work

    def chunks(self) -> Iterator[dict[str, str]]:
        """Some lines at a time, for Ray."""
        lines = iter(self.left)
        while chunk := list(islice(lines, CHUNK)):
            yield {"chunk": json.dumps(chunk)}


def run(args: argparse.Namespace, config: RayConfig, opening: Callable[[], AsyncEngine] | None = None) -> int:
    """Answers every line that has no answer yet. 1 when a line of this run failed.

    `opening` makes the engine where each actor is. Raises as `batch.run` does.
    """
    require()
    method_args.choice(args, method_args.wishes(args))
    sampling, engine = common_args.sampling(args), replace(common_args.config(args), max_waiting=ROOM)
    work = Work.of(shards_of(args.input, args.output))
    if not work.left:
        return batch.nothing_left(args.input, args.output, work.failed_before)
    check_model(engine)
    with connected():
        options: dict[str, Any] = {
            **actor_options(config, engine),
            **_pool(config, engine.max_num_seqs),
            "fn_constructor_args": (
                opening or partial(open_engine.open_async_engine, engine),
                args,
                sampling,
            ),
        }
        failed = _write(work, _rows(work, options))
    return batch.ended(len(work.left), failed)


def _pool(config: RayConfig, max_num_seqs: int) -> dict[str, Any]:
    """So many actors, and in each so many chunks as keep its engine's batch full while some end."""
    from ray.data import ActorPoolStrategy  # noqa: PLC0415

    chunks = -(-2 * max_num_seqs // CHUNK)
    pool = ActorPoolStrategy(
        min_size=config.least,
        max_size=config.most,
        max_concurrent_calls_per_actor=chunks,
        max_tasks_in_flight_per_actor=chunks,
        enable_true_multi_threading=True,
    )
    return {"compute": pool, "max_restarts": -1, "max_task_retries": RETRIES}


def _rows(work: Work, options: dict[str, Any]) -> Iterator[tuple[str, int, str, bool]]:
    """Target, number, answer and whether it failed, of each line as it is answered."""
    import ray  # noqa: PLC0415

    ray.data.DataContext.get_current().enable_progress_bars = False
    chunks = list(work.chunks())
    answered = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map(Answerer, **options)
    try:
        for row in answered.iter_rows():
            yield from json.loads(row["answered"])
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, InputError | RunError):
            raise cause from error
        reason = str(error).strip().splitlines()[-1]
        raise RunError(f"Ray gave up ({reason}); the same command goes on where it stopped") from error


def _write(work: Work, rows: Iterator[tuple[str, int, str, bool]]) -> int:
    """Adds each answer to its file, once. Returns how many of them are errors."""
    missing: dict[str, set[int]] = defaultdict(set)
    for target, number, _ in work.left:
        missing[target].add(number)
    failed, count = 0, work.lines - len(work.left)
    with progress("trimtab: answering …") as show:
        for target, number, answer, wrong in rows:
            if number not in missing[target]:
                continue
            missing[target].discard(number)
            path = Path(target)
            path.parent.mkdir(parents=True, exist_ok=True)
            batch.output(path).add([answer])
            failed, count = failed + wrong, count + 1
            if show:
                show(count, work.lines)
    if lost := sum(map(len, missing.values())):
        raise RunError(f"{lost} lines have no answer; the same command goes on where it stopped")
    return failed
