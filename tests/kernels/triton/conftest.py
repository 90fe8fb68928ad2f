"""Fixtures for tests that launch Triton kernels: on a GPU, in Triton's interpreter, or emulated.

Otherwise these tests are not collected. `tools/test` runs them in one process with TRITON_INTERPRET=1, which
must be set before Triton is imported, and in another with `--emulate`.
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
    """With --emulate, compile every launch to PTX and execute it with numpy."""
    arch = request.config.getoption("--emulate")
    if not arch:
        yield
        return
    # kernels imported after TRITON_INTERPRET is set would be interpreted
    from trimtab.kernels.triton import backend, unrolled_loop  # noqa: F401, PLC0415

    from ...emulator.launch import emulate  # noqa: PLC0415

    with pytest.MonkeyPatch.context() as monkeypatch, emulate(arch):
        monkeypatch.setenv(
            "TRITON_INTERPRET", "1"
        )  # the engine checks it before it uses Triton without a GPU
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised tensors with NaN, integer tensors with their maximum."""
    # on a GPU some operations have no deterministic version, hence warn_only
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make interpreted `tl.dot` sum like a tensor core: the same order for all rows, another for each shape.

    In numpy's BLAS the rounding of a row also depends on its position in the tile.
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
