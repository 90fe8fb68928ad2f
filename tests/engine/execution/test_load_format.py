"""`load_format="dummy"`: an engine with random weights, from a config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from trimtab.engine import Engine, Mato, Objective, Request, SamplingParams
from trimtab.kernels.common.errors import InputError, RunError
from trimtab.models.common import memory

from ...helpers.tiny_model import TinyModel, is_idle, train_tokenizer, write_json

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def config_folder(tmp_path: Path) -> Path:
    """A folder with only a config.json."""
    write_json(tmp_path / "config.json", TinyModel(tied=False).config())
    return tmp_path


def dummy_engine(model: Any, **fields: Any) -> Engine:
    return Engine.from_pretrained(str(model), load_format="dummy", kv_cache_memory="1MiB", **fields)


def test_dummy_weights_of_a_config_are_reproducible(config_folder: Path) -> None:
    steering = Mato([Objective("a", 0.7), Objective("b", 0.3)])
    request = Request(
        branch_token_ids=[[5, 6], [5, 7], [8]], steering=steering, sampling=SamplingParams(max_tokens=9)
    )
    first, second = (dummy_engine(config_folder) for _ in range(2))
    output = first.generate(request)
    assert output.text == " ".join(map(str, output.token_ids))
    assert (len(output.token_ids), output.finish_reason) == (9, "length")
    assert [branch.prompt for branch in output.branches] == ["5 6", "5 7", "8"]
    assert second.generate(request).token_ids == output.token_ids
    assert is_idle(first)


def test_every_row_of_a_dummy_embedding_may_be_sampled(config_folder: Path) -> None:
    engine = dummy_engine(config_folder)
    assert engine.score([306]).shape == (1, 307)


def test_a_chat_with_a_model_without_tokenizer_is_refused(config_folder: Path) -> None:
    with pytest.raises(InputError, match="branch_token_ids for the prompt"):
        dummy_engine(config_folder).generate(Request("hello"))
    with pytest.raises(InputError, match=r"chat_template needs a tokenizer, and .* has none"):
        dummy_engine(config_folder, chat_template="{{ messages }}")


def test_a_dummy_model_with_a_tokenizer_returns_text(config_folder: Path) -> None:
    backend = train_tokenizer()
    backend.save(str(config_folder / "tokenizer.json"))
    output = dummy_engine(config_folder, chat_template="{{ messages[-1]['content'] }}").generate(
        Request("kind and true", sampling=SamplingParams(max_tokens=5, skip_special_tokens=False))
    )
    prompt = output.branches[0]
    assert "kind and true" in prompt.prompt
    assert prompt.prompt_token_ids == backend.encode(prompt.prompt).ids
    assert output.text == backend.decode(output.token_ids, skip_special_tokens=False)


def test_a_folder_without_weights_needs_load_format_dummy(config_folder: Path) -> None:
    train_tokenizer().save(str(config_folder / "tokenizer.json"))
    with pytest.raises(InputError, match=r"has neither model\.safetensors nor"):
        Engine.from_pretrained(str(config_folder))


def test_a_built_in_shape_has_no_weights_to_load() -> None:
    message = (
        "model is 'llama-3.2-1b', a config without weights; use a checkpoint's folder or load_format 'dummy'"
    )
    with pytest.raises(InputError, match=message):
        Engine.from_pretrained("llama-3.2-1b")


def test_a_model_larger_than_memory_is_refused_before_allocation(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 3 * 2**30)
    message = "^the model in bfloat16 needs 131 GiB of memory; this machine has 3 GiB free$"
    with pytest.raises(RunError, match=message):
        dummy_engine("llama-3.1-70b")
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(RunError, match="the model in float32 needs"):
        Engine.from_pretrained(str(tiny_folder))


def test_an_unknown_load_format_is_refused(config_folder: Path) -> None:
    with pytest.raises(InputError, match="load_format is 'lazy'; it must be one of auto, dummy"):
        Engine.from_pretrained(str(config_folder), load_format="lazy")
