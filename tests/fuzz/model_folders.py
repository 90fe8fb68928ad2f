"""Fuzz targets for the files of a model folder: damage one file, then load the model and generate."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from trimtab.engine import Engine, Request, SamplingParams
from trimtab.kernels.common.errors import InputError, RunError
from trimtab.models.config import ModelConfig
from trimtab.models.decoder import param_shapes, weight_bytes
from trimtab.tools.commands import info

from ..helpers import vocabularies
from ..helpers.tiny_model import CHAT_TEMPLATE, TinyModel, write_json, write_tensors
from .binary_formats import damage_protobuf, damage_safetensors
from .mutators import damage_json
from .target import FuzzTarget

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

INDEX_FILE = "model.safetensors.index.json"
PROMPT = "What is <|im_end|> rain, 東京 e\u0301?"
MAX_DUMMY_BYTES = 64 << 20
"""Maximum bytes of random weights for a damaged config.json."""


def use_model(model: Path) -> None:
    """Run `info` on the model, load it and generate a few tokens."""
    errors: list[InputError | RunError] = []
    for step in (_describe, _generate):
        try:
            step(model)
        except (InputError, RunError) as error:
            errors.append(error)
    if errors:
        raise errors[-1]


def _describe(model: Path) -> None:
    info.format_table(info.model_info(str(model)))


def _generate(model: Path, **settings: Any) -> None:
    engine = Engine.from_pretrained(str(model), kv_cache_memory="1MiB", max_model_len=200, **settings)
    sampling = SamplingParams(max_tokens=3, stop=("zz",))
    engine.generate(Request(PROMPT, sampling=sampling))
    ids = engine.tokenizer.encode(PROMPT)[:50]
    engine.generate(Request(branch_token_ids=[ids or [0]], sampling=sampling))


def model_file_target(name: str, damage: Callable[[bytes, Random], bytes], *models: Path) -> FuzzTarget:
    """A target for one file of a model folder. The seeds are the file's contents in each of the models."""
    damaged_folder = models[0].parent / "damaged"

    def run(seed: int, data: bytes) -> None:
        shutil.rmtree(damaged_folder, ignore_errors=True)
        shutil.copytree(models[seed], damaged_folder)
        (damaged_folder / name).write_bytes(data)
        use_model(damaged_folder)

    return FuzzTarget([(model / name).read_bytes() for model in models], damage, run)


def safetensors(folder: Path) -> FuzzTarget:
    return model_file_target("model.safetensors", damage_safetensors, TinyModel().write(folder / "one"))


def index(folder: Path) -> FuzzTarget:
    return model_file_target(INDEX_FILE, damage_json, TinyModel(tied=False, shards=3).write(folder / "three"))


def config(folder: Path) -> FuzzTarget:
    """config.json with its checkpoint, and, if small enough, with dummy weights of its shapes."""
    models = []
    for index, changes in enumerate(CONFIG_CHANGES):
        model = TinyModel().write(folder / f"of{index}")
        data = {**TinyModel().config(), **changes}
        write_json(model / "config.json", data)
        generator = torch.Generator().manual_seed(0)
        shapes = param_shapes(ModelConfig.from_dict(data))
        write_tensors(model, {name: torch.randn(size, generator=generator) for name, size in shapes.items()})
        models.append(model)
    target = model_file_target("config.json", damage_json, *models)

    def run(seed: int, data: bytes) -> None:
        damaged_folder = folder / "damaged"
        try:
            target.run(seed, data)
        finally:
            model_config = ModelConfig.from_folder(damaged_folder)
            if weight_bytes(model_config, 4, torch.device("cpu")) < MAX_DUMMY_BYTES:
                _generate(damaged_folder, load_format="dummy")

    return FuzzTarget(target.seeds, damage_json, run)


CONFIG_CHANGES: list[dict[str, Any]] = [
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}, "head_dim": 6},
    {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 6,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "attention_factor": 1.2,
            "original_max_position_embeddings": 128,
        },
    },
    {
        "attention_bias": True,
        "mlp_bias": True,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    {
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0},
    },
]
TOKENIZER_MAKERS = (vocabularies.make_byte_level, vocabularies.make_byte_fallback, vocabularies.make_unigram)
SPECIAL_TOKENS_MAP: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": {
        "content": "</s>",
        "lstrip": False,
        "rstrip": True,
        "single_word": False,
        "normalized": False,
    },
    "additional_special_tokens": ["<|im_start|>", {"content": "<|im_end|>", "special": True}],
}
EMBEDDING_ROWS = 640
"""Rows of the embedding, enough for the largest vocabulary."""


def _write_chat_model(folder: Path, **files: Any) -> Path:
    """A ChatML model with `files`; `__` in a name stands for a dot."""
    model = TinyModel(vocab_size=EMBEDDING_ROWS).write(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name, content in files.items():
        path = model / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return model


def tokenizer_json(folder: Path) -> FuzzTarget:
    models = [
        _write_chat_model(folder / f"v{index}", tokenizer__json=make().to_str().encode())
        for index, make in enumerate(TOKENIZER_MAKERS)
    ]
    return model_file_target("tokenizer.json", damage_json, *models)


def tokenizer_model(folder: Path) -> FuzzTarget:
    kinds = ("Llama", "BPE as by default", "unigram as by default", "unigram with bytes")
    models = [
        _write_chat_model(
            folder / f"v{index}",
            tokenizer__model=vocabularies.sentencepiece_model(**vocabularies.SENTENCEPIECE_OPTIONS[kind]),
        )
        for index, kind in enumerate(kinds)
    ]
    return model_file_target("tokenizer.model", damage_protobuf, *models)


def tokenizer_file_target(name: str) -> Callable[[Path], FuzzTarget]:
    """A target for a JSON file next to a tokenizer.json and next to a tokenizer.model."""

    def make_target(folder: Path) -> FuzzTarget:
        backend = vocabularies.make_byte_level()
        decoder = {
            str(backend.token_to_id(text)): {"content": text, "special": True} for text in ("<s>", "</s>")
        }
        llama_config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
        llama = vocabularies.sentencepiece_model(**vocabularies.LLAMA_OPTIONS)
        contents = {
            "tokenizer_config__json": (
                {
                    **SPECIAL_TOKENS_MAP,
                    "add_bos_token": True,
                    "added_tokens_decoder": decoder,
                    "model_max_length": 512,
                },
                {
                    **llama_config,
                    "add_bos_token": True,
                    "add_eos_token": False,
                    "add_prefix_space": True,
                    "added_tokens_decoder": {"430": {"content": "<x>", "lstrip": True, "special": False}},
                },
            ),
            "special_tokens_map__json": (
                SPECIAL_TOKENS_MAP,
                {**llama_config, "pad_token": {"content": "<s>"}},
            ),
            "added_tokens__json": ({"<s>": backend.token_to_id("<s>")}, {"<x>": 430, "<y>": 431}),
            "generation_config__json": ({"bos_token_id": 1, "eos_token_id": [2, 3]}, {"eos_token_id": 2}),
        }[name]
        models = [
            _write_chat_model(
                folder / "json", tokenizer__json=backend.to_str().encode(), **{name: contents[0]}
            ),
            _write_chat_model(folder / "model", tokenizer__model=llama, **{name: contents[1]}),
        ]
        return model_file_target(name.replace("__", "."), damage_json, *models)

    return make_target
