"""Read the JSON files of a model folder."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

MAX_FILE_BYTES = 1 << 27
"""No file that describes a model is near this; one that is would be read into memory, many times over."""


def require_file(path: Path) -> Path:
    """The path itself. Raises InputError for what must not be opened: a folder, a pipe, a link to nothing."""
    if not os.path.isfile(path):
        raise InputError(f"{str(path)!r} is not a regular file, nor a link to one")
    return path


def require_small_file(path: Path) -> Path:
    """The path itself. Raises InputError for what must not be read whole: no regular file, or a huge one."""
    if (size := require_file(path).stat().st_size) > MAX_FILE_BYTES:
        raise InputError(f"{str(path)!r} has {size} bytes; such a file has at most {MAX_FILE_BYTES}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no file. Raises InputError when it holds anything else."""
    if not os.path.lexists(path):
        return {}
    try:
        text = require_small_file(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 text ({error.reason}), which JSON must be") from error
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{str(path)!r} is not valid JSON ({error}); fetch the model folder again"
        ) from error
    except RecursionError:
        raise InputError(f"{str(path)!r} is nested too deep for JSON that a person wrote") from None
    if not isinstance(data, dict):
        raise InputError(f"{str(path)!r} holds a JSON {type(data).__name__}; it must be an object")
    return data
