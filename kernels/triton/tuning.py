"""Launch configurations per GPU model: the defaults, or the tuning file that `trimtab tune` measured.

The file is read once per process and never written while serving: measuring would stall requests, and the
result of a launch must not depend on when it ran. `split` has one length whatever the batch, so that with any
tuning file a result does not depend on the batch; its last bits depend on the file.
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
    """Launch configs of this device. Raises InputError for an invalid tuning file."""
    return DEFAULT_CONFIGS if device.type != "cuda" else load_for_gpu(torch.cuda.get_device_name(device))


def load_for_gpu(gpu_name: str) -> LaunchConfigs:
    """Launch configs for GPUs of that name; the defaults if this machine has no tuning file for it."""
    path = config_path(gpu_name)
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return DEFAULT_CONFIGS
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{str(path)!r} is not a tuning file ({type(error).__name__}: {error}); delete it, or recreate "
            "it with trimtab tune"
        ) from None


def config_path(gpu_name: str) -> Path:
    """Path of the tuning file for GPUs of that name."""
    return cache_dir() / "tuning" / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu_name).strip('-').lower()}.json"


def from_json(data: dict[str, Any]) -> LaunchConfigs:
    """Inverse of `to_json`. Raises ValueError, TypeError or KeyError for other data."""
    attention, head = AttentionConfig(**data["attention"]), data["head"]
    tiles = {int(rows): LMHeadTile(**tile) for rows, tile in head["tiles"].items()}
    values = [*vars(attention).values(), *(n for tile in tiles.values() for n in vars(tile).values())]
    if not all(isinstance(n, int) and n > 0 for n in (*values, *tiles, head["most_rows"])):
        raise ValueError("all values must be positive integers")
    if attention.split % attention.keys or head["most_rows"] > max(tiles):
        raise ValueError(
            "split must be a multiple of keys, and most_rows at most the rows of the largest tile"
        )
    return LaunchConfigs(attention, LMHeadConfig(tiles, head["most_rows"]))


def to_json(configs: LaunchConfigs) -> dict[str, Any]:
    """The configs as a JSON object."""
    head = configs.head
    tiles = {str(rows): asdict(tile) for rows, tile in head.tiles.items()}
    return {"attention": asdict(configs.attention), "head": {"tiles": tiles, "most_rows": head.max_rows}}
