"""`trimtab tune`: measures how this machine's GPU is best launched, and writes it down for later runs.

One number at a time is changed, from the shipped ones on, and kept where it is quicker; twice around. At last
the vocabulary's product fused with the steering step stands against one after the other, by rows.
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
from ..cli.terminal import watched
from ..common import environment
from ..common.statistics import number

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from ...kernels.triton.configs import Attention, Launches, Tile, Tuning
    from ..cli.parser import Parser

ATTENTION = {
    "split": (128, 256, 512),
    "keys": (32, 64, 128),
    "warps": (2, 4, 8),
    "prompt_warps": (4, 8),
    "stages": (1, 2, 3),
}
TILE = {"tokens": (64, 128, 256), "depth": (32, 64, 128), "warps": (4, 8), "stages": (2, 3, 4)}
"""What is tried."""
ROUNDS = 2
T = TypeVar("T")


class Clock(Protocol):
    """Seconds of each; infinite for what the device cannot launch."""

    def attention(self, tuned: Attention) -> float: ...

    def fused(self, rows: int, tuned: Tuning) -> float: ...

    def apart(self, rows: int) -> float: ...


@dataclass(frozen=True)
class Found:
    """launches: the quickest. microseconds: by what was measured, as shipped and as found."""

    launches: Launches
    microseconds: dict[str, tuple[float, float]]


def add_arguments(parser: Parser) -> None:
    """--device, --json."""
    parser.add_argument("--device", default="cuda", metavar="DEVICE", help="cuda or cuda:N (default: cuda)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Takes minutes, mostly of compiling, and writes the table beside the models in the cache."""
    import torch  # noqa: PLC0415 - --help does not need it

    from ...engine.execution.device import backend_of, device_of  # noqa: PLC0415

    if not torch.cuda.is_available():
        raise InputError("there is no GPU to measure on; without a table the shipped launches are used")
    device = device_of(args.device)
    if device.type == "cpu":
        raise InputError(f"device is {args.device!r}; it must be a GPU, such as cuda:0")
    backend_of("triton", device)
    torch.cuda.set_device(device)  # Triton launches on the current one
    from ...kernels.triton.configs import SHIPPED  # noqa: PLC0415
    from ...kernels.triton.tuning import file_of  # noqa: PLC0415
    from ..common.launch_timer import DeviceClock  # noqa: PLC0415

    found = tuned(SHIPPED, DeviceClock(device))
    gpu = torch.cuda.get_device_name(device)
    path = file_of(gpu)
    write(path, found, gpu)
    if args.json:
        print(dumps({"gpu": gpu, "file": str(path), **told(found)}))
    else:
        Console(width=None if watched() else 100).print(_table(found, gpu, path))
    return 0


def tuned(shipped: Launches, clock: Clock) -> Found:
    """The quickest launches that are found from the shipped on."""
    times: dict[str, tuple[float, float]] = {}
    attention, times["attention"] = _quickest(shipped.attention, ATTENTION, clock.attention)
    head = shipped.head
    for rows, first in head.tiles.items():
        seconds = partial(_fused, clock, head, rows)
        tile, times[f"head, {rows} rows"] = _quickest(first, TILE, seconds)
        head = _with_tile(head, rows, tile)
    head = replace(head, most_rows=_most_rows(head, clock))
    return Found(
        replace(shipped, attention=attention, head=head),
        {name: (1e6 * before, 1e6 * after) for name, (before, after) in times.items()},
    )


def write(path: Path, found: Found, gpu: str) -> None:
    """The table that `kernels.triton.tuning` reads, with where it comes from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(dumps({"gpu": gpu, **environment.where(), **told(found)}) + "\n", encoding="utf-8")
    os.replace(part, path)


def told(found: Found) -> dict[str, Any]:
    """As JSON takes it."""
    from ...kernels.triton.tuning import written  # noqa: PLC0415 - it brings triton

    return {**written(found.launches), "microseconds": found.microseconds}


def _quickest(
    start: T, choices: Mapping[str, Sequence[int]], seconds: Callable[[T], float]
) -> tuple[T, tuple[float, float]]:
    """One number at a time; and seconds at the start and of the best."""
    best, first = start, seconds(start)
    least, seen = first, {start: first}
    for _ in range(ROUNDS):
        for name, values in choices.items():
            for value in values:
                one = replace(best, **{name: value})  # type: ignore[type-var]
                if one not in seen:
                    seen[one] = seconds(one)
                if seen[one] < least:
                    best, least = one, seen[one]
    return best, (first, least)


def _fused(clock: Clock, head: Tuning, rows: int, tile: Tile) -> float:
    return clock.fused(rows, _with_tile(head, rows, tile))


def _with_tile(head: Tuning, rows: int, tile: Tile) -> Tuning:
    return replace(head, tiles={**head.tiles, rows: tile})


def _most_rows(head: Tuning, clock: Clock) -> int:
    """The largest tile up to which the fused product is never slower; the smallest where it always is."""
    sizes = sorted(head.tiles)
    most = sizes[0]
    for rows in sizes:
        if clock.fused(rows, head) > clock.apart(rows):
            break
        most = rows
    return most


def _table(found: Found, gpu: str, path: Path) -> Table:
    head = found.launches.head
    table = Table(title=f"{gpu}, microseconds", caption=f"{found.launches.attention}, {head}\n{path}")
    for name in ("", "as shipped", "as found"):
        table.add_column(name, justify="right" if name else "left")
    for name, times in found.microseconds.items():
        table.add_row(name, *map(number, times))
    return table
