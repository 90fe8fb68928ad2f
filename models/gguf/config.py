"""The decoder of a GGUF file: its config.json, and where each of its tensors goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, cut, quoted
from ..llama import EMBEDDING, FINAL_NORM, HEAD, LAYER, SWITCHED
from ..rope_parameters import MAX_THETA
from .rope_scaling import FREQUENCIES, rope_scaling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .reader import GGUFFile

LISTED = 8
"""How many names an error lists at most."""

TENSORS = {  # Hugging Face name: GGUF name, dimensions
    EMBEDDING: ("token_embd.weight", ("vocab", "hidden")),
    FINAL_NORM: ("output_norm.weight", ("hidden",)),
    HEAD: ("output.weight", ("vocab", "hidden")),
}
MODULES = {  # of a layer
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
class Architecture:
    """A value of general.architecture. `config` is what its config.json says beside the sizes.

    `switch`: the key of those tensors in `llama.SWITCHED` that a layer has besides. `interleaved`: rotary
    embedding turns the rows 2i and 2i + 1 of a head of queries or keys, not i and i + head_dim / 2 as in
    Hugging Face's folders.
    """

    config: Mapping[str, Any]
    switch: str = ""
    interleaved: bool = False


def _named(name: str, **config: Any) -> dict[str, Any]:
    return {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), **config}


ARCHITECTURES = {
    "llama": Architecture(_named("Llama", attention_bias=False, mlp_bias=False), interleaved=True),
    "qwen2": Architecture(_named("Qwen2"), "qkv_bias"),
    "qwen3": Architecture(_named("Qwen3", attention_bias=False), "qk_norm"),
}


@dataclass(frozen=True)
class Part:
    """A tensor to write: which of the file's it is made of, and its shape.

    `width`: heads of so many rows are in interleaved order; 0 for rows that stay as they are.
    """

    source: str
    shape: tuple[int, ...]
    width: int = 0


class Decoder:
    """What the metadata and tensors of a file make up. Raises InputError when that is no known decoder."""

    def __init__(self, file: GGUFFile) -> None:
        found = file.get("general.architecture")
        if not isinstance(found, str) or found not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise InputError(f"the GGUF file's general.architecture is {quoted(found)}; known are {known}")
        self._file, self._prefix, self._kind = file, f"{found}.", ARCHITECTURES[found]
        self._refuse_unsupported()

    def config(self, dtype: str) -> dict[str, Any]:
        """The model's config.json."""
        file, theta = self._file, self._file.number(f"{self._prefix}rope.freq_base", 10_000.0)
        if not 2 <= theta <= MAX_THETA:
            key = f"{self._prefix}rope.freq_base"
            raise InputError(f"the GGUF file's {key} is {theta:g}; it must be from 2 to {MAX_THETA:g}")
        config = {
            **self._kind.config,
            "vocab_size": self._vocab_size(),
            "hidden_size": self._size("embedding_length"),
            "intermediate_size": self._size("feed_forward_length"),
            "num_hidden_layers": self._size("block_count"),
            "num_attention_heads": self._heads,
            "num_key_value_heads": self._size("attention.head_count_kv", self._heads),
            "head_dim": self._width,
            "hidden_act": "silu",
            "max_position_embeddings": self._size("context_length"),
            "rms_norm_eps": file.number(f"{self._prefix}attention.layer_norm_rms_epsilon"),
            "rope_theta": theta,
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "bos_token_id": file.token_id("bos"),
            "eos_token_id": file.token_id("eos"),
            "pad_token_id": file.token_id("padding"),
            "dtype": dtype,
            **self._window(),
        }
        if scaling := rope_scaling(file, self._prefix, theta, self._width):
            config["rope_scaling"] = scaling
        return config

    def plan(self) -> dict[str, Part]:
        """The tensors of the folder by name. Raises InputError unless the file has exactly what they need."""
        sizes = {
            "vocab": self._vocab_size(),
            "hidden": self._size("embedding_length"),
            "inner": self._size("feed_forward_length"),
            "query": self._heads * self._width,
            "kv": self._size("attention.head_count_kv", self._heads) * self._width,
            "head": self._width,
        }
        table = dict(TENSORS)
        if "output.weight" not in self._file.tensors:
            del table[HEAD]  # tied to the embedding
        layer = {**LAYER, **SWITCHED.get(self._kind.switch, {})}
        layers = self._size("block_count")
        for index in range(min(layers, len(self._file.tensors))):  # of more than these, some are missing
            for name, dims in layer.items():
                module, _, suffix = name.rpartition(".")
                table[f"model.layers.{index}.{name}"] = (f"blk.{index}.{MODULES[module]}.{suffix}", dims)
        plan = {}
        for target, (source, dims) in table.items():
            turned = self._kind.interleaved and source.endswith(("attn_q.weight", "attn_k.weight"))
            plan[target] = Part(source, tuple(sizes[dim] for dim in dims), self._width if turned else 0)
        self._require({part.source: part.shape for part in plan.values()})
        return plan

    @property
    def _heads(self) -> int:
        return self._size("attention.head_count")

    @property
    def _width(self) -> int:
        """Of a head."""
        return self._size("attention.key_length", self._size("embedding_length") // self._heads)

    def _size(self, key: str, default: int | None = None) -> int:
        return self._file.size(self._prefix + key, default)

    def _vocab_size(self) -> int:
        """Rows of the embedding: the last may have no token."""
        tokens, embedding = len(self._file.tokens()), self._file.tensors.get("token_embd.weight")
        rows = embedding.shape[0] if embedding else tokens
        if rows < tokens:
            raise InputError(f"the GGUF file has {tokens} tokens but embeds {rows}; each needs a row")
        return rows

    def _window(self) -> dict[str, Any]:
        """The keys of sliding-window attention in every layer: only Mistral's and Qwen's classes have it."""
        key = f"{self._prefix}attention.sliding_window"
        if not self._file.get(key):
            return {}
        window = {"sliding_window": self._file.size(key)}
        if self._prefix == "llama.":
            return {**_named("Mistral"), **window}
        return {**window, "use_sliding_window": True, "max_window_layers": 0}

    def _refuse_unsupported(self) -> None:
        if (parts := self._file.get("split.count", 1)) not in (0, 1):
            raise InputError(
                f"the GGUF file is one of {quoted(parts)} parts; they must be merged into one file first"
            )
        if experts := self._file.get(f"{self._prefix}expert_count", 0):
            raise InputError(f"the GGUF file mixes {quoted(experts)} experts; it must be a model without")
        if f"{self._prefix}attention.sliding_window_pattern" in self._file.metadata:
            raise InputError(
                f"the GGUF file has {self._prefix}attention.sliding_window_pattern, which is not supported; "
                "a window must hold in every layer or in none"
            )
        if self._width % 2:
            raise InputError(
                f"the GGUF file's heads are {self._width} wide; rotary embedding needs an even width"
            )
        for name in ("rope.dimension_count", "attention.value_length"):
            if (value := self._size(name, self._width)) != self._width:
                raise InputError(
                    f"the GGUF file's {self._prefix}{name} is {value}; "
                    f"it must be the width of a head, {self._width}"
                )

    def _require(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        shapes = {name: stored.shape for name, stored in self._file.tensors.items() if name != FREQUENCIES}
        wrong = [
            f"{name} is {list(shapes[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ]
        problems = [
            f"{title}: {', '.join(map(cut, names[:LISTED]))}{' and more' * (len(names) > LISTED)}"
            for title, names in (
                ("missing", [name for name in expected if name not in shapes]),
                ("unexpected", [name for name in shapes if name not in expected]),
                ("of the wrong shape", wrong),
            )
            if names
        ]
        if problems:
            kind = self._kind.config["architectures"][0]
            raise InputError(f"the GGUF file's tensors do not make a {kind}; {'; '.join(problems)}")
