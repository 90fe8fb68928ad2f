"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def soon(holds: Callable[[], object], seconds: float = 30) -> None:
    """Waits until it holds. Fails when it does not within so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"it does not hold after {seconds:g} s"
        time.sleep(0.01)
