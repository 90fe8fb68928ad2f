"""Granite 3 (dense): Llama with scales of embeddings, scores, residuals and logits."""

from __future__ import annotations

from ..common.config_reader import ConfigReader
from .architecture import Architecture
from .gguf_format import GGUFFormat
from .sliding_window import no_windows
from .switches import Switches

MIN_SCALE, MAX_SCALE = 1e-4, 1e4


def _read_switches(reader: ConfigReader, num_layers: int) -> Switches:
    attention_bias = reader.get_bool("attention_bias")
    embedding, attention, residual, logits = (
        reader.get_float(key, 1.0, MIN_SCALE, MAX_SCALE)
        for key in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    )
    return Switches(
        sliding_windows=no_windows(num_layers),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=reader.get_bool("mlp_bias"),
        embedding_scale=embedding,
        attention_scale=attention,
        residual_scale=residual,
        logits_scale=1 / logits,
    )


GRANITE = Architecture(
    name="GraniteForCausalLM",
    classifier=False,
    context_length=2048,
    read_switches=_read_switches,
    gguf=GGUFFormat(
        name="granite",
        config={"attention_bias": False, "mlp_bias": False},
        float_keys={
            "embedding_multiplier": "embedding_scale",
            "attention_multiplier": "attention.scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
        interleaved=True,
    ),
)
