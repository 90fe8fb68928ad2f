"""How much memory a device has left, and the refusal of what does not fit: better than being killed."""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...kernels.common.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

GIB = 1024**3
KEPT, LARGEST = 256 << 20, 32 << 20
"""What the heap keeps at its end, and the largest block that comes from it: glibc takes no larger number."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""malloc.h's names of these two."""
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""A control group's files in version 2 and 1: the most it may hold, and what it holds."""


def require(needed: int, what: str, device: torch.device) -> None:
    """Raises RunError when `needed` bytes are not free on the device. `what` begins the sentence."""
    free = free_memory(device)
    if needed > free:
        place = "this machine" if device.type == "cpu" else str(device)
        raise RunError(f"{what} needs {gib(needed)} of memory; {place} has {gib(free)} free")


@contextmanager
def enough(device: torch.device, advice: str) -> Iterator[None]:
    """Within, what takes more memory than the device has raises RunError. `advice` ends the sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"{device} has too little memory: {' '.join(str(error).split())}; {advice}") from None


def gib(count: int) -> str:
    """`1610612736` → `1.5 GiB`."""
    return f"{count / GIB:.3g} GiB"


def free_memory(device: torch.device) -> int:
    """The bytes that can be had on the device without pushing anything out."""
    if device.type != "cpu":
        # what torch has kept of tensors that are gone it gives to the next
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return min([_available(), *map(_left, _groups())])


def release() -> None:
    """Gives memory that was freed back to the system, which glibc does by itself only at the heap's end."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def keep() -> None:
    """Has glibc keep what is freed for what is asked for next, up to `KEPT` bytes.

    By itself it gives the heap's end back as soon as some megabytes are free there, which is after every
    step: one of 48 rows then took ten thousand page faults, a fifth of its time. It is for the whole process.
    """
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(M_MMAP_THRESHOLD, LARGEST)
        set_option(M_TRIM_THRESHOLD, KEPT)


def _available() -> int:
    """Of the whole machine: what Linux could give at once, elsewhere all there is."""
    for line in _lines(PROC / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _groups() -> Iterator[Path]:
    """The control groups that this process is in, in version 1 and 2, and those around them."""
    for line in _lines(PROC / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = CGROUPS / controllers
            group = root / path.strip("/")
            yield from (group, *(parent for parent in group.parents if parent.is_relative_to(root)))


def _left(group: Path) -> int:
    """What a control group may still take; its cached files count as free."""
    for limit, usage in LIMITS:
        most, held = _number(group / limit), _number(group / usage)
        if most is not None and held is not None:
            cached = (line.split() for line in _lines(group / "memory.stat"))
            files = sum(int(size) for name, size in cached if name in ("active_file", "inactive_file"))
            return max(0, most - held + files)
    return 1 << 63


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file, or it says "max"."""
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
