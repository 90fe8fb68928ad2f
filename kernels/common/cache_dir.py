"""The folder of trimtab's cached files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$TRIMTAB_CACHE, else $XDG_CACHE_HOME/trimtab, else ~/.cache/trimtab."""
    if override := os.environ.get("TRIMTAB_CACHE"):
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trimtab"
