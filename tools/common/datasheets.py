"""Peak memory bandwidth and FLOP/s: GPUs from the vendors' data sheets, this machine's CPU as measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...models.config import ModelConfig

GPUS_PER_NODE = 8
"""Maximum tensor-parallel size: the GPUs of one machine, which are linked."""


@dataclass(frozen=True)
class Gpu:
    """One device. memory: bytes. bandwidth: bytes per second of its memory. flops: FLOP/s of large bfloat16
    matrix multiplications, without sparsity. link_bandwidth: bytes per second to the other GPUs of its
    machine, in each direction at once; 0 without links.
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
"""From the vendors' data sheets: A100 80GB SXM, H100 SXM, H200 SXM, HGX B200, Instinct MI300X. These list the
links' bandwidth of both directions together; here it is that of one."""
CPU = "cpu"
GPU_NAMES = (*DATA_SHEETS, CPU)


def get_gpu(name: str, config: ModelConfig, dtype: str) -> Gpu:
    """The device `name`. For "cpu", this machine's CPU is measured with `dtype`."""
    if name != CPU:
        return DATA_SHEETS[name]
    import torch  # noqa: PLC0415 - --help does not need it

    from ...models.common import memory  # noqa: PLC0415
    from . import machine_peaks  # noqa: PLC0415

    device = torch.device(CPU)
    free_bytes, peaks = memory.free_memory(device), machine_peaks.measure_peaks(getattr(torch, dtype), device)
    return Gpu("CPU", free_bytes, peaks.bandwidth, peaks.flops)
