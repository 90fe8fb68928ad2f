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
TRIM_THRESHOLD, MMAP_THRESHOLD = 256 << 20, 32 << 20
"""What the heap keeps at its end, and the largest block that comes from it: glibc takes no larger number."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""malloc.h's names of these two."""
PROC_ROOT, CGROUP_ROOT = Path("/proc"), Path("/sys/fs/cgroup")
CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""A control group's files in version 2 and 1: the most it may hold, and what it holds."""


def require_free(num_bytes: int, subject: str, device: torch.device) -> None:
    """Raises RunError when `num_bytes` bytes are not free on the device. `subject` begins the sentence."""
    free_bytes = free_memory(device)
    if num_bytes > free_bytes:
        owner = "this machine" if device.type == "cpu" else str(device)
        raise RunError(
            f"{subject} needs {format_gib(num_bytes)} of memory; {owner} has {format_gib(free_bytes)} free"
        )


@contextmanager
def oom_as_error(device: torch.device, advice: str) -> Iterator[None]:
    """Within, what takes more memory than the device has raises RunError. `advice` ends the sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"{device} has too little memory: {' '.join(str(error).split())}; {advice}") from None


def format_gib(num_bytes: int) -> str:
    """`1610612736` → `1.5 GiB`."""
    return f"{num_bytes / GIB:.3g} GiB"


def free_memory(device: torch.device) -> int:
    """The bytes that can be had on the device without pushing anything out."""
    if device.type != "cpu":
        # what torch has kept of tensors that are gone it gives to the next
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min([_available_ram(), *map(_cgroup_free, _iter_cgroups())])


def trim_malloc() -> None:
    """Gives memory that was freed back to the system, which glibc does by itself only at the heap's end."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def tune_malloc() -> None:
    """Has glibc keep what is freed for what is asked for next, up to `KEPT` bytes.

    By itself it gives the heap's end back as soon as some megabytes are free there, which is after every
    step: one of 48 rows then took ten thousand page faults, a fifth of its time. It is for the whole process.
    """
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        set_option(M_TRIM_THRESHOLD, TRIM_THRESHOLD)


def _available_ram() -> int:
    """Of the whole machine: what Linux could give at once, elsewhere all there is."""
    for line in _read_lines(PROC_ROOT / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _iter_cgroups() -> Iterator[Path]:
    """The control groups that this process is in, in version 1 and 2, and those around them."""
    for line in _read_lines(PROC_ROOT / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = CGROUP_ROOT / controllers
            group = root / path.strip("/")
            yield from (group, *(parent for parent in group.parents if parent.is_relative_to(root)))


def _cgroup_free(cgroup: Path) -> int:
    """What a control group may still take; its cached files count as free."""
    for limit_file, usage_file in CGROUP_FILES:
        limit, usage = _read_int(cgroup / limit_file), _read_int(cgroup / usage_file)
        if limit is not None and usage is not None:
            stats = (line.split() for line in _read_lines(cgroup / "memory.stat"))
            file_cache = sum(int(size) for name, size in stats if name in ("active_file", "inactive_file"))
            return max(0, limit - usage + file_cache)
    return 1 << 63


def _read_int(path: Path) -> int | None:
    """The number in a file; None where there is no file, or it says "max"."""
    text = "".join(_read_lines(path))
    return int(text) if text.isdigit() else None


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
