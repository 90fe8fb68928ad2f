"""Resolve a model name to a local folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ...kernels.common.cache_dir import cache_dir
from ...kernels.common.errors import InputError
from ..gguf.convert import convert
from .download import ensure, pull_demo

if TYPE_CHECKING:
    from ..gguf.convert import Progress

AUTO_DTYPE = "bfloat16"
"""Default dtype of converted .gguf files: the one most models are published in."""


def resolve_folder(model: str, progress: Progress | None = None, dtype: str = "auto") -> Path:
    """The folder of `model`: 'demo' (downloaded once), a folder, or a .gguf file.

    A .gguf file is converted to `dtype` and cached per dtype. Raises InputError for any other `model`,
    RunError when the download or conversion fails.
    """
    if model == "demo":
        return pull_demo(progress)
    name = os.path.expanduser(model)
    path = Path(name)
    if os.path.isdir(name):
        return path
    if path.suffix.lower() == ".gguf" and os.path.isfile(name):
        dtype = AUTO_DTYPE if dtype == "auto" else dtype
        folder = _conversion_folder(path, dtype)
        return ensure(folder, lambda: convert(path, folder, dtype, progress))
    raise InputError(
        f"model is {model!r}; it must be 'demo', a folder with config.json and *.safetensors, or a .gguf file"
    )


def _conversion_folder(path: Path, dtype: str) -> Path:
    """The cache folder of a conversion, keyed by path, size and mtime: a changed file is converted again."""
    stat = path.stat()
    identity = f"{path.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}"
    name = f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    return cache_dir() / (name if dtype == AUTO_DTYPE else f"{name}-{dtype}")
