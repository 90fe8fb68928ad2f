"""Peaks of devices from the vendors' data sheets, and of this machine's CPU as measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...models.config import ModelConfig

GPUS_PER_NODE = 8
"""GPUs that one model may be cut over: those of a machine, which have links among them."""


@dataclass(frozen=True)
class Gpu:
    """One device. memory: bytes. bandwidth: bytes a second of its memory. flops: flops a second of large
    products in bfloat16, without sparsity. link_bandwidth: bytes a second that it sends to others of its
    machine while it receives as many; 0 where there are none.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    link_bandwidth: float = 0.0


DATA_SHEETS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("A100", 80e9, 2039e9, 312e12, 300e9),
        Gpu("H100", 80e9, 3350e9, 989e12, 450e9),
        Gpu("H200", 141e9, 4800e9, 989e12, 450e9),
        Gpu("B200", 180e9, 8000e9, 2250e12, 900e9),
        Gpu("MI300X", 192e9, 5300e9, 1307e12, 448e9),
    )
}
"""By the vendors' data sheets: A100 80GB SXM, H100 SXM, H200 SXM, HGX B200, Instinct MI300X. Those give links
for both directions together; here is one."""
CPU = "cpu"
GPU_NAMES = (*DATA_SHEETS, CPU)


def get_gpu(name: str, config: ModelConfig, dtype: str) -> Gpu:
    """The device of that name; this machine's CPU is measured, for a model in that type."""
    if name != CPU:
        return DATA_SHEETS[name]
    import torch  # noqa: PLC0415 - --help does not need it

    from ...models.common import memory  # noqa: PLC0415
    from . import machine_peaks  # noqa: PLC0415

    device = torch.device(CPU)
    free_bytes, peaks = memory.free_memory(device), machine_peaks.measure_peaks(getattr(torch, dtype), device)
    return Gpu("CPU", free_bytes, peaks.bandwidth, peaks.flops)
