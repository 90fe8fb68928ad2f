"""`trimtab generate --ray`: batch generation from files, by several engines on a Ray cluster.

Only this process writes answers, so each line gets exactly one, even if an engine dies. The files have the
format of a run without Ray, so that either kind of run can resume the other.
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
"""Lines per task; all are decoded again if the engine dies."""
MAX_RETRIES = 3
"""Retries of a chunk on another engine after one died."""
MAX_WAITING = 1 << 20
"""max_waiting of the engines: practically unlimited, as only this command submits requests."""


@dataclass
class PendingLines:
    """Lines without an answer, (output path, line number, text), and counts of lines and earlier failures."""

    pending: list[tuple[str, int, str]] = field(default_factory=list)
    num_lines: int = 0
    num_failed_before: int = 0

    @classmethod
    def from_shards(cls, shards: list[FileShard], settings: str) -> PendingLines:
        """Read all files. Raises InputError for an invalid file, and for answers of other settings."""
        work = cls()
        for shard in shards:
            lines = shard.read_lines()
            answered_lines = batch.read_answered(shard.input_path, shard.output_path, lines, settings)
            output_path = str(shard.output_path)
            work.pending += [
                (output_path, line.number, line.text) for line in lines if line.number not in answered_lines
            ]
            work.num_lines += len(lines)
            work.num_failed_before += sum(answered_lines.values())
        return work

    def chunks(self) -> Iterator[dict[str, str]]:
        """Yield rows of CHUNK_LINES lines for Ray Data."""
        lines = iter(self.pending)
        while chunk := list(islice(lines, CHUNK_LINES)):
            yield {"chunk": json.dumps(chunk)}


def run(
    args: argparse.Namespace, config: RayConfig, engine_factory: Callable[[], AsyncEngine] | None = None
) -> int:
    """Answer every line that has no answer yet. Return 1 if a line failed.

    `engine_factory` creates the engine in each actor's process. Raises the errors of `batch.run`.
    """
    require_ray()
    method_args.method_from_args(args, method_args.parse_objectives(args))
    sampling, engine = (
        common_args.sampling_params(args),
        replace(common_args.engine_config(args), max_waiting=MAX_WAITING),
    )
    work = PendingLines.from_shards(find_shards(args.input, args.output), batch.settings_digest(args))
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
    """Options of the actor pool: each actor gets enough chunks at once to keep its engine's batch full."""
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
    """Yield (output path, line number, answer, whether it failed) as lines finish."""
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
        raise RunError(f"Ray failed ({reason}); run the same command again to resume") from error


def _write_answers(work: PendingLines, rows: Iterator[tuple[str, int, str, bool]]) -> int:
    """Append each answer to its file, once. Return the number of failed lines."""
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
        raise RunError(f"{num_missing} lines have no answer; run the same command again to resume")
    return num_failed
