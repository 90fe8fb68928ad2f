"""Resolve the name of a model, and load its config, tokenizer, template and weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError
from ...kernels.ops import TORCH_OPS, Ops
from ..chat.template import ChatTemplate
from ..llama import LlamaForCausalLM, param_shapes
from ..tensor_parallel import ShardedWeights
from ..tokenizer.tokenizer import Tokenizer
from ..weights.dummy import DummyTokenizer, DummyWeights
from ..weights.safetensors import Checkpoint
from .presets import resolve_config

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from ..config import ModelConfig
    from ..llama import Progress
    from ..tensor_parallel import TPSharding
    from ..weights.source import WeightSource

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class ModelBundle:
    """A model but for its weights. `checkpoint` is the folder that has them, None for random ones."""

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
    ) -> LlamaForCausalLM:
        """The model with its weights, made of these operations; with `sharding` the part that is held here.

        Raises InputError when the weights do not fit the config, RunError when the device lacks the memory.
        """
        full_shapes = param_shapes(self.config)
        weights: WeightSource = (
            DummyWeights(full_shapes, dtype, device)
            if self.checkpoint is None
            else Checkpoint(self.checkpoint)
        )
        if sharding is None:
            return LlamaForCausalLM(self.config, weights, dtype, device, ops, progress)
        local_weights = ShardedWeights(weights, sharding, full_shapes)
        return LlamaForCausalLM(sharding.local_config, local_weights, dtype, device, ops, progress, sharding)


def load_bundle(
    model: str,
    load_format: str = "auto",
    chat_template: str | None = None,
    progress: Progress | None = None,
    dtype: str = "auto",
) -> ModelBundle:
    """The model of a name, a folder or a file. With load_format "dummy" it needs no weights and no tokenizer.

    `chat_template` is used instead of its own; a .gguf file is converted to `dtype`. Raises InputError when
    there is no such model, or it lacks a row for an id of its tokenizer.
    """
    config, folder = resolve_config(model, progress, dtype)
    if config.labels:
        raise InputError(
            f"model is {model!r}, a {config.architecture}, which scores texts and writes none; give a causal "
            "language model"
        )
    dummy = load_format == "dummy"
    if folder is None and not dummy:
        raise InputError(
            f"model is {model!r}, a shape without weights; give a checkpoint's folder, or load_format 'dummy'"
        )
    if folder is None or (dummy and not any((folder / name).is_file() for name in TOKENIZER_FILES)):
        if chat_template is not None:
            raise InputError(f"chat_template is given, but {model!r} has no tokenizer to read a chat with")
        return ModelBundle(config, Tokenizer(DummyTokenizer(config.vocab_size)), None, None)
    bundle = bundle_from_folder(config, folder, chat_template)
    return replace(bundle, checkpoint=None) if dummy else bundle


def bundle_from_folder(config: ModelConfig, folder: Path, chat_template: str | None = None) -> ModelBundle:
    """The model of a folder whose config is known. Raises InputError as `open_model` does."""
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.check_vocab_size(config.vocab_size)
    return ModelBundle(config, tokenizer, ChatTemplate.from_folder(folder, tokenizer, chat_template), folder)
