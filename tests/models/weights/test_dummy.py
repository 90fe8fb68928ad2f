"""Models without a checkpoint: presets, dummy weights, and a tokenizer that spells ids as numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from trimtab.kernels.common.errors import InputError
from trimtab.models.config import ModelConfig
from trimtab.models.decoder import param_shapes
from trimtab.models.loader.presets import PRESETS, resolve_config
from trimtab.models.tokenizer.tokenizer import Tokenizer
from trimtab.models.weights.dummy import DummyTokenizer, DummyWeights

from ...helpers.tiny_model import TinyModel, write_json

if TYPE_CHECKING:
    from pathlib import Path

CPU = torch.device("cpu")
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "smollm2-135m": 134_515_008,
}
"""Published numbers of parameters; a tied head counts once."""


def test_presets_have_the_published_numbers_of_parameters() -> None:
    counted = {
        name: sum(math.prod(shape) for shape in param_shapes(ModelConfig.from_dict(preset)).values())
        for name, preset in PRESETS.items()
    }
    assert counted == PUBLISHED


def test_a_preset_name_resolves_to_a_config_without_a_folder() -> None:
    config, folder = resolve_config("llama-3.1-70b")
    assert folder is None
    assert (config.context_length, config.rope.rope_type, config.dtype) == (131_072, "llama3", "bfloat16")
    assert set(resolve_config("mistral-7b-v0.1")[0].sliding_windows) == {4096}
    assert set(resolve_config("mistral-7b-v0.2")[0].sliding_windows) == {None}


def test_a_folder_takes_precedence_over_a_preset_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama-2-7b").mkdir()
    write_json(tmp_path / "llama-2-7b" / "config.json", TinyModel().config())
    monkeypatch.chdir(tmp_path)
    config, folder = resolve_config("llama-2-7b")
    assert (config.hidden_size, str(folder)) == (36, "llama-2-7b")


def test_an_unknown_model_name_is_refused() -> None:
    with pytest.raises(InputError, match="model is 'llama-9-1b'; it must be"):
        resolve_config("llama-9-1b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dummy_weights_are_normal_with_std_0_02_and_norms_are_one(dtype: torch.dtype) -> None:
    weights = DummyWeights({"a.weight": (300, 200), "model.norm.weight": (7,), "a.bias": (9,)}, dtype, CPU)
    weight = weights.get_tensor("a.weight")
    assert (weight.dtype, weight.shape) == (dtype, (300, 200))
    assert float(weight.double().std()) == pytest.approx(0.02, rel=0.02)  # 5 of its standard errors
    assert abs(float(weight.double().mean())) < 5 * 0.02 / 60_000**0.5
    assert torch.equal(weights.get_tensor("model.norm.weight"), torch.ones(7, dtype=dtype))
    assert float(weights.get_tensor("a.bias").float().abs().max()) > 0


def test_dummy_weights_depend_only_on_seed_and_name() -> None:
    shapes = {"a.weight": (40, 3), "b.weight": (40, 3)}
    first, second = (DummyWeights(shapes, torch.bfloat16, CPU, seed=5) for _ in range(2))
    b, a = first.get_tensor("b.weight"), first.get_tensor("a.weight")
    assert torch.equal(second.get_tensor("a.weight"), a)
    assert torch.equal(second.get_tensor("b.weight"), b)
    assert not torch.equal(a, b)
    assert not torch.equal(DummyWeights(shapes, torch.bfloat16, CPU, seed=6).get_tensor("a.weight"), a)


def test_the_dummy_tokenizer_spells_ids_as_numbers() -> None:
    tokenizer = Tokenizer(DummyTokenizer(1000))
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eos_token_ids) == ("ids", 1000, ())
    assert tokenizer.encode(" 12 407\n999 ", add_special_tokens=True) == [12, 407, 999]
    assert tokenizer.decode([12, 407, 999]) == "12 407 999"
    stream = tokenizer.detokenizer()
    assert [stream.step([12]), stream.step([407, 999]), stream.flush()] == ["12", " 407 999", ""]


@pytest.mark.parametrize("word", ["1000", "-1", "rain", "1.5", "٣", "²", "9" * 5000])
def test_a_word_that_is_not_an_id_is_refused(word: str) -> None:
    with pytest.raises(InputError, match="this model has no tokenizer and accepts only ids from 0 to 999"):
        Tokenizer(DummyTokenizer(1000)).encode(f"1 {word} 2")
