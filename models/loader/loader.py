"""Resolve the name of a model, and load its config, tokenizer, template and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError
from ...kernels.ops import TORCH_OPS, Ops
from ..chat.template import ChatTemplate
from ..decoder import Decoder, param_shapes
from ..tensor_parallel import ShardedWeights
from ..tokenizer.tokenizer import Tokenizer
from ..weights.dummy import DummyTokenizer, DummyWeights
from ..weights.safetensors import Checkpoint
from .presets import resolve_config

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..config import ModelConfig
    from ..decoder import Progress
    from ..tensor_parallel import TPSharding
    from ..weights.source import WeightSource

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class ModelBundle:
    """A model without its weights. `checkpoint` is the folder of the weights, None for random ones."""

    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    checkpoint: Path | None

    def load_model(
        self,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        ops: Ops = TORCH_OPS,
        sharding: TPSharding | None = None,
    ) -> Decoder:
        """Load the model with kernels `ops`; with `sharding`, this rank's shard.

        Raises InputError when the weights do not match the config, RunError when the device lacks the memory.
        """
        full_shapes = param_shapes(self.config)
        weights: WeightSource = (
            DummyWeights(full_shapes, dtype, device)
            if self.checkpoint is None
            else Checkpoint(self.checkpoint)
        )
        if sharding is None:
            return Decoder(self.config, weights, dtype, device, ops, progress)
        local_weights = ShardedWeights(weights, sharding, full_shapes)
        return Decoder(sharding.local_config, local_weights, dtype, device, ops, progress, sharding)


def load_bundle(
    model: str,
    load_format: str = "auto",
    chat_template: str | None = None,
    progress: Progress | None = None,
    dtype: str = "auto",
) -> ModelBundle:
    """Resolve a model name, folder or .gguf file. load_format "dummy" needs neither weights nor tokenizer.

    `chat_template` replaces the model's template; a .gguf file is converted to `dtype`. Raises InputError
    when the model does not exist, or its embedding has fewer rows than the tokenizer has ids.
    """
    config, folder = resolve_config(model, progress, dtype)
    if config.labels:
        raise InputError(
            f"model is {model!r}, a {config.architecture}, which cannot generate text; expected a causal "
            "language model"
        )
    dummy = load_format == "dummy"
    if folder is None and not dummy:
        raise InputError(
            f"model is {model!r}, a config without weights; use a checkpoint's folder or load_format 'dummy'"
        )
    if folder is None or (dummy and not any((folder / name).is_file() for name in TOKENIZER_FILES)):
        if chat_template is not None:
            raise InputError(f"chat_template needs a tokenizer, and {model!r} has none")
        return ModelBundle(config, Tokenizer(DummyTokenizer(config.vocab_size)), None, None)
    bundle = bundle_from_folder(config, folder, chat_template)
    return replace(bundle, checkpoint=None) if dummy else bundle


def bundle_from_folder(config: ModelConfig, folder: Path, chat_template: str | None = None) -> ModelBundle:
    """Load tokenizer and chat template of a folder with this config. Raises InputError as `load_bundle`."""
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.check_vocab_size(config.vocab_size)
    return ModelBundle(config, tokenizer, ChatTemplate.from_folder(folder, tokenizer, chat_template), folder)
