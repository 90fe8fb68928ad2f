"""A decoder's switches against a decoder written out in float64: scales, soft caps, norm placements."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional
from trimtab.kernels.attention_metadata import SequenceChunk
from trimtab.kernels.backend import CPU_BACKEND, REFERENCE_BACKEND, Backend
from trimtab.models.config import ModelConfig
from trimtab.models.decoder import NORM_NAMES, Decoder, param_shapes
from trimtab.models.forward import forward
from trimtab.models.weights.dummy import DummyWeights

from ..helpers.tiny_model import TinyModel

if TYPE_CHECKING:
    from torch import Tensor

CPU = torch.device("cpu")
TOKENS = [5 + 7 * n % 290 for n in range(40)]
PLAIN = ModelConfig.from_dict(TinyModel(head_dim=8, layers=3, tied=False).config())
ALL: dict[str, Any] = {
    "embedding_scale": 6.0,
    "attention_scale": 0.9,
    "residual_scale": 0.3,
    "logits_scale": 0.6,
    "attention_softcap": 1.5,
    "logits_softcap": 2.0,
    "norm_placement": "both",
    "norm_offset": 0.7,
    "rms_norm_eps": 0.02,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    **{key: {key: value} for key, value in ALL.items()},
    "norms after": {"norm_placement": "after"},
    "norms after, scaled": {"norm_placement": "after", "residual_scale": 0.3, "rms_norm_eps": 0.02},
    "all": ALL,
    "all with windows": {**ALL, "sliding_windows": (7, None, 16)},
}


class RandomWeights(DummyWeights):
    """Weights large enough for every switch to have an effect, norms included."""

    def _create_tensor(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        noise = torch.randn(self.shapes[name], generator=generator)
        return 1 + 0.2 * noise if name.endswith("norm.weight") else 0.3 * noise


def written_out(config: ModelConfig, weights: DummyWeights) -> Tensor:
    """The logits [tokens, vocab] in float64, each step by its definition."""
    names, num_tokens, width = NORM_NAMES[config.norm_placement], len(TOKENS), config.head_dim

    def get(name: str) -> Tensor:
        return weights.get_tensor(name).double()

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], get(name) + config.norm_offset, config.rms_norm_eps)

    def cap(x: Tensor, value: float | None) -> Tensor:
        return x if value is None else value * torch.tanh(x / value)

    positions = torch.arange(num_tokens)
    angles = positions[:, None] * config.rope.theta ** (-torch.arange(0, width, 2).double() / width)
    cos, sin = (f(angles).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def attention(x: Tensor, prefix: str, window: int | None) -> Tensor:
        q, k, v = ((x @ get(f"{prefix}.{n}_proj.weight").T).view(num_tokens, -1, width) for n in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (y.repeat_interleave(config.num_heads // config.num_kv_heads, 1) for y in (k, v))
        scale = width**-0.5 if config.attention_scale is None else config.attention_scale
        scores = cap(torch.einsum("thd,shd->hts", q, k) * scale, config.attention_softcap)
        distance = positions[:, None] - positions
        hidden = (distance < 0) | (distance >= (window or num_tokens))
        out = torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        return out.flatten(1) @ get(f"{prefix}.o_proj.weight").T

    def mlp(x: Tensor, prefix: str) -> Tensor:
        gate, up = (x @ get(f"{prefix}.{n}_proj.weight").T for n in ("gate", "up"))
        return (functional.silu(gate) * up) @ get(f"{prefix}.down_proj.weight").T

    x = get("model.embed_tokens.weight")[TOKENS] * config.embedding_scale
    for index, window in enumerate(config.sliding_windows):
        prefix = f"model.layers.{index}"
        for kind, before, after in (
            ("attention", names.pre_attention, names.post_attention),
            ("mlp", names.pre_mlp, names.post_mlp),
        ):
            y = norm(x, f"{prefix}.{before}.weight") if before else x
            y = (
                attention(y, f"{prefix}.self_attn", window)
                if kind == "attention"
                else mlp(y, f"{prefix}.mlp")
            )
            y = norm(y, f"{prefix}.{after}.weight") if after else y
            x = x + config.residual_scale * y
    logits = norm(x, "model.norm.weight") @ get("lm_head.weight").T * config.logits_scale
    return cap(logits, config.logits_softcap)


@torch.inference_mode()
def computed(config: ModelConfig, weights: DummyWeights, backend: Backend, chunk_sizes: list[int]) -> Tensor:
    """The logits of a decoder whose tokens come in chunks."""
    model = Decoder(config, weights, torch.float32, CPU, backend.ops)
    block_shape = (16, config.num_kv_heads, config.head_dim)
    cache = backend.cache_cls(config.num_layers, 4, *block_shape, torch.float32, CPU)
    cache.zero_blocks([0, 1, 2, 3])
    logits, start = [], 0
    for count in chunk_sizes:
        chunk, ids = SequenceChunk(start, count, [0, 1, 2, 3]), TOKENS[start : start + count]
        hidden = forward(model, [chunk], ids, [0] * count, cache)
        logits.append(model.compute_logits(hidden)[:count])
        start += count
    return torch.cat(logits)


@pytest.mark.parametrize("backend", [CPU_BACKEND, REFERENCE_BACKEND], ids=["cpu", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_a_decoder_written_out(case: str, backend: Backend) -> None:
    """In one prefill, and in a prefill and single steps."""
    config = replace(PLAIN, **CASES[case])
    weights = RandomWeights(param_shapes(config), torch.float32, CPU)
    expected = written_out(config, weights)
    for chunk_sizes in ([40], [21, *[1] * 19]):
        found = computed(config, weights, backend, chunk_sizes).double()
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("key", ALL)
def test_ignoring_a_switch_changes_the_logits(key: str) -> None:
    config = replace(PLAIN, **ALL)
    default = ModelConfig.__dataclass_fields__[key].default if key != "rms_norm_eps" else 1e-5
    ignored = replace(config, **{key: default})
    weights = RandomWeights(param_shapes(config) | param_shapes(ignored), torch.float32, CPU)
    difference = written_out(config, weights) - written_out(ignored, weights)
    assert float(difference.abs().max()) > 1e-2
