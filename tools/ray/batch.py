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
from .batch_actor import BatchActor
from .cluster import actor_options, check_model, connect_cluster, require_ray
from .file_shards import find_shards

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from ...engine.async_engine import AsyncEngine
    from .config import RayConfig
    from .file_shards import FileShard

CHUNK_LINES = 16
"""Lines that an engine is given at once, and that are decoded again when it dies."""
MAX_RETRIES = 3
"""How often a chunk is given to another engine when one dies over it."""
MAX_WAITING = 1 << 20
"""Answers that may wait in an engine: all who ask are ours."""


@dataclass
class PendingLines:
    """What is to be done: of each file of answers the lines that it lacks, as [target, number, text]."""

    pending: list[tuple[str, int, str]] = field(default_factory=list)
    num_lines: int = 0
    num_failed_before: int = 0

    @classmethod
    def from_shards(cls, shards: list[FileShard]) -> PendingLines:
        """Reads all files. Raises InputError for one that is not what it should be."""
        work = cls()
        for shard in shards:
            lines = shard.read_lines()
            answered_lines = batch.read_answered(shard.input_path, shard.output_path, lines)
            output_path = str(shard.output_path)
            work.pending += [
                (output_path, line.number, line.text) for line in lines if line.number not in answered_lines
            ]
            work.num_lines += len(lines)
            work.num_failed_before += sum(answered_lines.values())
        return work

    def chunks(self) -> Iterator[dict[str, str]]:
        """Some lines at a time, for Ray."""
        lines = iter(self.pending)
        while chunk := list(islice(lines, CHUNK_LINES)):
            yield {"chunk": json.dumps(chunk)}


def run(
    args: argparse.Namespace, config: RayConfig, engine_factory: Callable[[], AsyncEngine] | None = None
) -> int:
    """Answers every line that has no answer yet. 1 when a line of this run failed.

    `engine_factory` makes the engine where each actor is. Raises as `batch.run` does.
    """
    require_ray()
    method_args.method_from_args(args, method_args.parse_objectives(args))
    sampling, engine = (
        common_args.sampling_params(args),
        replace(common_args.engine_config(args), max_waiting=MAX_WAITING),
    )
    work = PendingLines.from_shards(find_shards(args.input, args.output))
    if not work.pending:
        return batch.report_all_answered(args.input, args.output, work.num_failed_before)
    check_model(engine)
    with connect_cluster():
        options: dict[str, Any] = {
            **actor_options(config, engine),
            **_pool_options(config, engine.max_num_seqs),
            "fn_constructor_args": (
                engine_factory or partial(open_engine.open_async_engine, engine),
                args,
                sampling,
            ),
        }
        num_failed = _write_answers(work, _answer_rows(work, options))
    return batch.report_answered(len(work.pending), num_failed)


def _pool_options(config: RayConfig, max_num_seqs: int) -> dict[str, Any]:
    """So many actors, and in each so many chunks as keep its engine's batch full while some end."""
    from ray.data import ActorPoolStrategy  # noqa: PLC0415

    num_chunks = -(-2 * max_num_seqs // CHUNK_LINES)
    pool = ActorPoolStrategy(
        min_size=config.min_replicas,
        max_size=config.max_replicas,
        max_concurrent_calls_per_actor=num_chunks,
        max_tasks_in_flight_per_actor=num_chunks,
        enable_true_multi_threading=True,
    )
    return {"compute": pool, "max_restarts": -1, "max_task_retries": MAX_RETRIES}


def _answer_rows(work: PendingLines, options: dict[str, Any]) -> Iterator[tuple[str, int, str, bool]]:
    """Target, number, answer and whether it failed, of each line as it is answered."""
    import ray  # noqa: PLC0415

    ray.data.DataContext.get_current().enable_progress_bars = False
    chunks = list(work.chunks())
    dataset = ray.data.from_items(chunks, override_num_blocks=len(chunks)).map(BatchActor, **options)
    try:
        for row in dataset.iter_rows():
            yield from json.loads(row["answered"])
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, InputError | RunError):
            raise cause from error
        reason = str(error).strip().splitlines()[-1]
        raise RunError(f"Ray gave up ({reason}); the same command goes on where it stopped") from error


def _write_answers(work: PendingLines, rows: Iterator[tuple[str, int, str, bool]]) -> int:
    """Adds each answer to its file, once. Returns how many of them are errors."""
    unanswered: dict[str, set[int]] = defaultdict(set)
    for output_path, number, _ in work.pending:
        unanswered[output_path].add(number)
    num_failed, num_answered = 0, work.num_lines - len(work.pending)
    with progress("trimtab: answering …") as show_progress:
        for output_path, number, answer, is_error in rows:
            if number not in unanswered[output_path]:
                continue
            unanswered[output_path].discard(number)
            path = Path(output_path)
            path.parent.mkdir(parents=True, exist_ok=True)
            batch.answers_file(path).append([answer])
            num_failed, num_answered = num_failed + is_error, num_answered + 1
            if show_progress:
                show_progress(num_answered, work.num_lines)
    if num_missing := sum(map(len, unanswered.values())):
        raise RunError(f"{num_missing} lines have no answer; the same command goes on where it stopped")
    return num_failed
