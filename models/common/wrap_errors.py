"""Convert exceptions of other libraries to InputError."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError, error_text

if TYPE_CHECKING:
    from collections.abc import Iterator

RUST_PANIC = "PanicException"
"""Type name of a Rust panic in Python: not a subclass of Exception, and cannot be imported."""


@contextmanager
def wrap_errors(message: str) -> Iterator[None]:
    """Convert any exception of the block to InputError: `message`, then the original error in parentheses."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != RUST_PANIC:
            raise
        raise InputError(f"{message} ({error_text(error)})") from error
