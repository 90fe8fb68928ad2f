"""Properties shared by Engine and AsyncEngine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import EngineConfig
from .core.engine_core import EngineCore
from .utils.fields import reject_unknown_fields

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from typing_extensions import Self

    from ..models.chat.prompts import BranchPrompt
    from ..models.config import ModelConfig
    from ..models.tokenizer.tokenizer import Tokenizer
    from .core.stats import Stats
    from .request import Request


class BaseEngine:
    """Constructors and read-only properties of an engine."""

    def __init__(self, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> None:
        self._core = EngineCore(config, progress)

    @classmethod
    def from_pretrained(
        cls, model: str = "demo", progress: Callable[[int, int], None] | None = None, **fields: Any
    ) -> Self:
        """Make an engine for "demo", a model folder or a .gguf file, with any other field of EngineConfig."""
        reject_unknown_fields(EngineConfig, fields)
        return cls(EngineConfig(model=model, **fields), progress)

    @property
    def config(self) -> EngineConfig:
        """The configuration that the engine was made with."""
        return self._core.config

    @property
    def model_config(self) -> ModelConfig:
        """The architecture parameters of the model."""
        return self._core.model_config

    @property
    def device(self) -> torch.device:
        """The device that this process decodes on."""
        return self._core.runner.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the KV cache."""
        return self._core.runner.model.dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._core.tokenizer

    @property
    def stats(self) -> Stats:
        """Counters of the engine."""
        return self._core.stats

    def render(self, request: Request) -> list[BranchPrompt]:
        """The prompts of a request's branches, as they would be decoded.

        Raises InputError when the request is invalid or exceeds the engine's limits.
        """
        return self._core.create_groups(request)[0].prompts
