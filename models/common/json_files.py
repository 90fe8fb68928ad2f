"""Read the JSON files of a model folder."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

MAX_FILE_BYTES = 1 << 27
"""Maximum size of a JSON or tokenizer file; parsing takes several times this memory."""


def require_file(path: Path) -> Path:
    """Return the path. Raises InputError unless it is a regular file: no folder, pipe or broken link."""
    if not os.path.isfile(path):
        raise InputError(f"{str(path)!r} is not a regular file or a link to one")
    return path


def require_small_file(path: Path) -> Path:
    """Return the path. Raises InputError unless it is a regular file of at most MAX_FILE_BYTES bytes."""
    if (size := require_file(path).stat().st_size) > MAX_FILE_BYTES:
        raise InputError(f"{str(path)!r} has {size} bytes; the maximum is {MAX_FILE_BYTES}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file; {} if the file does not exist. Raises InputError for other content."""
    if not os.path.lexists(path):
        return {}
    try:
        text = require_small_file(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not valid UTF-8 ({error.reason}); JSON must be UTF-8") from error
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{str(path)!r} is not valid JSON ({error}); fetch the model folder again"
        ) from error
    except RecursionError:
        raise InputError(f"{str(path)!r} is JSON that is nested too deeply") from None
    if not isinstance(data, dict):
        raise InputError(f"{str(path)!r} contains a JSON {type(data).__name__}; it must be an object")
    return data
