"""Compiles are counted as Triton makes them, each by the engine that waits for it."""

from __future__ import annotations

import gc
import logging
import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("triton", reason="kernels are compiled where there is triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

from trimtab.kernels.triton.jit_monitor import Compiles, _place
from trimtab.kernels.triton.swiglu import swiglu

from ...helpers.compile_only import compile_only

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Each test leaves Triton without a function to call."""
    gc.collect()
    place, name = _place()
    assert getattr(place, name) is None
    yield
    gc.collect()
    assert getattr(place, name) is None


def compiled(name: str) -> Any:
    """Tells whoever is to be told that a kernel was compiled, as Triton does."""
    place, hook = _place()
    return getattr(place, hook)(key="", repr="", fn=SimpleNamespace(name=name), compile={})


def test_a_compile_is_expected_once_and_then_a_warning_that_names_the_kernel(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiles = Compiles()
    with caplog.at_level(logging.INFO, "trimtab.engine"):
        with compiles.by_this_thread():
            compiled("mix_kernel")
        assert (compiles.count, compiles.late, caplog.records) == (1, 0, [])
        compiles.expect_none()
        with compiles.by_this_thread():
            compiled("score_kernel")
    assert (compiles.count, compiles.late) == (2, 1)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "score_kernel" in record.getMessage()


def test_each_of_two_engines_counts_its_own() -> None:
    one, other = Compiles(), Compiles()
    one.expect_none()
    with other.by_this_thread():
        compiled("mix_kernel")
        thread = threading.Thread(target=compiled, args=("of no engine",))
        thread.start()
        thread.join()
    with one.by_this_thread():
        compiled("score_kernel")
    compiled("of no engine")
    assert (one.count, one.late) == (other.count, 1) == (1, 1)


@pytest.mark.parametrize("first", [True, False])
def test_an_engine_that_is_gone_is_not_kept_and_another_still_counts(first: bool) -> None:
    engines = [Compiles(), Compiles()]
    del engines[0 if first else 1]
    gc.collect()
    with engines[0].by_this_thread():
        compiled("mix_kernel")
    assert engines[0].count == 1


def test_whoever_was_told_before_still_is() -> None:
    place, name = _place()
    told = list[str]()
    setattr(place, name, lambda **what: told.append(what["fn"].name) or True)
    try:
        compiles = Compiles()
        assert compiled("mix_kernel") is True
        del compiles
        gc.collect()
        compiled("score_kernel")
    finally:
        setattr(place, name, None)
    assert told == ["mix_kernel", "score_kernel"]


def test_triton_tells_of_what_it_compiles_and_of_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_only(monkeypatch)
    compiles = Compiles()
    x = torch.zeros(3, 46)
    for dtype, count in ((torch.float32, 1), (torch.float32, 1), (torch.float64, 2)):
        with compiles.by_this_thread():
            swiglu(x.to(dtype))
        assert compiles.count == count
