"""`JITMonitor` counts Triton's compiles, each for the engine that waits for it."""

from __future__ import annotations

import gc
import logging
import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

from trimtab.kernels.triton.jit_monitor import JITMonitor, _hook_owner
from trimtab.kernels.triton.swiglu import swiglu

from ...helpers.compile_only import compile_only

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def restore_hook() -> Iterator[None]:
    """Check that no hook is installed in Triton before and after each test."""
    gc.collect()
    owner, name = _hook_owner()
    assert getattr(owner, name) is None
    yield
    gc.collect()
    assert getattr(owner, name) is None


def notify_compiled(name: str) -> Any:
    """Call the installed hook as Triton does after compiling a kernel."""
    owner, hook = _hook_owner()
    return getattr(owner, hook)(key="", repr="", fn=SimpleNamespace(name=name), compile={})


def test_a_compile_after_seal_is_late_and_logs_a_warning_with_the_kernel_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiles = JITMonitor()
    with caplog.at_level(logging.INFO, "trimtab.engine"):
        with compiles.attribute_to_this_thread():
            notify_compiled("mix_kernel")
        assert (compiles.count, compiles.late, caplog.records) == (1, 0, [])
        compiles.seal()
        with compiles.attribute_to_this_thread():
            notify_compiled("score_kernel")
    assert (compiles.count, compiles.late) == (2, 1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "score_kernel" in record.getMessage()


def test_two_engines_count_their_compiles_separately() -> None:
    one, other = JITMonitor(), JITMonitor()
    one.seal()
    with other.attribute_to_this_thread():
        notify_compiled("mix_kernel")
        thread = threading.Thread(target=notify_compiled, args=("of no engine",))
        thread.start()
        thread.join()
    with one.attribute_to_this_thread():
        notify_compiled("score_kernel")
    notify_compiled("of no engine")
    assert (one.count, one.late) == (other.count, 1) == (1, 1)


@pytest.mark.parametrize("first", [True, False])
def test_a_deleted_engine_is_freed_and_another_still_counts(first: bool) -> None:
    engines = [JITMonitor(), JITMonitor()]
    del engines[0 if first else 1]
    gc.collect()
    with engines[0].attribute_to_this_thread():
        notify_compiled("mix_kernel")
    assert engines[0].count == 1


def test_an_earlier_jit_hook_is_still_called() -> None:
    owner, name = _hook_owner()
    names = list[str]()
    setattr(owner, name, lambda **what: names.append(what["fn"].name) or True)
    try:
        compiles = JITMonitor()
        assert notify_compiled("mix_kernel") is True
        del compiles
        gc.collect()
        notify_compiled("score_kernel")
    finally:
        setattr(owner, name, None)
    assert names == ["mix_kernel", "score_kernel"]


def test_triton_reports_each_compile_exactly_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_only(monkeypatch)
    compiles = JITMonitor()
    x = torch.zeros(3, 46)
    for dtype, count in ((torch.float32, 1), (torch.float32, 1), (torch.float64, 2)):
        with compiles.attribute_to_this_thread():
            swiglu(x.to(dtype))
        assert compiles.count == count
