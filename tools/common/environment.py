"""Metadata of a measurement: machine, commit and package versions."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""The package's folder; in a checkout, the repository root."""


def run_metadata() -> dict[str, Any]:
    """Machine and commit, for the JSON of every bench."""
    return {"machine": machine_info(), "commit": get_commit(ROOT)}


def machine_info() -> dict[str, Any]:
    """CPU, cores, load average of the last minute, threads, Python and torch."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        "torch": package_version("torch"),
    }


def get_commit(root: Path) -> str | None:
    """The commit checked out at `root`, with "-dirty" if files differ from it; None outside a checkout."""
    head, dirty = get_checkout(root)
    return head and f"{head}{'-dirty' if dirty else ''}"


def get_checkout(root: Path) -> tuple[str | None, bool]:
    """The commit checked out at `root`, None outside a checkout, and whether files differ from it."""
    if run_git(root, "rev-parse", "--show-toplevel") != str(root):
        return None, False
    return run_git(root, "rev-parse", "HEAD"), bool(run_git(root, "status", "--porcelain"))


def run_git(root: Path, *args: str) -> str | None:
    """git's output; None if it fails or is not installed."""
    try:
        result = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def package_version(package: str) -> str | None:
    """The installed version, None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
