"""`trimtab tune`: find the fastest Triton launch configs for this machine's GPU and save them.

Coordinate search from the shipped configs, in two rounds: one parameter is changed at a time and kept if it
is faster. Last, the LM head fused with the steering step is compared with the two run separately, by rows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rich.console import Console
from rich.table import Table

from ...engine.utils.json import dumps
from ...kernels.common.errors import InputError
from ..cli.terminal import is_tty
from ..common import environment
from ..common.statistics import format_number

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ...kernels.triton.configs import AttentionConfig, LaunchConfigs, LMHeadConfig, LMHeadTile
    from ..cli.parser import Parser

ATTENTION_CHOICES = {
    "split": (128, 256, 512),
    "keys": (32, 64, 128),
    "warps": (2, 4, 8),
    "prompt_warps": (4, 8),
    "stages": (1, 2, 3),
}
TILE_CHOICES = {"tokens": (64, 128, 256), "depth": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4)}
"""Candidate values of each launch parameter."""
NUM_ROUNDS = 2
T = TypeVar("T")


class TuningClock(Protocol):
    """Measures the seconds of a launch; infinite if the device cannot launch it."""

    def attention(self, tuned: AttentionConfig) -> float: ...

    def fused(self, rows: int, tuned: LMHeadConfig) -> float: ...

    def apart(self, rows: int) -> float: ...


@dataclass(frozen=True)
class TuningResult:
    """launches: the fastest configs. microseconds: by measurement, times of the shipped and tuned config."""

    launches: LaunchConfigs
    microseconds: dict[str, tuple[float, float]]


def add_arguments(parser: Parser) -> None:
    """Add --device and --json."""
    parser.add_argument("--device", default="cuda", metavar="DEVICE", help="cuda or cuda:N (default: cuda)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Tune and save the configs in the cache folder. Takes minutes, mostly for compiling."""
    import torch  # noqa: PLC0415 - --help does not need it

    from ...engine.execution.device import resolve_device, select_backend  # noqa: PLC0415

    if not torch.cuda.is_available():
        raise InputError("no GPU found to tune for; untuned GPUs use the shipped launch configs")
    device = resolve_device(args.device)
    if device.type == "cpu":
        raise InputError(f"device is {args.device!r}; it must be a GPU, such as cuda:0")
    select_backend("triton", device)
    torch.cuda.set_device(device)  # Triton launches on the current device
    from ...kernels.triton.configs import DEFAULT_CONFIGS  # noqa: PLC0415
    from ...kernels.triton.tuning import config_path  # noqa: PLC0415
    from ..common.launch_timer import DeviceClock  # noqa: PLC0415

    result = tune_launches(DEFAULT_CONFIGS, DeviceClock(device))
    gpu = torch.cuda.get_device_name(device)
    path = config_path(gpu)
    write_result(path, result, gpu)
    if args.json:
        print(dumps({"gpu": gpu, "file": str(path), **result_to_dict(result)}))
    else:
        Console(width=None if is_tty() else 100).print(_format_table(result, gpu, path))
    return 0


def tune_launches(defaults: LaunchConfigs, clock: TuningClock) -> TuningResult:
    """Search the fastest launch configs, starting from `defaults`."""
    times: dict[str, tuple[float, float]] = {}
    attention, times["attention"] = _coordinate_search(defaults.attention, ATTENTION_CHOICES, clock.attention)
    head = defaults.head
    for rows, default_tile in head.tiles.items():
        measure = partial(_time_fused, clock, head, rows)
        tile, times[f"head, {rows} rows"] = _coordinate_search(default_tile, TILE_CHOICES, measure)
        head = _with_tile(head, rows, tile)
    head = replace(head, max_rows=_max_fused_rows(head, clock))
    return TuningResult(
        replace(defaults, attention=attention, head=head),
        {name: (1e6 * before, 1e6 * after) for name, (before, after) in times.items()},
    )


def write_result(path: Path, result: TuningResult, gpu: str) -> None:
    """Write the file that `kernels.triton.tuning` reads, with metadata of the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = path.with_suffix(".part")
    tmp_path.write_text(
        dumps({"gpu": gpu, **environment.run_metadata(), **result_to_dict(result)}) + "\n", encoding="utf-8"
    )
    os.replace(tmp_path, path)


def result_to_dict(result: TuningResult) -> dict[str, Any]:
    """The result as a JSON-compatible dictionary."""
    from ...kernels.triton.tuning import to_json  # noqa: PLC0415 - imports triton

    return {**to_json(result.launches), "microseconds": result.microseconds}


def _coordinate_search(
    start: T, choices: Mapping[str, Sequence[int]], measure: Callable[[T], float]
) -> tuple[T, tuple[float, float]]:
    """Coordinate search. Returns the best config, and the seconds of the start and of the best config."""
    best, start_time = start, measure(start)
    best_time, times = start_time, {start: start_time}
    for _ in range(NUM_ROUNDS):
        for name, values in choices.items():
            for value in values:
                candidate = replace(best, **{name: value})  # type: ignore[type-var]
                if candidate not in times:
                    times[candidate] = measure(candidate)
                if times[candidate] < best_time:
                    best, best_time = candidate, times[candidate]
    return best, (start_time, best_time)


def _time_fused(clock: TuningClock, head: LMHeadConfig, rows: int, tile: LMHeadTile) -> float:
    return clock.fused(rows, _with_tile(head, rows, tile))


def _with_tile(head: LMHeadConfig, rows: int, tile: LMHeadTile) -> LMHeadConfig:
    return replace(head, tiles={**head.tiles, rows: tile})


def _max_fused_rows(head: LMHeadConfig, clock: TuningClock) -> int:
    """The largest row count up to which the fused LM head is never slower; at least the smallest tile's."""
    sizes = sorted(head.tiles)
    max_rows = sizes[0]
    for rows in sizes:
        if clock.fused(rows, head) > clock.apart(rows):
            break
        max_rows = rows
    return max_rows


def _format_table(result: TuningResult, gpu: str, path: Path) -> Table:
    head = result.launches.head
    table = Table(title=f"{gpu}, microseconds", caption=f"{result.launches.attention}, {head}\n{path}")
    for name in ("", "shipped", "tuned"):
        table.add_column(name, justify="right" if name else "left")
    for name, times in result.microseconds.items():
        table.add_row(name, *map(format_number, times))
    return table
