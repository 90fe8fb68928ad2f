"""Tiny random Llama model folders in the Hugging Face format, with odd sizes; nothing is downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from trimtab.engine.request import Request
from trimtab.engine.sequence.sequence import Branch, SequenceGroup
from trimtab.models.config import ModelConfig
from trimtab.models.decoder import param_shapes

from ..harness import get_block_manager, get_scheduler

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trimtab.engine.engine import Engine
    from trimtab.engine.sequence.output_processor import OutputState

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 300
EMBEDDING_ROWS = 307
"""Rows of the embedding: the last seven have no token."""
WEIGHT_GAINS = {"q_proj": 2.0, "o_proj": 3.0, "down_proj": 3.0}
"""Gains that sharpen attention and outweigh the embedding; without them the model repeats itself."""
CORPUS = [
    "You are a helpful assistant. Your answer should be short, kind and true.",
    "What happens if an earthworm is cut in half? It does not become two worms.",
    "system user assistant naïve café 東京 👩‍👩‍👧‍👦",
] * 4
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinyModel:
    """Sizes and file format of a tiny model. `head_dim` None omits it from config.json."""

    hidden: int = 36
    heads: int = 6
    kv_heads: int = 2
    head_dim: int | None = None
    intermediate: int = 50
    layers: int = 2
    vocab_size: int = EMBEDDING_ROWS
    tied: bool = True
    shards: int = 1
    dtype: torch.dtype = torch.float32
    theta: float = 500.0
    max_length: int = 512
    transformers_version: int = 5
    seed: int = 0

    def config(self) -> dict[str, Any]:
        """config.json in the format of transformers 4 or 5."""
        dtype = str(self.dtype).removeprefix("torch.")
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": self.max_length,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        if self.head_dim is not None:
            config["head_dim"] = self.head_dim
        if self.transformers_version == 4:
            return {**config, "rope_theta": self.theta, "rope_scaling": None, "torch_dtype": dtype}
        rope = {"rope_type": "default", "rope_theta": self.theta}
        return {**config, "rope_parameters": rope, "dtype": dtype}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Random weights, scaled so that every part of the model affects the output."""
        generator = torch.Generator().manual_seed(self.seed)
        tensors = {}
        for name, shape in param_shapes(ModelConfig.from_dict(self.config())).items():
            noise = torch.randn(shape, generator=generator)
            if len(shape) == 1:
                value = 1 + 0.2 * noise
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                value = 0.5 * noise
            else:
                gain = next((g for part, g in WEIGHT_GAINS.items() if part in name), 1.0)
                value = gain * noise / shape[1] ** 0.5
            tensors[name] = value.to(self.dtype)
        return tensors

    def write(self, folder: Path) -> Path:
        """Write the model folder and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", self.config())
        write_tensors(folder, self.tensors(), self.shards)
        train_tokenizer().save(str(folder / "tokenizer.json"))
        tokenizer_config = {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "chat_template": CHAT_TEMPLATE,
        }
        write_json(folder / "tokenizer_config.json", tokenizer_config)
        return folder


def train_tokenizer() -> Backend:
    """A byte-level BPE of VOCAB_SIZE tokens; the first three are ChatML's special tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int = 1) -> None:
    """Write model.safetensors, or `num_shards` files and their index."""
    if num_shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        tensors_of_shard = {name: tensors[name] for name in list(tensors)[shard::num_shards]}
        save_file(tensors_of_shard, folder / file)
        weight_map |= dict.fromkeys(tensors_of_shard, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def is_idle(engine: Engine) -> bool:
    """Whether no request waits or runs, and every block of the KV cache is free."""
    block_manager = get_block_manager(engine)
    return (
        get_scheduler(engine).idle
        and block_manager.num_free_blocks == block_manager.num_blocks
        and not any(block_manager._ref_counts)
    )


def make_group(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> SequenceGroup:
    """A group for tests of the block manager and scheduler, without a model."""
    return SequenceGroup(
        request=Request(branch_token_ids=[[1]]),
        prompts=[],
        branches=[Branch(index, list(prompt)) for index, prompt in enumerate(prompts)],
        output_state=cast("OutputState", object()),
        sample_index=0,
        seed=0,
        max_new_tokens=max_new_tokens,
    )
