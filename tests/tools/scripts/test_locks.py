"""tools/scripts/locks: what the scripts install, by its hashes."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOOLS = Path(__file__).parents[3] / "tools"
LOCKS = sorted((TOOLS / "scripts" / "locks").glob("*.txt"))
FREE = {"torch", "triton", "trimtab"}
BY_HAND = {"ray"}
"""What no script installs."""
OF_TORCH = re.compile("nvidia-|cuda-")
"""What a build of torch for CUDA brings."""
both = pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)


def entries(lock: Path) -> list[tuple[Requirement, list[str]]]:
    """Each requirement of a lock, and its hashes."""
    parts = re.split(r"\n(?=\S)", lock.read_text().strip())
    return [(Requirement(part.split(" \\\n")[0]), re.findall(r"--hash=(\S+)", part)) for part in parts]


def pins(lock: Path) -> dict[str, set[str]]:
    """The versions that this Python and system get."""
    here = [need for need, _ in entries(lock) if need.marker is None or need.marker.evaluate()]
    return {canonicalize_name(need.name): {str(need.specifier)} for need in here}


def needed(name: str, extras: frozenset[str], found: set[str]) -> set[str]:
    """All that an installed package asks for here, and what that asks for."""
    for text in metadata.requires(name) or ():
        need = Requirement(text)
        marks = [{"extra": extra} for extra in extras or ("",)]
        other = canonicalize_name(need.name)
        if (need.marker and not any(map(need.marker.evaluate, marks))) or other in found:
            continue
        found.add(other)
        if not OF_TORCH.match(other):
            needed(other, frozenset(need.extras), found)
    return found


def test_there_is_a_lock_for_what_each_script_installs() -> None:
    asked = {re.search(r"^source tools/scripts/environment (\S+)$", (TOOLS / name).read_text(), re.MULTILINE)
             for name in ("demo", "test")}  # fmt: skip
    assert {found[1].replace(",", "-") for found in asked if found} == {lock.stem for lock in LOCKS}


@both
def test_a_lock_has_one_version_and_hashes_of_all_and_names_no_host(lock: Path) -> None:
    for need, hashes in entries(lock):
        assert re.fullmatch(r"==[\w.!+]+", str(need.specifier)), need
        assert hashes, need
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes)
    assert not re.search(r"://|@|--(?!hash=)", lock.read_text())


@both
def test_a_lock_has_all_that_is_needed_here_but_torch_and_triton(lock: Path) -> None:
    wanted = needed("trimtab", frozenset(lock.stem.split("-")), {"setuptools"}) - FREE
    assert {name for name in wanted if not OF_TORCH.match(name)} <= pins(lock).keys()
    assert not FREE & pins(lock).keys()


def test_the_locks_keep_to_the_constraints() -> None:
    lines = [line for line in (TOOLS / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    tests, demo = (
        pins(TOOLS / "scripts" / "locks" / name) for name in ("dev-evaluate-gguf-serve.txt", "gguf.txt")
    )
    for need in map(Requirement, lines):
        name = canonicalize_name(need.name)
        if name not in FREE | BY_HAND and (need.marker is None or need.marker.evaluate()):
            assert tests[name] == {str(need.specifier)}
    assert demo.items() <= tests.items(), "both have the same"
