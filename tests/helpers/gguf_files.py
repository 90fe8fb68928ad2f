"""Small random GGUF files as llama.cpp's converter writes them, and the expected converted tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from tokenizers import pre_tokenizers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    TensorContents = Mapping[str, tuple[np.ndarray, Kind]]

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 256, 96, 4, 2, 16, 2
QUANTIZABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4")
NOT_QUANTIZABLE = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "IQ2_XXS", "IQ1_S")
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "l l"]
SPECIAL_TOKENS = ["<|start|>", "<|end|>", "<pad>", "<|turn|>"]
USER_DEFINED = "<think>"
TOKENS = [*SPECIAL_TOKENS, USER_DEFINED, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
TOKEN_TYPES = [3] * len(SPECIAL_TOKENS) + [4] + [1] * (len(ALPHABET) + len(MERGES))

MODEL_METADATA: dict[str, Any] = {
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": INTERMEDIATE,
    "block_count": LAYERS,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 50_000.0,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "rope.dimension_count": HEAD_DIM,
}
TOKENIZER_METADATA: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TOKEN_TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}é{% endfor %}",
}
HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tensor_shapes(
    architecture: str = "llama", tied: bool = True, vocab: int = len(TOKENS), head_dim: int = HEAD_DIM
) -> dict[str, tuple[int, ...]]:
    query, key = HEADS * head_dim, KV_HEADS * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (HIDDEN,),
        "ffn_norm.weight": (HIDDEN,),
        "attn_q.weight": (query, HIDDEN),
        "attn_k.weight": (key, HIDDEN),
        "attn_v.weight": (key, HIDDEN),
        "attn_output.weight": (HIDDEN, query),
        "ffn_gate.weight": (INTERMEDIATE, HIDDEN),
        "ffn_up.weight": (INTERMEDIATE, HIDDEN),
        "ffn_down.weight": (HIDDEN, INTERMEDIATE),
    }
    if architecture == "qwen2":
        layer |= {"attn_q.bias": (query,), "attn_k.bias": (key,), "attn_v.bias": (key,)}
    if architecture == "qwen3":
        layer |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    shapes |= {f"blk.{index}.{name}": shape for index in range(LAYERS) for name, shape in layer.items()}
    return shapes if tied else {**shapes, "output.weight": (vocab, HIDDEN)}


def random_encoded(shape: tuple[int, ...], ggml_type: Kind, generator: np.random.Generator) -> np.ndarray:
    """A random tensor in GGUF encoding."""
    if ggml_type.name in QUANTIZABLE:
        return np.asarray(gguf.quants.quantize(generator.standard_normal(shape, np.float32), ggml_type))
    block, size = gguf.GGML_QUANT_SIZES[ggml_type]
    # Bytes below 0x7c make every float16 scale in a block finite.
    return generator.integers(0, 0x7C, (shape[0], shape[1] // block * size), np.uint8)


def random_tensors(
    type_name: str = "F16", architecture: str = "llama", **sizes: Any
) -> dict[str, tuple[np.ndarray, Kind]]:
    """Random tensors of one type; as in llama.cpp, F32 for vectors and rows that blocks do not divide."""
    generator, block = np.random.default_rng(0), gguf.GGML_QUANT_SIZES[Kind[type_name]][0]
    tensors = {}
    for name, shape in tensor_shapes(architecture, **sizes).items():
        ggml_type = Kind.F32 if len(shape) == 1 or shape[-1] % block else Kind[type_name]
        tensors[name] = (random_encoded(shape, ggml_type, generator), ggml_type)
    return tensors


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any] | None = None,
    contents: TensorContents | None = None,
    architecture: str = "llama",
) -> Path:
    """Write a GGUF file with `contents`. `metadata` overrides keys; None removes a key."""
    writer = gguf.GGUFWriter(path, architecture)
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    sizes = {f"{architecture}.{key}": value for key, value in MODEL_METADATA.items()}
    for key, value in {**sizes, **TOKENIZER_METADATA, **(metadata or {})}.items():
        if value is not None:
            adders[type(value)](key, value)
    for name, (values, kind) in (
        random_tensors("F16", architecture) if contents is None else contents
    ).items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantize(contents: TensorContents, name: str) -> torch.Tensor:
    values, kind = contents[name]
    return torch.from_numpy(np.array(gguf.quants.dequantize(values, kind), np.float32))


def unpermute_rope(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's RoPE permutation: in each head, row 2i moves to row i, 2i + 1 to head_dim / 2 + i."""
    rows, head_dim = torch.empty_like(weight), weight.shape[0] // heads
    for head in range(heads):
        for row in range(head_dim):
            rows[head * head_dim + (row % 2) * (head_dim // 2) + row // 2] = weight[head * head_dim + row]
    return rows


def expected_tensors(contents: TensorContents, architecture: str = "llama") -> dict[str, torch.Tensor]:
    """The tensors expected after conversion, dequantised by the gguf package."""
    tensors = {}
    for name in contents:
        *layer, part, suffix = name.split(".")
        weight = dequantize(contents, name)
        if architecture == "llama" and part in ("attn_q", "attn_k"):
            weight = unpermute_rope(weight, HEADS if part == "attn_q" else KV_HEADS)
        prefix = f"model.layers.{layer[1]}." if layer else ""
        tensors[f"{prefix}{HF_NAMES[part]}.{suffix}"] = weight
    return tensors
