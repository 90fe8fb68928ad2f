"""Map a GGUF file's metadata and tensors to a config.json and Hugging Face tensor names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, short_repr, truncate
from ..llama import EMBEDDING, FINAL_NORM, LAYER_SHAPES, LM_HEAD, OPTIONAL_SHAPES
from ..rope_parameters import MAX_THETA
from .rope_scaling import ROPE_FREQS, build_rope_scaling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .reader import GGUFFile

MAX_LISTED_NAMES = 8
"""Maximum names in an error."""

GLOBAL_TENSORS = {  # Hugging Face name: GGUF name, dimensions
    EMBEDDING: ("token_embd.weight", ("vocab", "hidden")),
    FINAL_NORM: ("output_norm.weight", ("hidden",)),
    LM_HEAD: ("output.weight", ("vocab", "hidden")),
}
LAYER_MODULES = {  # Hugging Face module of a layer: GGUF module
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class GGUFArchitecture:
    """A value of general.architecture. `config` has the keys of config.json other than the sizes.

    `optional_key`: the key in `llama.OPTIONAL_SHAPES` of a layer's further tensors. `interleaved`: rotary
    embedding pairs the rows 2i and 2i + 1 of a query or key head, not i and i + head_dim / 2 as in Hugging
    Face checkpoints.
    """

    config: Mapping[str, Any]
    optional_key: str = ""
    interleaved: bool = False


def _hf_architecture(name: str, **config: Any) -> dict[str, Any]:
    return {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), **config}


GGUF_ARCHITECTURES = {
    "llama": GGUFArchitecture(
        _hf_architecture("Llama", attention_bias=False, mlp_bias=False), interleaved=True
    ),
    "qwen2": GGUFArchitecture(_hf_architecture("Qwen2"), "qkv_bias"),
    "qwen3": GGUFArchitecture(_hf_architecture("Qwen3", attention_bias=False), "qk_norm"),
}


@dataclass(frozen=True)
class TensorMapping:
    """The source and shape of an output tensor.

    `permuted_head_dim`: head_dim if the rows of each head are in interleaved RoPE order, else 0.
    """

    gguf_name: str
    shape: tuple[int, ...]
    permuted_head_dim: int = 0


class GGUFModel:
    """The decoder in a GGUF file. Raises InputError when its architecture is not supported."""

    def __init__(self, file: GGUFFile) -> None:
        arch_name = file.get("general.architecture")
        if not isinstance(arch_name, str) or arch_name not in GGUF_ARCHITECTURES:
            known = ", ".join(GGUF_ARCHITECTURES)
            raise InputError(
                f"the GGUF file's general.architecture is {short_repr(arch_name)}; expected one of {known}"
            )
        self._file, self._prefix, self._arch = file, f"{arch_name}.", GGUF_ARCHITECTURES[arch_name]
        self._reject_unsupported()

    def build_config(self, dtype: str) -> dict[str, Any]:
        """The model's config.json."""
        file, theta = self._file, self._file.get_float(f"{self._prefix}rope.freq_base", 10_000.0)
        if not 2 <= theta <= MAX_THETA:
            key = f"{self._prefix}rope.freq_base"
            raise InputError(f"the GGUF file's {key} is {theta:g}; it must be from 2 to {MAX_THETA:g}")
        config = {
            **self._arch.config,
            "vocab_size": self._vocab_size(),
            "hidden_size": self._get_size("embedding_length"),
            "intermediate_size": self._get_size("feed_forward_length"),
            "num_hidden_layers": self._get_size("block_count"),
            "num_attention_heads": self._num_heads,
            "num_key_value_heads": self._get_size("attention.head_count_kv", self._num_heads),
            "head_dim": self._head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._get_size("context_length"),
            "rms_norm_eps": file.get_float(f"{self._prefix}attention.layer_norm_rms_epsilon"),
            "rope_theta": theta,
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "bos_token_id": file.get_token_id("bos"),
            "eos_token_id": file.get_token_id("eos"),
            "pad_token_id": file.get_token_id("padding"),
            "dtype": dtype,
            **self._sliding_window_config(),
        }
        if scaling := build_rope_scaling(file, self._prefix, theta, self._head_dim):
            config["rope_scaling"] = scaling
        return config

    def build_tensor_map(self) -> dict[str, TensorMapping]:
        """Output tensors by name. Raises InputError unless the file has exactly the tensors they need."""
        dim_sizes = {
            "vocab": self._vocab_size(),
            "hidden": self._get_size("embedding_length"),
            "inner": self._get_size("feed_forward_length"),
            "query": self._num_heads * self._head_dim,
            "kv": self._get_size("attention.head_count_kv", self._num_heads) * self._head_dim,
            "head": self._head_dim,
        }
        gguf_tensors = dict(GLOBAL_TENSORS)
        if "output.weight" not in self._file.tensors:
            del gguf_tensors[LM_HEAD]  # tied to the embedding
        layer_shapes = {**LAYER_SHAPES, **OPTIONAL_SHAPES.get(self._arch.optional_key, {})}
        num_layers = self._get_size("block_count")
        for index in range(min(num_layers, len(self._file.tensors))):  # with more layers, some are missing
            for name, dims in layer_shapes.items():
                module, _, suffix = name.rpartition(".")
                gguf_tensors[f"model.layers.{index}.{name}"] = (
                    f"blk.{index}.{LAYER_MODULES[module]}.{suffix}",
                    dims,
                )
        tensor_map = {}
        for hf_name, (gguf_name, dims) in gguf_tensors.items():
            permuted = self._arch.interleaved and gguf_name.endswith(("attn_q.weight", "attn_k.weight"))
            tensor_map[hf_name] = TensorMapping(
                gguf_name, tuple(dim_sizes[dim] for dim in dims), self._head_dim if permuted else 0
            )
        self._validate_tensors({mapping.gguf_name: mapping.shape for mapping in tensor_map.values()})
        return tensor_map

    @property
    def _num_heads(self) -> int:
        return self._get_size("attention.head_count")

    @property
    def _head_dim(self) -> int:

        return self._get_size("attention.key_length", self._get_size("embedding_length") // self._num_heads)

    def _get_size(self, key: str, default: int | None = None) -> int:
        return self._file.get_size(self._prefix + key, default)

    def _vocab_size(self) -> int:
        """Rows of the embedding; the last rows may be padding without a token."""
        num_tokens, embedding = len(self._file.get_tokens()), self._file.tensors.get("token_embd.weight")
        num_rows = embedding.shape[0] if embedding else num_tokens
        if num_rows < num_tokens:
            raise InputError(
                f"the GGUF file has {num_tokens} tokens but {num_rows} embedding rows; each token needs a row"
            )
        return num_rows

    def _sliding_window_config(self) -> dict[str, Any]:
        """Keys for sliding-window attention in every layer, which only Mistral and Qwen classes support."""
        key = f"{self._prefix}attention.sliding_window"
        if not self._file.get(key):
            return {}
        window = {"sliding_window": self._file.get_size(key)}
        if self._prefix == "llama.":
            return {**_hf_architecture("Mistral"), **window}
        return {**window, "use_sliding_window": True, "max_window_layers": 0}

    def _reject_unsupported(self) -> None:
        if (num_splits := self._file.get("split.count", 1)) not in (0, 1):
            raise InputError(
                f"the GGUF file is one of {short_repr(num_splits)} parts; they must be merged into one "
                f"file first"
            )
        if num_experts := self._file.get(f"{self._prefix}expert_count", 0):
            raise InputError(f"the GGUF file has {short_repr(num_experts)} experts; it must be a dense model")
        if f"{self._prefix}attention.sliding_window_pattern" in self._file.metadata:
            raise InputError(
                f"the GGUF file has {self._prefix}attention.sliding_window_pattern, which is not supported; "
                "all layers must use the window, or none"
            )
        if self._head_dim % 2:
            raise InputError(
                f"the GGUF file's head size is {self._head_dim}; it must be even for rotary embedding"
            )
        for name in ("rope.dimension_count", "attention.value_length"):
            if (value := self._get_size(name, self._head_dim)) != self._head_dim:
                raise InputError(
                    f"the GGUF file's {self._prefix}{name} is {value}; "
                    f"it must be the head size, {self._head_dim}"
                )

    def _validate_tensors(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        shapes = {name: tensor.shape for name, tensor in self._file.tensors.items() if name != ROPE_FREQS}
        mismatched = [
            f"{name} is {list(shapes[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ]
        problems = [
            f"{title}: {', '.join(map(truncate, names[:MAX_LISTED_NAMES]))}"
            f"{' and more' * (len(names) > MAX_LISTED_NAMES)}"
            for title, names in (
                ("missing", [name for name in expected if name not in shapes]),
                ("unexpected", [name for name in shapes if name not in expected]),
                ("of the wrong shape", mismatched),
            )
            if names
        ]
        if problems:
            arch_name = self._arch.config["architectures"][0]
            raise InputError(f"the GGUF file's tensors do not match {arch_name}; {'; '.join(problems)}")
