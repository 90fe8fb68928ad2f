"""RoPE frequencies, cos and sin match transformers, for every scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from trimtab.models.config import ModelConfig
from trimtab.models.layers.rotary_embedding import DynamicRope, Rope, RotaryEmbedding

CPU = torch.device("cpu")
TRAINED = 4096
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 512}
SECTIONS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {**LLAMA3, "factor": 8.0},
    "llama3-narrow": {**LLAMA3, "factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 1024},
    "yarn-untruncated": {"rope_type": "yarn", "factor": 2.5, ORIGINAL: 300, "truncate": False},
    "yarn-betas": {"rope_type": "yarn", "factor": 40.0, ORIGINAL: 512, "beta_fast": 16, "beta_slow": 4},
    "yarn-one-beta": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 512, "beta_fast": 2, "beta_slow": 2},
    "yarn-attention-factor": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 512, "attention_factor": 0.7},
    "yarn-mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8},
    "yarn-implied-factor": {"rope_type": "yarn", "factor": None, ORIGINAL: 1024},
    "yarn-short-original": {"rope_type": "yarn", "factor": 2.0, ORIGINAL: 3},
}


def rope_pair(section: dict[str, Any], head_dim: int, theta: float) -> tuple[Rope, LlamaConfig]:
    """Our rope and transformers' config for the same config.json."""
    data = {
        "vocab_size": 9,
        "hidden_size": 2 * head_dim,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": TRAINED,
        "rope_parameters": {**section, "rope_theta": theta},
    }
    ours = ModelConfig.from_dict({"architectures": ["LlamaForCausalLM"], **data})
    return ours.rope, LlamaConfig(**data)


@pytest.mark.parametrize("head_dim", [2, 12, 128])
@pytest.mark.parametrize("theta", [500.0, 1e6])
@pytest.mark.parametrize("name", SECTIONS)
def test_frequencies_and_attention_factor_are_those_of_transformers(
    name: str, theta: float, head_dim: int
) -> None:
    rope, config = rope_pair(SECTIONS[name], head_dim, theta)
    theirs = LlamaRotaryEmbedding(config)
    assert rope.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-15)
    # a few float32 roundings; transformers also computes in float32
    torch.testing.assert_close(rope.inv_freq(head_dim), theirs.inv_freq, rtol=5e-7, atol=0)


@pytest.mark.parametrize("name", SECTIONS)
def test_cos_and_sin_are_those_of_transformers(name: str) -> None:
    rope, config = rope_pair(SECTIONS[name], 64, 1e4)
    positions = torch.tensor([0, 1, 2, 77, 1000, 4095])
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    cos, sin = RotaryEmbedding(rope, 64, CPU).cos_sin(positions)
    assert cos.shape == sin.shape == (6, 64)
    signs = torch.cat((-torch.ones(32), torch.ones(32)))
    for ours, theirs in ((cos, expected[0][0]), (sin, expected[1][0] * signs)):
        # an angle near 4095 has an error of 4095 · 2⁻²⁴ for each rounding
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
        torch.testing.assert_close(ours[:4], theirs[:4], rtol=0, atol=2e-5)


@pytest.mark.parametrize("factor", [1.0, 2.0, 7.5])
def test_a_dynamic_rope_at_a_prompt_length_is_that_of_transformers(
    factor: float,
) -> None:
    rope, config = rope_pair({"rope_type": "dynamic", "factor": factor}, 12, 1e4)
    assert isinstance(rope, DynamicRope)
    lengths = torch.tensor([1, TRAINED - 1, TRAINED, TRAINED + 1, 3 * TRAINED])
    inv_freq = rope.dynamic_inv_freq(12, lengths)
    for row, length in zip(inv_freq, lengths, strict=True):
        theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, CPU, seq_len=length)
        torch.testing.assert_close(row, theirs, rtol=2e-6, atol=0)
    torch.testing.assert_close(inv_freq[:3], rope.inv_freq(12).expand(3, -1), rtol=1e-6, atol=0)


def test_only_a_dynamic_rope_depends_on_the_prompt_length_and_only_beyond_its_context() -> None:
    dynamic, _ = rope_pair({"rope_type": "dynamic", "factor": 2.0}, 12, 1e4)
    assert [dynamic.rope_length(length) for length in (1, TRAINED, TRAINED + 1)] == [
        TRAINED,
        TRAINED,
        TRAINED + 1,
    ]
    assert {rope_pair(section, 12, 1e4)[0].rope_length(9 * TRAINED) for section in SECTIONS.values()} == {0}


def test_requests_of_a_dynamic_rope_rotate_by_their_own_lengths_in_one_batch() -> None:
    rope, _ = rope_pair({"rope_type": "dynamic", "factor": 2.0}, 12, 1e4)
    rotary = RotaryEmbedding(rope, 12, CPU)
    positions = torch.tensor([5, 5, 900])
    together = rotary.cos_sin(positions, torch.tensor([8, 9000, 9000]))
    for index, length in enumerate((8, 9000, 9000)):
        alone = rotary.cos_sin(positions[index : index + 1], torch.tensor([length]))
        assert all(torch.equal(t[index : index + 1], a) for t, a in zip(together, alone, strict=True))
    assert not torch.equal(together[0][0], together[0][1])


def test_a_long_context_takes_no_memory_before_it_is_used() -> None:
    rotary = RotaryEmbedding(Rope(theta=1e4), 128, CPU)
    cached_bytes = sum(value.nbytes for value in vars(rotary).values() if isinstance(value, torch.Tensor))
    assert cached_bytes == 128 * 4
    cos, sin = rotary.cos_sin(torch.tensor([2**24 - 1]))
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(1, 128))
