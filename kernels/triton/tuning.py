"""How kernels are launched on a device: as shipped, or as `trimtab tune` measured on GPUs of its name.

A table is read once a process and never made while serving: measuring beside requests would stall them, and
what a launch computes must not depend on when it was made. `split` is the length of a part whatever the
batch, so that with any table a result does not depend on its neighbours; its last bits depend on the table.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..common.cache_dir import cache_dir
from ..common.errors import InputError
from .configs import SHIPPED, Attention, Launches, Tile, Tuning


@cache
def of(device: torch.device) -> Launches:
    """Those of this device. Raises InputError for a table that is none."""
    return SHIPPED if device.type != "cuda" else named(torch.cuda.get_device_name(device))


def named(gpu: str) -> Launches:
    """Those of GPUs of that name, the shipped where none were measured on this machine."""
    path = file_of(gpu)
    try:
        return parsed(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return SHIPPED
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{str(path)!r} holds no launches ({type(error).__name__}: {error}); delete it, or make it again "
            "with trimtab tune"
        ) from None


def file_of(gpu: str) -> Path:
    """Where the table of GPUs of that name is kept."""
    return cache_dir() / "tuning" / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-').lower()}.json"


def parsed(data: dict[str, Any]) -> Launches:
    """From what `written` made. Raises ValueError, TypeError or KeyError for anything else."""
    attention, head = Attention(**data["attention"]), data["head"]
    tiles = {int(rows): Tile(**tile) for rows, tile in head["tiles"].items()}
    numbers = [*vars(attention).values(), *(n for tile in tiles.values() for n in vars(tile).values())]
    if not all(isinstance(n, int) and n > 0 for n in (*numbers, *tiles, head["most_rows"])):
        raise ValueError("a number that is no whole number above 0")
    if attention.split % attention.keys or head["most_rows"] > max(tiles):
        raise ValueError("a split of no whole products, or more rows than tiles have")
    return Launches(attention, Tuning(tiles, head["most_rows"]))


def written(launches: Launches) -> dict[str, Any]:
    """As JSON takes it."""
    head = launches.head
    tiles = {str(rows): asdict(tile) for rows, tile in head.tiles.items()}
    return {"attention": asdict(launches.attention), "head": {"tiles": tiles, "most_rows": head.most_rows}}
