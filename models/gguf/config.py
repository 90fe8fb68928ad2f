"""Map a GGUF file's metadata and tensors to a config.json and Hugging Face tensor names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, short_repr, truncate
from ..config import MAX_LAYERS, ModelConfig
from ..decoder import EMBEDDING, FINAL_NORM, LM_HEAD, param_shapes
from ..layers.rope_parameters import MAX_THETA
from ..registry import find_gguf_architecture
from .rope_scaling import ROPE_FREQS, build_rope_scaling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .reader import GGUFFile

MAX_LISTED_NAMES = 8
"""Maximum names in an error."""

GLOBAL_TENSORS = {  # Hugging Face name: GGUF name
    EMBEDDING: "token_embd.weight",
    FINAL_NORM: "output_norm.weight",
    LM_HEAD: "output.weight",
}
LAYER_MODULES = {  # Hugging Face module of a layer: GGUF module of the same, in Llama
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
        self._family = find_gguf_architecture(file.get("general.architecture"))
        assert self._family.gguf is not None
        self._file, self._format = file, self._family.gguf
        self._prefix = f"{self._format.name}."
        self._reject_unsupported()

    def build_config(self, dtype: str) -> dict[str, Any]:
        """The model's config.json."""
        file, theta = self._file, self._file.get_float(f"{self._prefix}rope.freq_base", 10_000.0)
        if not 2 <= theta <= MAX_THETA:
            key = f"{self._prefix}rope.freq_base"
            raise InputError(f"the GGUF file's {key} is {theta:g}; it must be from 2 to {MAX_THETA:g}")
        config = {
            "architectures": [self._family.name],
            "model_type": self._family.model_type,
            **self._format.config,
            "vocab_size": self._vocab_size(),
            "hidden_size": self._get_size("embedding_length"),
            "intermediate_size": self._get_size("feed_forward_length"),
            "num_hidden_layers": self._get_size("block_count"),
            "num_attention_heads": self._num_heads,
            "num_key_value_heads": self._get_size("attention.head_count_kv", self._num_heads),
            "head_dim": self._head_dim,
            "hidden_act": self._family.activations[0],
            "max_position_embeddings": self._get_size("context_length"),
            "rms_norm_eps": file.get_float(f"{self._prefix}attention.layer_norm_rms_epsilon"),
            "rope_theta": theta,
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "bos_token_id": file.get_token_id("bos"),
            "eos_token_id": file.get_token_id("eos"),
            "pad_token_id": file.get_token_id("padding"),
            "dtype": dtype,
            **{key: file.get_float(self._prefix + name) for key, name in self._format.float_keys.items()},
            **self._sliding_window_config(),
        }
        if scaling := build_rope_scaling(file, self._prefix, theta, self._head_dim):
            config["rope_scaling"] = scaling
        return config

    def build_tensor_map(self, config: Mapping[str, Any]) -> dict[str, TensorMapping]:
        """Output tensors by name, for the config.json of `build_config`.

        Raises InputError unless the file has exactly the tensors they need.
        """
        # with more layers than tensors some are missing, and the first of them are enough to say so
        max_layers = max(1, min(len(self._file.tensors), MAX_LAYERS))
        num_layers = min(config["num_hidden_layers"], max_layers)
        model_config = parse_config({**config, "num_hidden_layers": num_layers})
        tensor_map = {}
        for hf_name, shape in param_shapes(model_config).items():
            gguf_name = self._gguf_name(hf_name)
            permuted = self._format.interleaved and gguf_name.endswith(("attn_q.weight", "attn_k.weight"))
            tensor_map[hf_name] = TensorMapping(gguf_name, shape, self._head_dim if permuted else 0)
        self._validate_tensors({mapping.gguf_name: mapping.shape for mapping in tensor_map.values()})
        return tensor_map

    def _gguf_name(self, name: str) -> str:
        """The GGUF name of a Hugging Face tensor."""
        if name in GLOBAL_TENSORS:
            return GLOBAL_TENSORS[name]
        index, _, layer_name = name.removeprefix("model.layers.").partition(".")
        module, _, suffix = layer_name.rpartition(".")
        return f"blk.{index}.{(LAYER_MODULES | dict(self._format.modules))[module]}.{suffix}"

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
        """Keys for sliding-window attention in every layer."""
        key = f"{self._prefix}attention.sliding_window"
        if not self._file.get(key):
            return {}
        window = self._file.get_size(key)
        if self._format.window_config is None:
            raise InputError(f"the GGUF file's {key} is {window}; {self._family.name} has no sliding window")
        return {"sliding_window": window, **self._format.window_config}

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
            raise InputError(
                f"the GGUF file's tensors do not match {self._family.name}; {'; '.join(problems)}"
            )


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """The config.json of `GGUFModel.build_config` as a `ModelConfig`. Raises InputError if unsupported."""
    try:
        return ModelConfig.from_dict(config)
    except InputError as error:
        raise InputError(f"the GGUF file's metadata do not describe a supported model: {error}") from None
