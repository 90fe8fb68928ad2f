"""Count the kernels that Triton compiles for an engine, and warn about compiles after warm-up.

Triton calls one process-wide hook for each kernel that a first launch compiles or loads from the disk cache.
Several engines share the hook as a linked list; a compile counts for the engine whose step the thread runs.
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
    """Compile counts of one engine, from its construction until it is garbage-collected.

    count: kernels compiled or loaded within `attribute_to_this_thread`. late: those after `seal`, each also
    logged as a warning.
    """

    def __init__(self) -> None:
        self.count, self.late = 0, 0
        self._is_warmup = True
        self._thread: int | None = None
        _install_hook(self._on_compile)
        weakref.finalize(self, _remove_hooks)

    @contextmanager
    def attribute_to_this_thread(self) -> Iterator[None]:
        """Count compiles of the calling thread for this engine, one thread at a time."""
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    def seal(self) -> None:
        """End the warm-up: later compiles count as late, since requests wait for them."""
        self._is_warmup = False

    def _on_compile(self, kernel: str) -> None:
        if self._thread != threading.get_ident():
            return
        self.count += 1
        if not self._is_warmup:
            self.late += 1
            LOG.warning("kernel %s was compiled or loaded after warm-up; requests waited for it", kernel)


class _Hook:
    """Hook that Triton calls: notifies its engine while that is alive, then the previous hook."""

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
    """Remove the hooks of dead engines from the head of the list; one below a live engine's hook stays."""
    owner, name = _hook_owner()
    while isinstance(hook := getattr(owner, name), _Hook) and not hook.callback_ref():
        setattr(owner, name, hook.previous)


def _hook_owner() -> tuple[Any, str]:
    """The object and attribute name of the post-compile hook; in older Triton versions on `JITFunction`."""
    knobs, name = getattr(triton, "knobs", None), "jit_post_compile_hook"
    if knobs is not None and hasattr(knobs.runtime, name):
        return knobs.runtime, name
    return JITFunction, "compiled_hook"
