"""Where a float32 product gives a row the same bits beside any others, see docs/findings/cpu-attention.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def is_batch_invariant() -> bool:
    """Not with MKL's kernels for AVX2, which it takes on Intel's CPUs that lack AVX512."""
    cpuinfo = Path("/proc/cpuinfo")
    is_intel = "GenuineIntel" in cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else False
    return not is_intel or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


batch_invariant_cpu = pytest.mark.skipif(
    not is_batch_invariant(), reason="MKL's AVX2 kernels round by what stands beside a row"
)
