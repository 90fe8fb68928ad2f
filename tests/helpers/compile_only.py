"""What stands in for a GPU where Triton is to compile what is launched, and to launch nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from trimtab.kernels.specs.aot_compile import TARGETS
from triton.runtime import driver
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    import pytest


def compile_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the end of the test Triton sees an H100, which nothing reaches, and which it has not seen before."""
    number = object()
    gpu = SimpleNamespace(
        get_current_device=lambda: number,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: TARGETS["sm_90"],
    )
    launch = JITFunction.run

    def made_ready(function: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        launch(function, *args, grid=grid, warmup=True, **{"enable_fp_fusion": True, **more})

    monkeypatch.setattr(driver, "_active", gpu)
    monkeypatch.setattr(JITFunction, "run", made_ready)
