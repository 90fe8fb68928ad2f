"""These tests launch kernels: on a GPU; interpreted, which Triton is told before it is imported; or emulated.

With none of these they are not collected. `tools/test` runs them in a process with TRITON_INTERPRET=1, and in
one with `--emulate`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return not (torch.cuda.is_available() or interpreted or config.getoption("--emulate")) or None


@pytest.fixture(autouse=True, scope="session")
def _emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """With --emulate what is launched is compiled, and carried out by numpy."""
    arch = request.config.getoption("--emulate")
    if not arch:
        yield
        return
    from ...emulator.launch import emulate  # noqa: PLC0415

    with pytest.MonkeyPatch.context() as monkeypatch, emulate(arch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # an engine asks whether anything can run kernels here
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors are filled with NaN, and those of integers with their largest value."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # a GPU has no such product, nor such a cumsum
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted products sum as a tensor core does: all rows alike, and for each shape in its own order.

    numpy's library rounds a row by its place in a tile, too.
    """
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: PLC0415

    def create_dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        lhs, rhs = a.data, b.data
        (m, k), n = lhs.shape, rhs.shape[1]
        order = np.random.default_rng([m, k, n]).permutation(k)
        acc = np.zeros((m, n), d.data.dtype)
        for i in order:
            acc += lhs[:, i, None] * rhs[i]
        return TensorHandle(acc + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
