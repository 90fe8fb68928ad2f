"""The JSON files of a model folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..kernels.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no file. Raises InputError when it holds anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 text ({error.reason}), which JSON must be") from error
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"{str(path)!r} is not valid JSON ({error}); fetch the model folder again"
        ) from error
    except RecursionError:
        raise InputError(f"{str(path)!r} is nested too deep for JSON that a person wrote") from None
    if not isinstance(found, dict):
        raise InputError(f"{str(path)!r} holds a JSON {type(found).__name__}; it must be an object")
    return found
