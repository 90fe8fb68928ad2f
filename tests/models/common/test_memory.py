"""Free memory from /proc and cgroup files, and the error for allocations that do not fit."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch
from trimtab.kernels.common.errors import RunError
from trimtab.models.common import memory

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
GIB = 1024**3


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB available and no cgroups; /proc and /sys/fs/cgroup are temporary folders."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "groups").mkdir()
    monkeypatch.setattr(memory, "PROC_ROOT", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path / "groups")
    (tmp_path / "proc" / "meminfo").write_text(
        f"MemTotal: {9 * 2**20} kB\nMemFree: 77 kB\nMemAvailable: {8 * 2**20} kB\n"
    )
    return tmp_path


def join_cgroup(machine: Path, path: str, line: str, **files: str) -> None:
    """Add the process to a cgroup with these files."""
    folder = machine / "groups" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_in_bytes", ".in_bytes", 0).replace("__", ".")).write_text(text)
    with (machine / "proc" / "self" / "cgroup").open("a") as file:
        file.write(line + "\n")


def test_available_memory_counts_as_free(machine: Path) -> None:
    assert memory.free_memory(CPU) == 8 * GIB


def test_a_cgroup_limits_free_memory_and_its_page_cache_is_free(machine: Path) -> None:
    stat = f"anon 5\ninactive_file {GIB}\nactive_file {GIB}\nfile_mapped 9\n"
    join_cgroup(
        machine, "box", "0::/box", memory__max=f"{4 * GIB}\n", memory__current=f"{3 * GIB}", memory__stat=stat
    )
    assert memory.free_memory(CPU) == 3 * GIB


def test_a_parent_cgroup_limits_too(machine: Path) -> None:
    join_cgroup(machine, "", "0::/outer/inner", memory__max=str(2 * GIB), memory__current="0")
    join_cgroup(machine, "outer", "1:name=systemd:/", memory__max=str(GIB), memory__current="0")
    assert memory.free_memory(CPU) == GIB


def test_version_1_cgroups_count(machine: Path) -> None:
    files = {"memory__limit_in_bytes": str(3 * GIB), "memory__usage_in_bytes": str(5 * GIB)}
    join_cgroup(machine, "memory/box", "4:memory:/box", **files)
    assert memory.free_memory(CPU) == 0


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_a_cgroup_without_a_limit_does_not_reduce_free_memory(machine: Path, limit: str) -> None:
    join_cgroup(machine, "box", "0::/box", memory__max=limit, memory__current="5")
    assert memory.free_memory(CPU) == 8 * GIB


def test_without_proc_the_total_memory_counts(machine: Path) -> None:
    (machine / "proc" / "meminfo").unlink()
    assert memory.free_memory(CPU) > 2**28


def test_a_model_that_does_not_fit_is_refused_with_both_numbers(machine: Path) -> None:
    memory.require_free(8 * GIB, "llama", CPU)
    message = "llama needs 131 GiB of memory; this machine has 8 GiB free"
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        memory.require_free(int(131.4 * GIB), "llama", CPU)
