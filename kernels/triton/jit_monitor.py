"""What Triton compiles for an engine: before its first request on purpose, after that while everybody waits.

Triton calls one function of the process for each kernel that a first launch made ready, compiled or read from
its cache on disk. Several engines share that function, each in a link of its own; a compile is the engine's
whose step the thread is in.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.runtime.jit import JITFunction

LOG = logging.getLogger("trimtab.engine")


class Compiles:
    """Counts of one engine, from when it is made until it is gone.

    count: kernels made ready within `by_this_thread`. late: how many of them after `expect_none`, each of
    which is also logged as a warning.
    """

    def __init__(self) -> None:
        self.count, self.late = 0, 0
        self._expected = True
        self._thread: int | None = None
        _hook(self._count)
        weakref.finalize(self, _unhook)

    @contextmanager
    def by_this_thread(self) -> Iterator[None]:
        """What this thread compiles within is this engine's; one thread at a time may be within."""
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    def expect_none(self) -> None:
        """From now on requests wait for a compile."""
        self._expected = False

    def _count(self, kernel: str) -> None:
        if self._thread != threading.get_ident():
            return
        self.count += 1
        if not self._expected:
            self.late += 1
            LOG.warning("the kernel %s was made ready after the start, and requests waited for it", kernel)


class _Link:
    """What Triton calls: tells an engine of a kernel while that lives, and whoever was told before."""

    def __init__(self, tell: Callable[[str], None], before: Callable[..., Any] | None) -> None:
        self.told, self.before = weakref.WeakMethod(tell), before

    def __call__(self, **what: Any) -> Any:
        if tell := self.told():
            tell(what["fn"].name)
        return self.before(**what) if self.before else None


def _hook(tell: Callable[[str], None]) -> None:
    place, name = _place()
    setattr(place, name, _Link(tell, getattr(place, name)))


def _unhook() -> None:
    """Takes off the links of engines that are gone; one below another's waits for that."""
    place, name = _place()
    while isinstance(link := getattr(place, name), _Link) and not link.told():
        setattr(place, name, link.before)


def _place() -> tuple[Any, str]:
    """The object whose attribute Triton calls after a compile, and its name: of old the class of kernels."""
    knobs, name = getattr(triton, "knobs", None), "jit_post_compile_hook"
    if knobs is not None and hasattr(knobs.runtime, name):
        return knobs.runtime, name
    return JITFunction, "compiled_hook"
