"""Query free device memory and fail early on allocations that do not fit."""

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
"""Free bytes kept at the end of the heap, and the largest heap allocation; 32 MiB is glibc's maximum."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameter numbers of mallopt, as in malloc.h."""
PROC_ROOT, CGROUP_ROOT = Path("/proc"), Path("/sys/fs/cgroup")
CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""Limit and usage files of a cgroup, in version 2 and version 1."""


def require_free(num_bytes: int, subject: str, device: torch.device) -> None:
    """Raise RunError when `num_bytes` bytes are not free on the device. `subject` begins the message."""
    free_bytes = free_memory(device)
    if num_bytes > free_bytes:
        device_name = "this machine" if device.type == "cpu" else str(device)
        raise RunError(
            f"{subject} needs {format_gib(num_bytes)} of memory; "
            f"{device_name} has {format_gib(free_bytes)} free"
        )


@contextmanager
def oom_as_error(device: torch.device, advice: str) -> Iterator[None]:
    """Convert out-of-memory errors of the block to RunError. `advice` ends the message."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"{device} is out of memory: {' '.join(str(error).split())}; {advice}") from None


def format_gib(num_bytes: int) -> str:
    """`1610612736` → `1.5 GiB`."""
    return f"{num_bytes / GIB:.3g} GiB"


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device without evicting anything."""
    if device.type != "cpu":
        # torch caches the memory of freed tensors and reuses it for new ones
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min([_available_ram(), *map(_cgroup_free, _iter_cgroups())])


def trim_malloc() -> None:
    """Return freed memory to the system, which glibc does automatically only at the end of the heap."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def tune_malloc() -> None:
    """Make glibc keep up to TRIM_THRESHOLD freed bytes for reuse, in the entire process.

    By default glibc returns the end of the heap to the system once a few megabytes are free there, which is
    after every step: a step of 48 rows then took ten thousand page faults, a fifth of its time.
    """
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        set_option(M_TRIM_THRESHOLD, TRIM_THRESHOLD)


def _available_ram() -> int:
    """Available RAM of the machine on Linux, total RAM elsewhere."""
    for line in _read_lines(PROC_ROOT / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _iter_cgroups() -> Iterator[Path]:
    """The memory cgroups of this process, version 1 and 2, and their parents."""
    for line in _read_lines(PROC_ROOT / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = CGROUP_ROOT / controllers
            group = root / path.strip("/")
            yield from (group, *(parent for parent in group.parents if parent.is_relative_to(root)))


def _cgroup_free(cgroup: Path) -> int:
    """Bytes that a cgroup may still allocate; its file cache counts as free."""
    for limit_file, usage_file in CGROUP_FILES:
        limit, usage = _read_int(cgroup / limit_file), _read_int(cgroup / usage_file)
        if limit is not None and usage is not None:
            stats = (line.split() for line in _read_lines(cgroup / "memory.stat"))
            file_cache = sum(int(size) for name, size in stats if name in ("active_file", "inactive_file"))
            return max(0, limit - usage + file_cache)
    return 1 << 63


def _read_int(path: Path) -> int | None:
    """The integer in a file; None if the file is missing or contains "max"."""
    text = "".join(_read_lines(path))
    return int(text) if text.isdigit() else None


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
