"""Skip mark for CPUs whose float32 matmul is not batch-invariant, see docs/findings/cpu-attention.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def is_batch_invariant() -> bool:
    """False on Intel CPUs without AVX512, for which MKL uses its AVX2 kernels."""
    cpuinfo = Path("/proc/cpuinfo")
    is_intel = "GenuineIntel" in cpuinfo.read_text(encoding="utf-8") if cpuinfo.exists() else False
    return not is_intel or torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


batch_invariant_cpu = pytest.mark.skipif(
    not is_batch_invariant(),
    reason="with MKL's AVX2 kernels, the rounding of a row depends on the other rows",
)
