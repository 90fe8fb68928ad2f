"""Where a float32 product gives a row the same bits beside any others, see docs/findings/cpu-attention.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def is_steady() -> bool:
    """Not with MKL's kernels for AVX2, which it takes on Intel's CPUs that lack AVX512."""
    info = Path("/proc/cpuinfo")
    intel = "GenuineIntel" in info.read_text(encoding="utf-8") if info.exists() else False
    return not intel or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


steady = pytest.mark.skipif(not is_steady(), reason="MKL's AVX2 kernels round by what stands beside a row")
