"""Count what Triton compiles for an engine, and warn about compiles after the warm-up.

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


class JITMonitor:
    """Counts of one engine, from when it is made until it is gone.

    count: kernels made ready within `attribute_to_this_thread`. late: how many of them after `seal`, each of
    which is also logged as a warning.
    """

    def __init__(self) -> None:
        self.count, self.late = 0, 0
        self._is_warmup = True
        self._thread: int | None = None
        _install_hook(self._on_compile)
        weakref.finalize(self, _remove_hooks)

    @contextmanager
    def attribute_to_this_thread(self) -> Iterator[None]:
        """What this thread compiles within is this engine's; one thread at a time may be within."""
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    def seal(self) -> None:
        """From now on requests wait for a compile."""
        self._is_warmup = False

    def _on_compile(self, kernel: str) -> None:
        if self._thread != threading.get_ident():
            return
        self.count += 1
        if not self._is_warmup:
            self.late += 1
            LOG.warning("the kernel %s was made ready after the start, and requests waited for it", kernel)


class _Hook:
    """What Triton calls: tells an engine of a kernel while that lives, and whoever was told before."""

    def __init__(self, callback: Callable[[str], None], previous: Callable[..., Any] | None) -> None:
        self.callback_ref, self.previous = weakref.WeakMethod(callback), previous

    def __call__(self, **event: Any) -> Any:
        if callback := self.callback_ref():
            callback(event["fn"].name)
        return self.previous(**event) if self.previous else None


def _install_hook(callback: Callable[[str], None]) -> None:
    owner, name = _hook_owner()
    setattr(owner, name, _Hook(callback, getattr(owner, name)))


def _remove_hooks() -> None:
    """Takes off the links of engines that are gone; one below another's waits for that."""
    owner, name = _hook_owner()
    while isinstance(link := getattr(owner, name), _Hook) and not link.callback_ref():
        setattr(owner, name, link.previous)


def _hook_owner() -> tuple[Any, str]:
    """The object whose attribute Triton calls after a compile, and its name: of old the class of kernels."""
    knobs, name = getattr(triton, "knobs", None), "jit_post_compile_hook"
    if knobs is not None and hasattr(knobs.runtime, name):
        return knobs.runtime, name
    return JITFunction, "compiled_hook"
