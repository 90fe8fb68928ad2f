"""Small random GGUF files, as llama.cpp's converter writes them, and what their tensors are in a folder."""

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

    Contents = Mapping[str, tuple[np.ndarray, Kind]]

HIDDEN, INNER, HEADS, KV_HEADS, WIDTH, LAYERS = 256, 96, 4, 2, 16, 2
QUANTISABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4")
UNQUANTISABLE = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "IQ2_XXS", "IQ1_S")
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "l l"]
SPECIALS = ["<|start|>", "<|end|>", "<pad>", "<|turn|>"]
USER_DEFINED = "<think>"
TOKENS = [*SPECIALS, USER_DEFINED, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
TYPES = [3] * len(SPECIALS) + [4] + [1] * (len(ALPHABET) + len(MERGES))

SIZES: dict[str, Any] = {
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": INNER,
    "block_count": LAYERS,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 50_000.0,
    "attention.key_length": WIDTH,
    "attention.value_length": WIDTH,
    "rope.dimension_count": WIDTH,
}
VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}é{% endfor %}",
}
NAMES = {
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


def shapes(
    architecture: str = "llama", tied: bool = True, vocab: int = len(TOKENS), width: int = WIDTH
) -> dict[str, tuple[int, ...]]:
    query, key = HEADS * width, KV_HEADS * width
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (HIDDEN,),
        "ffn_norm.weight": (HIDDEN,),
        "attn_q.weight": (query, HIDDEN),
        "attn_k.weight": (key, HIDDEN),
        "attn_v.weight": (key, HIDDEN),
        "attn_output.weight": (HIDDEN, query),
        "ffn_gate.weight": (INNER, HIDDEN),
        "ffn_up.weight": (INNER, HIDDEN),
        "ffn_down.weight": (HIDDEN, INNER),
    }
    if architecture == "qwen2":
        layer |= {"attn_q.bias": (query,), "attn_k.bias": (key,), "attn_v.bias": (key,)}
    if architecture == "qwen3":
        layer |= {"attn_q_norm.weight": (width,), "attn_k_norm.weight": (width,)}
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    found |= {f"blk.{at}.{name}": shape for at in range(LAYERS) for name, shape in layer.items()}
    return found if tied else {**found, "output.weight": (vocab, HIDDEN)}


def encoded(shape: tuple[int, ...], kind: Kind, generator: np.random.Generator) -> np.ndarray:
    """A random tensor as a GGUF file holds it."""
    if kind.name in QUANTISABLE:
        return np.asarray(gguf.quants.quantize(generator.standard_normal(shape, np.float32), kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 0x7c make every float16 scale in a block finite.
    return generator.integers(0, 0x7C, (shape[0], shape[1] // block * size), np.uint8)


def tensors(
    kind: str = "F16", architecture: str = "llama", **sizes: Any
) -> dict[str, tuple[np.ndarray, Kind]]:
    """Random tensors of one kind; F32, as llama.cpp has it, for vectors and rows of broken blocks."""
    generator, block = np.random.default_rng(0), gguf.GGML_QUANT_SIZES[Kind[kind]][0]
    found = {}
    for name, shape in shapes(architecture, **sizes).items():
        own = Kind.F32 if len(shape) == 1 or shape[-1] % block else Kind[kind]
        found[name] = (encoded(shape, own, generator), own)
    return found


def write(
    path: Path,
    metadata: Mapping[str, Any] | None = None,
    contents: Contents | None = None,
    architecture: str = "llama",
) -> Path:
    """A GGUF file holding `contents`; `metadata` changes what it says, and None drops a key."""
    writer = gguf.GGUFWriter(path, architecture)
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    sizes = {f"{architecture}.{key}": value for key, value in SIZES.items()}
    for key, value in {**sizes, **VOCABULARY, **(metadata or {})}.items():
        if value is not None:
            adders[type(value)](key, value)
    for name, (values, kind) in (tensors("F16", architecture) if contents is None else contents).items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantised(contents: Contents, name: str) -> torch.Tensor:
    values, kind = contents[name]
    return torch.from_numpy(np.array(gguf.quants.dequantize(values, kind), np.float32))


def unpermuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: the 2i-th row of a head goes to its first half, the one after it to its second half."""
    rows, width = torch.empty_like(weight), weight.shape[0] // heads
    for head in range(heads):
        for row in range(width):
            rows[head * width + (row % 2) * (width // 2) + row // 2] = weight[head * width + row]
    return rows


def expected(contents: Contents, architecture: str = "llama") -> dict[str, torch.Tensor]:
    """The tensors of the folder, by the package's dequantisation."""
    found = {}
    for name in contents:
        *layer, part, suffix = name.split(".")
        weight = dequantised(contents, name)
        if architecture == "llama" and part in ("attn_q", "attn_k"):
            weight = unpermuted(weight, HEADS if part == "attn_q" else KV_HEADS)
        at = f"model.layers.{layer[1]}." if layer else ""
        found[f"{at}{NAMES[part]}.{suffix}"] = weight
    return found
