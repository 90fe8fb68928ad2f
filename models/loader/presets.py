"""Configs of common models by name, from their published config.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ModelConfig
from ..registry import ARCHITECTURES
from .resolve import resolve_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


PRESETS: dict[str, Mapping[str, Any]] = {
    name: preset for family in ARCHITECTURES for name, preset in family.presets.items()
}


def resolve_config(
    model: str, progress: Callable[[int, int], None] | None = None, dtype: str = "auto"
) -> tuple[ModelConfig, Path | None]:
    """Return a model's config and folder; the folder is None for a name in PRESETS.

    An existing folder takes precedence over a preset; a .gguf file is converted to `dtype`. Raises as
    `resolve_folder` when the model does not exist.
    """
    if model in PRESETS and not Path(model).is_dir():
        return ModelConfig.from_dict(PRESETS[model]), None
    folder = resolve_folder(model, progress, dtype)
    return ModelConfig.from_folder(folder), folder
