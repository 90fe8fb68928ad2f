"""tools/scripts/locks: the packages that the scripts install, with hashes."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOOLS = Path(__file__).parents[3] / "tools"
LOCKS = sorted((TOOLS / "scripts" / "locks").glob("*.txt"))
UNLOCKED = {"torch", "triton", "trimtab"}
SEPARATELY_INSTALLED = {"ray"}
"""Constrained packages that no script installs."""
TORCH_DEPENDENCIES = re.compile("nvidia-|cuda-")
"""Dependencies of a CUDA build of torch."""
parametrize_locks = pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)


def lock_entries(lock: Path) -> list[tuple[Requirement, list[str]]]:
    """Each requirement of a lock, and its hashes."""
    parts = re.split(r"\n(?=\S)", lock.read_text().strip())
    return [(Requirement(part.split(" \\\n")[0]), re.findall(r"--hash=(\S+)", part)) for part in parts]


def pinned_versions(lock: Path) -> dict[str, set[str]]:
    """The versions for this Python and system."""
    applicable = [need for need, _ in lock_entries(lock) if need.marker is None or need.marker.evaluate()]
    return {canonicalize_name(need.name): {str(need.specifier)} for need in applicable}


def required_packages(name: str, extras: frozenset[str], visited: set[str]) -> set[str]:
    """The transitive dependencies of an installed package on this system."""
    for text in metadata.requires(name) or ():
        need = Requirement(text)
        marks = [{"extra": extra} for extra in extras or ("",)]
        other = canonicalize_name(need.name)
        if (need.marker and not any(map(need.marker.evaluate, marks))) or other in visited:
            continue
        visited.add(other)
        if not TORCH_DEPENDENCIES.match(other):
            required_packages(other, frozenset(need.extras), visited)
    return visited


def test_every_script_environment_has_a_lock() -> None:
    sourced_locks = {re.search(r"^source tools/scripts/environment (\S+)$", (TOOLS / name).read_text(),
    re.MULTILINE)
             for name in ("demo", "test")}  # fmt: skip
    assert {match[1].replace(",", "-") for match in sourced_locks if match} == {lock.stem for lock in LOCKS}


@parametrize_locks
def test_a_lock_pins_each_package_with_hashes_and_has_no_url(lock: Path) -> None:
    for need, hashes in lock_entries(lock):
        assert re.fullmatch(r"==[\w.!+]+", str(need.specifier)), need
        assert hashes, need
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes)
    assert not re.search(r"://|@|--(?!hash=)", lock.read_text())


@parametrize_locks
def test_a_lock_has_all_dependencies_except_torch_and_triton(lock: Path) -> None:
    required = required_packages("trimtab", frozenset(lock.stem.split("-")), {"setuptools"}) - UNLOCKED
    assert {name for name in required if not TORCH_DEPENDENCIES.match(name)} <= pinned_versions(lock).keys()
    assert not UNLOCKED & pinned_versions(lock).keys()


def test_the_locks_satisfy_the_constraints() -> None:
    lines = [line for line in (TOOLS / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    tests, demo = (
        pinned_versions(TOOLS / "scripts" / "locks" / name)
        for name in ("dev-evaluate-gguf-serve.txt", "gguf.txt")
    )
    for need in map(Requirement, lines):
        name = canonicalize_name(need.name)
        if name not in UNLOCKED | SEPARATELY_INSTALLED and (need.marker is None or need.marker.evaluate()):
            assert tests[name] == {str(need.specifier)}
    assert demo.items() <= tests.items(), "both locks have the same versions"
