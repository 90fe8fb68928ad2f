"""Ray settings of the command line."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from trimtab.tools.ray.config import RayConfig

from ..conftest import CommandResult


@pytest.mark.parametrize(("replicas", "bounds"), [("1", (1, 1)), ("3", (3, 3)), ("1:4", (1, 4))])
def test_replicas_is_a_number_or_a_range(replicas: str, bounds: tuple[int, int]) -> None:
    config = RayConfig(ray=True, replicas=replicas)
    assert (config.min_replicas, config.max_replicas) == bounds


@pytest.mark.parametrize("replicas", ["0", "x", "4:1", "1:", ":2", "-1", "1:2:3", "1.5"])
def test_invalid_replicas_are_refused(run: Callable[..., CommandResult], replicas: str) -> None:
    right = "it must be an integer ≥ 1, or a range such as 1:4"
    refused = run("serve", "--ray", "--replicas", replicas)
    assert refused == CommandResult(2, "", f"trimtab: replicas is {replicas!r}; {right}\n")


def test_ray_settings_need_the_ray_flag(run: Callable[..., CommandResult]) -> None:
    refused = run("serve", "--replicas", "2")
    assert refused == CommandResult(2, "", "trimtab: replicas is '2', which needs --ray\n")
    refused = run("generate", "x", "--replica-cpus", "-1")
    assert (refused.status, "replica_cpus is -1.0; it must be a number ≥ 0" in refused.stderr) == (2, True)


def test_a_single_prompt_is_refused_with_ray(run: Callable[..., CommandResult]) -> None:
    assert "--ray requires --input and --output" in run("generate", "x", "--ray").stderr


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_extra_is_named(run: Callable[..., CommandResult], tmp_path: Path) -> None:
    says = CommandResult(2, "", "trimtab: --ray needs the ray extra: pip install 'trimtab[ray]'\n")
    assert run("serve", "--ray") == says
    assert run("generate", "--ray", "--input", str(tmp_path), "--output", str(tmp_path / "out")) == says
