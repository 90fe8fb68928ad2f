"""Where a measurement was made: the machine and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""The folder of the package, which in a checkout is the repository's."""


def where() -> dict[str, Any]:
    """What every bench says of itself: machine and commit."""
    return {"machine": machine(), "commit": commit(ROOT)}


def machine() -> dict[str, Any]:
    """CPU, cores, how busy they were in the last minute, Python and torch."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        "torch": _version("torch"),
    }


def commit(root: Path) -> str | None:
    """The commit checked out at `root`, "-dirty" after it where files differ; None for no checkout."""
    if git(root, "rev-parse", "--show-toplevel") != str(root):
        return None
    changed = git(root, "status", "--porcelain")
    return f"{git(root, 'rev-parse', 'HEAD')}{'-dirty' if changed else ''}"


def git(root: Path, *words: str) -> str | None:
    """What git says, None where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
