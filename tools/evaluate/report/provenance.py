"""Provenance of a report: commit, package versions and machine."""

from __future__ import annotations

import os
import platform
from typing import Any

from ....kernels.common.version import VERSION
from ...common import environment

PACKAGES = (
    "torch", "numpy", "tokenizers", "safetensors", "vaderSentiment", "textstat", "matplotlib",
)  # fmt: skip


def collect_provenance() -> dict[str, Any]:
    """Commit (None outside a checkout), whether the checkout is dirty, versions, machine."""
    commit, dirty = environment.get_checkout(environment.ROOT)
    return {
        "trimtab": VERSION,
        "python": platform.python_version(),
        "commit": commit,
        "dirty": dirty,
        "packages": {name: version for name in PACKAGES if (version := environment.package_version(name))},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": environment.cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": _num_threads(),
        },
    }


def _num_threads() -> int:
    import torch  # noqa: PLC0415 - slow to import

    return torch.get_num_threads()
