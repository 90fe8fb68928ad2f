"""Ranges for torch's profiler, named after the stages of a step; without a profiler they cost 0.2 µs each."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from torch._C._autograd import _profiler_enabled
from torch.autograd.profiler import record_function

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

RANGE_PREFIX = "trimtab "
"""Prefix of the names of the ranges."""
_NO_RANGE = nullcontext()


def stage(name: str) -> AbstractContextManager[object]:
    """The range "trimtab NAME" if a profiler runs; `record_function` alone takes microseconds without one."""
    return record_function(RANGE_PREFIX + name) if _profiler_enabled() else _NO_RANGE


def in_stage(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator that runs a function within `stage(name)`."""

    def decorate(fn: Callable[P, T]) -> Callable[P, T]:
        @wraps(fn)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
            with stage(name):
                return fn(*args, **kwargs)

        return wrapper

    return decorate
