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
from .configs import DEFAULT_CONFIGS, AttentionConfig, LaunchConfigs, LMHeadConfig, LMHeadTile


@cache
def get_launch_configs(device: torch.device) -> LaunchConfigs:
    """Those of this device. Raises InputError for a table that is none."""
    return DEFAULT_CONFIGS if device.type != "cuda" else load_for_gpu(torch.cuda.get_device_name(device))


def load_for_gpu(gpu_name: str) -> LaunchConfigs:
    """Those of GPUs of that name, the shipped where none were measured on this machine."""
    path = config_path(gpu_name)
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return DEFAULT_CONFIGS
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{str(path)!r} is not a tuning file ({type(error).__name__}: {error}); delete it, or make it "
            f"again "
            "with trimtab tune"
        ) from None


def config_path(gpu_name: str) -> Path:
    """Where the table of GPUs of that name is kept."""
    return cache_dir() / "tuning" / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu_name).strip('-').lower()}.json"


def from_json(data: dict[str, Any]) -> LaunchConfigs:
    """From what `written` made. Raises ValueError, TypeError or KeyError for anything else."""
    attention, head = AttentionConfig(**data["attention"]), data["head"]
    tiles = {int(rows): LMHeadTile(**tile) for rows, tile in head["tiles"].items()}
    values = [*vars(attention).values(), *(n for tile in tiles.values() for n in vars(tile).values())]
    if not all(isinstance(n, int) and n > 0 for n in (*values, *tiles, head["most_rows"])):
        raise ValueError("a number that is no whole number above 0")
    if attention.split % attention.keys or head["most_rows"] > max(tiles):
        raise ValueError("a split of no whole products, or more rows than tiles have")
    return LaunchConfigs(attention, LMHeadConfig(tiles, head["most_rows"]))


def to_json(configs: LaunchConfigs) -> dict[str, Any]:
    """As JSON takes it."""
    head = configs.head
    tiles = {str(rows): asdict(tile) for rows, tile in head.tiles.items()}
    return {"attention": asdict(configs.attention), "head": {"tiles": tiles, "most_rows": head.max_rows}}
