"""Where numbers come from: commit, versions, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ... import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "torch", "numpy", "tokenizers", "safetensors", "vaderSentiment", "textstat", "matplotlib",
)  # fmt: skip


def described() -> dict[str, Any]:
    """Commit (None outside a checkout) and whether files differ from it, versions, machine."""
    return {
        "trimtab": __version__,
        "python": platform.python_version(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": _threads(),
        },
    }


def _git(*command: str) -> str | None:
    """What git says of the checkout that this file is in; None where it is in none, or there is no git."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _threads() -> int:
    import torch  # noqa: PLC0415 - it is heavy

    return torch.get_num_threads()
