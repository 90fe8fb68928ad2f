"""ModelConfig reads a config.json as transformers does, or refuses it by key and value."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import pytest
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from trimtab.kernels.common.errors import InputError
from trimtab.models.config import ModelConfig
from trimtab.models.layers.rotary_embedding import DynamicRope, LinearRope, Llama3Rope, Rope, YarnRope

from ..helpers.tiny_model import TinyModel

if TYPE_CHECKING:
    from pathlib import Path

TINY = TinyModel(head_dim=10)
TRANSFORMERS_CONFIGS = {
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}
ORIGINAL = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def read_config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({**TINY.config(), **changes})


def test_configs_of_transformers_4_and_5_read_the_same() -> None:
    old, new = TinyModel(head_dim=10, transformers_version=4).config(), TINY.config()
    assert old.keys() != new.keys()
    assert ModelConfig.from_dict(old) == ModelConfig.from_dict(new)
    assert ModelConfig.from_dict(new) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=307,
        hidden_size=36,
        intermediate_size=50,
        num_layers=2,
        num_heads=6,
        num_kv_heads=2,
        head_dim=10,
        rms_norm_eps=1e-5,
        rope=Rope(theta=500.0),
        max_position_embeddings=512,
        sliding_windows=(None, None),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=True,
        dtype="float32",
    )


@pytest.mark.parametrize("architecture", TRANSFORMERS_CONFIGS)
def test_a_config_that_transformers_saves_reads_the_same(architecture: str, tmp_path: Path) -> None:
    theirs = TRANSFORMERS_CONFIGS[architecture](
        vocab_size=99,
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_theta": 77.0, "rope_type": "default"},
    )
    theirs.architectures = [architecture]
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.from_folder(tmp_path)
    assert ours.rope == Rope(theta=77.0)
    assert (ours.num_kv_heads, ours.head_dim) == (2, getattr(theirs, "head_dim", 6))
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert set(ours.sliding_windows) == {getattr(theirs, "sliding_window", None)}


@pytest.mark.parametrize("architecture", TRANSFORMERS_CONFIGS)
def test_missing_keys_have_the_defaults_of_transformers(architecture: str) -> None:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    short = {key: TINY.config()[key] for key in keys} | {"hidden_size": 64, "num_attention_heads": 32}
    theirs = TRANSFORMERS_CONFIGS[architecture](**short)
    ours = ModelConfig.from_dict({"architectures": [architecture], **short})
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", 64 // 32)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope == Rope(theta=theirs.rope_parameters["rope_theta"])
    assert ours.max_position_embeddings == ours.context_length == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert set(ours.sliding_windows) == {getattr(theirs, "sliding_window", None)}
    assert ours.output_bias == ours.mlp_bias == getattr(theirs, "attention_bias", False)
    assert ours.dtype == "float32"


def test_a_missing_architecture_is_derived_from_the_model_type() -> None:
    for architecture, theirs in TRANSFORMERS_CONFIGS.items():
        config = read_config(architectures=None, model_type=theirs.model_type)
        assert config == read_config(architectures=[architecture])


def test_null_counts_as_absent() -> None:
    config = read_config(head_dim=None, num_key_value_heads=None, rope_scaling=None, attention_bias=None)
    assert (config.head_dim, config.num_kv_heads, config.qkv_bias) == (6, 6, False)


def test_biases_and_norms_come_from_the_architecture_or_the_config() -> None:
    def switches(architecture: str, **changes: Any) -> tuple[bool, ...]:
        config = read_config(architectures=[architecture], **changes)
        return config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm

    assert switches("LlamaForCausalLM") == (False, False, False, False)
    assert switches("LlamaForCausalLM", attention_bias=True) == (True, True, False, False)
    assert switches("LlamaForCausalLM", mlp_bias=True) == (False, False, True, False)
    assert switches("MistralForCausalLM", attention_bias=True) == (False, False, False, False)
    assert switches("Qwen2ForCausalLM") == (True, False, False, False)
    assert switches("Qwen2ForCausalLM", attention_bias=True) == (True, False, False, False)
    assert switches("Qwen3ForCausalLM") == (False, False, False, True)
    assert switches("Qwen3ForCausalLM", attention_bias=True) == (True, True, False, True)


SLIDING, FULL = "sliding_attention", "full_attention"
WINDOWS: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", {"sliding_window": 9}),
    ("MistralForCausalLM", {}),
    ("MistralForCausalLM", {"sliding_window": None}),
    ("MistralForCausalLM", {"sliding_window": 9}),
    ("Qwen2ForCausalLM", {"sliding_window": 9}),
    ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9}),
    ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1}),
    ("Qwen3ForCausalLM", {"use_sliding_window": True, "max_window_layers": 0}),
    ("Qwen3ForCausalLM", {"use_sliding_window": True, "layer_types": [SLIDING, FULL, SLIDING]}),
    ("Qwen3ForCausalLM", {"use_sliding_window": False, "layer_types": [FULL] * 3}),
    ("Qwen3ForCausalLM", {"use_sliding_window": True, "layer_types": None, "max_window_layers": 2}),
]


@pytest.mark.parametrize(("architecture", "changes"), WINDOWS, ids=[str(window) for window in WINDOWS])
def test_sliding_windows_of_the_layers_match_transformers(architecture: str, changes: dict[str, Any]) -> None:
    theirs = TRANSFORMERS_CONFIGS[architecture](num_hidden_layers=3, **changes)
    window = getattr(theirs, "sliding_window", None) if architecture != "LlamaForCausalLM" else None
    types = getattr(theirs, "layer_types", None) or [SLIDING] * 3
    ours = read_config(architectures=[architecture], num_hidden_layers=3, **changes)
    assert list(ours.sliding_windows) == [window if kind == SLIDING else None for kind in types]


ROPES: list[tuple[dict[str, Any], Rope, int]] = [
    ({"rope_type": "default"}, Rope(theta=1e6), 512),
    ({"type": "linear", "factor": 4}, LinearRope(theta=1e6, factor=4.0), 2048),
    ({"rope_type": "linear", "type": "linear", "factor": 2.5}, LinearRope(theta=1e6, factor=2.5), 1280),
    (
        LLAMA3,
        Llama3Rope(
            theta=1e6, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=128
        ),
        512,
    ),
    ({"type": "dynamic", "factor": 2.0}, DynamicRope(theta=1e6, factor=2.0, original_max_position=512), 1024),
    (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 100},
        YarnRope(
            theta=1e6,
            factor=4.0,
            attention_factor=0.1 * math.log(4) + 1,
            original_max_position=100,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=True,
        ),
        512,
    ),
    (
        {"type": "yarn", "factor": 4.0, "beta_fast": 8, "beta_slow": 2, "truncate": False, "mscale": 2.0}
        | {"mscale_all_dim": 1.0, "attention_factor": None},
        YarnRope(
            theta=1e6,
            factor=4.0,
            attention_factor=(0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1),
            original_max_position=512,
            beta_fast=8.0,
            beta_slow=2.0,
            truncate=False,
        ),
        2048,
    ),
]


@pytest.mark.parametrize(("section", "rope", "context"), ROPES, ids=[str(rope[0]) for rope in ROPES])
def test_rope_settings_read_the_same_in_every_spelling(
    section: dict[str, Any], rope: Rope, context: int
) -> None:
    spellings: list[dict[str, Any]] = [
        {"rope_scaling": section, "rope_theta": 1e6},
        {"rope_scaling": {**section, "rope_theta": 1e6}, "rope_theta": 3.0},
        {"rope_scaling": None, "rope_parameters": {**section, "rope_theta": 1e6}},
        {"rope_scaling": section, "rope_parameters": section, "rope_theta": 1e6},
    ]
    for spelling in spellings:
        config = read_config(**{"rope_parameters": None, **spelling})
        assert config.rope == rope
        assert (config.context_length, config.max_position_embeddings) == (context, 512)


def test_a_top_level_original_context_takes_precedence_as_in_transformers() -> None:
    rope = read_config(
        rope_parameters={**LLAMA3, "rope_theta": 1e6}, original_max_position_embeddings=64
    ).rope
    assert isinstance(rope, Llama3Rope)
    assert rope.original_max_position == 64
    theirs = LlamaConfig(rope_parameters={**LLAMA3, "rope_theta": 1e6}, original_max_position_embeddings=64)
    theirs.standardize_rope_params()  # as every transformers model does with its config
    assert theirs.rope_parameters["original_max_position_embeddings"] == 64


def test_the_context_is_limited_to_what_float32_positions_can_count() -> None:
    config = read_config(
        max_position_embeddings=10_000_000, rope_parameters={"type": "linear", "factor": 1e6}
    )
    assert config.context_length == 2**24


def test_kv_elements_per_token_count_keys_and_values_of_every_layer_and_head() -> None:
    assert ModelConfig.from_dict(TINY.config()).kv_elements_per_token == 2 * 2 * 2 * 10


HUGE = 2**60
BIG = 10**400
"""Beyond float64, and too long for an error text."""
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
SLIDES = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 4}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"architectures": ["GPT2LMHeadModel"]},
        "architecture 'GPT2LMHeadModel' is not supported; expected one of LlamaForCausalLM, Mist",
    ),
    ({"architectures": None, "model_type": "bert"}, "architecture 'bert' is not supported"),
    ({"architectures": [], "model_type": None}, "architecture None is not supported"),
    ({"architectures": 5}, "architecture 5 is not supported"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architecture ['LlamaForCausalLM'] is not supported"),
    ({"architectures": None, "model_type": ["llama"]}, "architecture 'llama' is not supported"),
    ({"num_attention_heads": 0}, "num_attention_heads 0; it must be an integer from 1"),
    ({"num_attention_heads": -6}, "num_attention_heads -6"),
    ({"num_attention_heads": True}, "num_attention_heads True"),
    ({"num_attention_heads": None}, "config.json has no num_attention_heads"),
    ({"num_key_value_heads": 0}, "num_key_value_heads 0"),
    ({"num_key_value_heads": 4}, "num_attention_heads 6; num_key_value_heads 4 must divide it"),
    ({"num_key_value_heads": 12}, "num_attention_heads 6; num_key_value_heads 12 must divide it"),
    ({"head_dim": 7}, "head_dim 7; it must be even for rotary embedding"),
    ({"head_dim": None, "hidden_size": 42}, "head_dim 7; it must be even for rotary embedding"),
    ({"head_dim": None, "hidden_size": 5}, "head_dim 0"),
    ({"vocab_size": HUGE}, f"vocab_size {HUGE}"),
    ({"hidden_size": HUGE}, f"hidden_size {HUGE}"),
    ({"intermediate_size": HUGE}, f"intermediate_size {HUGE}"),
    ({"num_hidden_layers": HUGE}, f"num_hidden_layers {HUGE}"),
    ({"num_hidden_layers": 2**24}, f"num_hidden_layers {2**24}"),
    ({"num_attention_heads": HUGE}, f"num_attention_heads {HUGE}"),
    ({"num_key_value_heads": HUGE}, f"num_key_value_heads {HUGE}"),
    ({"head_dim": HUGE}, f"head_dim {HUGE}"),
    ({"max_position_embeddings": HUGE}, f"max_position_embeddings {HUGE}"),
    ({"vocab_size": "307"}, "vocab_size '307'"),
    ({"hidden_size": 36.0}, "hidden_size 36.0"),
    ({"rms_norm_eps": 0}, "rms_norm_eps 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps '1e-5'"),
    ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta -1.0"),
    ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta inf"),
    ({"rope_parameters": None, "rope_theta": 0}, "rope_theta 0"),
    ({"rope_parameters": "default"}, "rope_parameters 'default'; it must be an object"),
    ({"rope_scaling": ["llama3"]}, "rope_scaling ['llama3']; it must be an object"),
    ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": "llama3"}, "rope_parameters 'llama3'"),
    ({"rope_parameters": {**LLAMA3, "factor": 0.5}}, "factor 0.5; it must be a number from 1 to 1e+06"),
    ({"rope_parameters": {**LLAMA3, "factor": None}}, "config.json has no factor"),
    ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "high_freq_factor 4.0; it must be above"),
    ({"rope_parameters": {**LLAMA3, ORIGINAL: 8.5}}, f"{ORIGINAL} 8.5; it must be an integer"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None}, "no low_freq_factor"),
    ({"rope_parameters": {"type": "linear"}}, "config.json has no factor"),
    ({"rope_parameters": {"type": "linear", "factor": float("nan")}}, "factor nan"),
    ({"rope_parameters": {"type": "linear", "factor": BIG}}, "factor 1000000000000000000000000000"),
    ({"rope_parameters": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast 1.0; it must be at least"),
    ({"rope_parameters": {**YARN, "truncate": 1}}, "truncate 1; it must be true or false"),
    ({"rope_parameters": {**YARN, "attention_factor": 0}}, "attention_factor 0"),
    ({"head_dim": 2, "rope_parameters": {"type": "dynamic", "factor": 2.0}}, "head_dim 2; it must be at"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'; expected one of default, linear"),
    ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type ['yarn']; expected one of"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "'full_attention' must not be"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5; only 1 is supported"),
    ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25; only 1 is supported"),
    (
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "yarn"}},
        "rope_scaling {'rope_type': 'default'} and rope_parameters {'rope_type': 'yarn'}; it must have only",
    ),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'; only 'silu' is supported"),
    ({"attention_bias": 1}, "attention_bias 1; it must be true or false"),
    ({"mlp_bias": "no"}, "mlp_bias 'no'; it must be true or false"),
    ({"tie_word_embeddings": "true"}, "tie_word_embeddings 'true'"),
    ({"dtype": {"text": "bfloat16"}}, "dtype {'text': 'bfloat16'}; it must be the name of a dtype"),
    ({"dtype": None, "torch_dtype": 16}, "torch_dtype 16; it must be the name of a dtype"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8', which is not supported"),
    ({"quantization_config": "awq"}, "quantization_config 'awq'; it must be an object"),
    ({**SLIDES, "sliding_window": 0}, "sliding_window 0; it must be an integer from 1"),
    ({**SLIDES, "sliding_window": -1}, "sliding_window -1"),
    ({**SLIDES, "use_sliding_window": "yes"}, "use_sliding_window 'yes'; it must be true or false"),
    ({**SLIDES, "max_window_layers": -1}, "max_window_layers -1; it must be an integer from 0"),
    ({**SLIDES, "layer_types": [SLIDING]}, "layer_types ['sliding_attention']; it must list"),
    ({**SLIDES, "layer_types": [SLIDING, "chunked_attention"]}, "for each of 2 layers"),
    ({**SLIDES, "layer_types": SLIDING}, "layer_types 'sliding_attention'; it must list"),
    ({**SLIDES, "use_sliding_window": False, "layer_types": [SLIDING, FULL]}, "use_sliding_window"),
    *(({key: BIG}, f"{key} 1000000000") for key in SIZES),
    ({"rms_norm_eps": BIG}, "rms_norm_eps 1000000000"),
    ({"rms_norm_eps": 1e-40}, "rms_norm_eps 1e-40; it must be a number from 1e-20 to 1"),
    ({"rms_norm_eps": 1e4}, "rms_norm_eps 10000.0"),
    ({"rope_parameters": {"rope_theta": BIG}}, "rope_theta 1000000000"),
    ({"rope_parameters": {"rope_theta": 1.0}}, "rope_theta 1.0; it must be a number from 2 to 1e+15"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_an_unsupported_config_is_refused_by_key_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        ModelConfig.from_dict({**TINY.config(), **changes})
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 250


ODD = [
    None,
    0,
    -1,
    2,
    3,
    BIG,
    -BIG,
    0.5,
    1e-300,
    1e300,
    5e-324,
    float("nan"),
    float("inf"),
    True,
    "",
    "x" * 999,
]
ODD += ["yarn", [], [1], [[]], [SLIDING], {}, {"a": 1}, {"factor": {}}, "\ud800"]
ROPE_KEYS = [*YARN, *LLAMA3, "type", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"]
ROPE_KEYS += ["truncate", "rope_theta", "partial_rotary_factor"]
KEYS = [*TINY.config(), *SLIDES, ORIGINAL, "max_window_layers", "layer_types", "attention_bias", "mlp_bias"]
KEYS += ["rope_scaling", "torch_dtype", "quantization_config", "partial_rotary_factor"]


@pytest.mark.parametrize("architecture", TRANSFORMERS_CONFIGS)
def test_any_value_of_any_key_is_read_or_refused_with_a_short_error(architecture: str) -> None:
    slides = {**SLIDES, "architectures": [architecture]}
    changes: list[dict[str, Any]] = [{**slides, key: value} for key in KEYS for value in ODD]
    for kind in ("default", "linear", "llama3", "yarn", "dynamic"):
        section = {**LLAMA3, **YARN, "rope_type": kind, "mscale": 1.0}
        changes += [
            {**slides, "rope_parameters": {**section, key: value}} for key in ROPE_KEYS for value in ODD
        ]
    refused = [message for message in map(refusal_message, changes) if message is not None]
    assert 0.3 < len(refused) / len(changes) < 0.9
    assert all(len(message) < 300 and "\n" not in message for message in refused)


def refusal_message(changes: dict[str, Any]) -> str | None:
    """The error of a config; None for one that is read, whose frequencies must be finite."""
    try:
        config = read_config(**changes)
    except InputError as refused:
        return str(refused)
    assert 1 <= config.context_length <= 2**24
    assert bool(config.rope.inv_freq(config.head_dim).isfinite().all())
    return None


@pytest.mark.parametrize("key", SIZES[:5])
def test_a_missing_size_is_named(key: str) -> None:
    config = TINY.config()
    del config[key]
    with pytest.raises(InputError, match=f"config.json has no {key}"):
        ModelConfig.from_dict(config)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json; expected a model folder"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", '{"hidden_size": }', "\ufeff{}"])
def test_a_config_with_invalid_json_is_refused_by_its_path(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json' cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00{", b"[" * 100_000], ids=["not-utf8", "too-deep"])
def test_a_config_with_invalid_utf8_or_deep_nesting_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json' cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("value", [[], None, 5, "llama"])
def test_a_config_that_is_not_a_json_object_is_refused(value: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(InputError, match="is not a JSON object"):
        ModelConfig.from_folder(tmp_path)


def test_a_config_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match="is not a regular file"):
        ModelConfig.from_folder(tmp_path)
