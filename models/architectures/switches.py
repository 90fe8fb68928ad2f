"""The switches of a decoder: what a family computes differently from Llama."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]
NormPlacement = Literal["before", "after", "both"]
"""Where the RMS norms of the residual stream stand: before each sublayer, after it, or both."""


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What a decoder computes; the defaults are Llama's, and cost nothing.

    sliding_windows: per layer, how many tokens a token attends to, itself included; None is all before it.
    qkv_bias, output_bias: biases of the attention projections; mlp_bias: of the three MLP projections.
    qk_norm: queries and keys are RMS-normalised per head, before rotary embedding.
    embedding_scale, logits_scale: factors of the embeddings and of the logits. residual_scale: of what each
    sublayer adds to the residual stream. attention_scale: of the scores, None for head_dim**-0.5.
    attention_softcap, logits_softcap: c · tanh(x / c) of scores and logits; None for none.
    norm_offset: added to the weight of every RMS norm. activation: of the gated MLP.
    """

    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    norm_placement: NormPlacement = "before"
    norm_offset: float = 0.0
    activation: Activation = "silu"
