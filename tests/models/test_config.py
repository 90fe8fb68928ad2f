from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from transformers import LlamaConfig
from trimtab.kernels.errors import InputError
from trimtab.models.config import ModelConfig

from ..tiny import Tiny

if TYPE_CHECKING:
    from pathlib import Path

TINY = Tiny(head_dim=10)


def test_both_spellings_of_transformers_read_the_same() -> None:
    old, new = Tiny(head_dim=10, transformers=4).config(), TINY.config()
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
        rope_theta=500.0,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        dtype="float32",
    )


def test_a_config_that_transformers_writes_reads_as_transformers_means_it(tmp_path: Path) -> None:
    theirs = LlamaConfig(
        vocab_size=99,
        hidden_size=24,
        num_attention_heads=4,
        rope_parameters={"rope_theta": 77.0, "rope_type": "default"},
    )
    theirs.architectures = ["LlamaForCausalLM"]
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.from_folder(tmp_path)
    assert ours.rope_theta == 77.0
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


def test_what_a_config_leaves_out_has_transformers_defaults() -> None:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    short = {"architectures": ["LlamaForCausalLM"], **{key: TINY.config()[key] for key in keys}}
    theirs = LlamaConfig(**{key: short[key] for key in keys})
    ours = ModelConfig.from_dict(short)
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, theirs.head_dim) == (6, 6)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.dtype == "float32"


def test_a_null_is_as_good_as_nothing_where_transformers_writes_one() -> None:
    config = {**TINY.config(), "head_dim": None, "num_key_value_heads": None, "rope_scaling": None}
    found = ModelConfig.from_dict(config)
    assert (found.head_dim, found.num_kv_heads) == (6, 6)


def test_the_cache_takes_keys_and_values_of_every_layer_and_head() -> None:
    assert ModelConfig.from_dict(TINY.config()).kv_size == 2 * 2 * 2 * 10


HUGE = 2**60
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"architectures": ["GPT2LMHeadModel"]},
        "architecture 'GPT2LMHeadModel' is not supported; known are LlamaForCausalLM",
    ),
    ({"architectures": None, "model_type": "bert"}, "architecture 'bert' is not supported"),
    ({"architectures": [], "model_type": None}, "architecture None is not supported"),
    ({"architectures": 5}, "architecture 5 is not supported"),
    ({"num_attention_heads": 0}, "num_attention_heads 0; it must be a whole number from 1"),
    ({"num_attention_heads": -6}, "num_attention_heads -6"),
    ({"num_attention_heads": True}, "num_attention_heads True"),
    ({"num_attention_heads": None}, "config.json has no num_attention_heads"),
    ({"num_key_value_heads": 0}, "num_key_value_heads 0"),
    ({"num_key_value_heads": 4}, "num_attention_heads 6, which num_key_value_heads 4 does not divide"),
    ({"num_key_value_heads": 12}, "num_attention_heads 6, which num_key_value_heads 12 does not divide"),
    ({"head_dim": 7}, "head_dim 7; rotary embedding needs an even one"),
    ({"head_dim": None, "hidden_size": 42}, "head_dim 7; rotary embedding needs an even one"),
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
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3', which is not supported"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear', which is not supported"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn', which is not"),
    (
        {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_type": "yarn"}},
        "rope_type 'yarn', which is not supported",
    ),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu', which is not supported; known is 'silu'"),
    ({"attention_bias": True}, "attention_bias True, which is not supported"),
    ({"mlp_bias": True}, "mlp_bias True, which is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_a_config_of_no_such_model_is_refused_by_key_and_value(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)) as refused:
        ModelConfig.from_dict({**TINY.config(), **changes})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_a_size_that_is_missing_is_named(key: str) -> None:
    config = TINY.config()
    del config[key]
    with pytest.raises(InputError, match=f"config.json has no {key}"):
        ModelConfig.from_dict(config)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no config\.json; a model is a folder with one"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", '{"hidden_size": }', "\ufeff{}"])
def test_a_config_that_is_no_json_is_refused_by_its_path(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.json' cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00{", b"[" * 100_000], ids=["not-utf8", "too-deep"])
def test_bytes_that_are_no_config_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json' cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("value", [[], None, 5, "llama"])
def test_a_config_that_is_no_object_is_refused(value: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(InputError, match="holds no JSON object"):
        ModelConfig.from_folder(tmp_path)


def test_a_config_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        ModelConfig.from_folder(tmp_path)
