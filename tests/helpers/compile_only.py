"""Fake Triton driver that compiles kernels and launches none, for machines without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from trimtab.kernels.specs.aot_compile import TARGETS
from triton.runtime import driver
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    import pytest


def compile_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Triton compile for an H100 until the end of the test, without launching.

    The device object is new, so that no kernel is cached for it.
    """
    current_device = object()
    fake_driver = SimpleNamespace(
        get_current_device=lambda: current_device,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: TARGETS["sm_90"],
    )
    launch = JITFunction.run

    def compile_kernel(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch(kernel, *args, grid=grid, warmup=True, **{"enable_fp_fusion": True, **kwargs})

    monkeypatch.setattr(driver, "_active", fake_driver)
    monkeypatch.setattr(JITFunction, "run", compile_kernel)
