"""Convert exceptions of other libraries to InputError."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError, error_text

if TYPE_CHECKING:
    from collections.abc import Iterator

RUST_PANIC = "PanicException"
"""What a panic of Rust is in Python: no Exception, and of a type that cannot be imported."""


@contextmanager
def wrap_errors(message: str) -> Iterator[None]:
    """Within, whatever a library raises is an InputError: the sentence, and in brackets what was raised."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != RUST_PANIC:
            raise
        raise InputError(f"{message} ({error_text(error)})") from error
