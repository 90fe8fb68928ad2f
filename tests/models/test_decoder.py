"""Log-probabilities and greedy tokens match transformers; loading hardly exceeds the weights' memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from trimtab.engine import Engine, Request, SamplingParams
from trimtab.models.layers.rotary_embedding import Rope, RotaryEmbedding

from ..helpers.memory_peak import peak_memory
from ..helpers.naive_decoders import StepwiseLogprobs, load_float64, load_reference
from ..helpers.tiny_model import TinyModel

if TYPE_CHECKING:
    from pathlib import Path

MODELS = {
    "grouped-tied": TinyModel(),
    "grouped-untied-sharded": TinyModel(tied=False, shards=3, seed=1),
    "multi-head": TinyModel(hidden=40, heads=5, kv_heads=5, intermediate=31, seed=2),
    "multi-query-wider-than-hidden": TinyModel(
        hidden=28, heads=4, kv_heads=1, head_dim=10, layers=3, tied=False, transformers_version=4, seed=3
    ),
    "head-dim-2": TinyModel(hidden=33, heads=3, kv_heads=3, head_dim=2, layers=3, shards=2, seed=4),
    "large-theta": TinyModel(hidden=48, heads=6, kv_heads=3, theta=1e6, transformers_version=4, seed=5),
}
LENGTH = 301
"""Prompt tokens: more than two attention tiles, and not a multiple of the block size."""


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param].write(tmp_path_factory.mktemp(request.param))


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (count,), generator=generator).tolist()


def test_log_probabilities_are_those_of_transformers(folder: Path) -> None:
    engine = Engine.from_pretrained(str(folder), kv_cache_memory="1MiB")
    ids = random_ids(LENGTH)
    ours = engine.score(ids)
    assert (ours.shape, ours.dtype) == ((LENGTH, 307), torch.float32)
    with torch.inference_mode():
        theirs, truth = (
            model(torch.tensor([ids])).logits[0].log_softmax(-1)
            for model in (load_reference(folder), load_float64(folder))
        )
    # the error to float64 is about that of transformers in float32
    ours_off, theirs_off = (ours - truth).abs(), (theirs - truth).abs()
    assert float(ours_off.square().mean().sqrt()) <= 1.5 * float(theirs_off.square().mean().sqrt()) + 1e-6
    assert float(ours_off.max()) <= 2 * float(theirs_off.max()) + 1e-5


def test_log_probabilities_of_the_demo_model_are_those_of_transformers(demo_folder: Path) -> None:
    engine = Engine.from_pretrained(str(demo_folder), dtype="float32", kv_cache_memory="64MiB")
    ids = engine.tokenizer.encode(
        "What happens if an earthworm is cut in half? It does not become two worms."
    )
    with torch.inference_mode():
        theirs = load_reference(demo_folder)(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert float((engine.score(ids) - theirs).abs().max()) <= 1e-4


def test_greedy_tokens_are_those_of_transformers(folder: Path) -> None:
    engine = Engine.from_pretrained(str(folder), kv_cache_memory="8MiB")
    model = load_reference(folder)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    prompts = [random_ids(3, seed=1), random_ids(110, seed=2)]  # the second grows into the next tile
    outputs = engine.generate([Request(branch_token_ids=[ids], sampling=sampling) for ids in prompts])
    for prompt, output in zip(prompts, outputs, strict=True):
        branches = StepwiseLogprobs(model, [prompt], engine.tokenizer.vocab_size)
        expected = []
        for _ in range(40):
            expected.append(int(branches.logprobs().argmax()))
            branches.append(expected[-1])
        assert output.token_ids == expected


def test_the_answer_to_a_one_token_prompt_matches_transformers(tiny_folder: Path, tiny: Engine) -> None:
    output = tiny.generate(Request(branch_token_ids=[[77]], sampling=SamplingParams(max_tokens=5)))
    branches = StepwiseLogprobs(load_reference(tiny_folder), [[77]], tiny.tokenizer.vocab_size)
    for token in output.token_ids:
        assert token == int(branches.logprobs().argmax())
        branches.append(token)


def test_half_precision_scores_stay_near_float32(tiny_folder: Path) -> None:
    """Rounding weights to 8 bits changes log-probabilities slightly; a layout error changes them strongly."""
    ids = random_ids(60)
    expected = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB").score(ids)
    for dtype, share in (("float16", 0.02), ("bfloat16", 0.15)):
        half = Engine.from_pretrained(str(tiny_folder), dtype=dtype, kv_cache_memory="1MiB").score(ids)
        assert 0 < float((half - expected).std()) <= share * float(expected.std())


def test_rotary_embedding_keeps_norms_and_rotates_by_position() -> None:
    table = RotaryEmbedding(Rope(theta=500.0), 6, torch.device("cpu"))
    cos, sin = table.cos_sin(torch.tensor([0, 1, 39]))
    assert cos.shape == sin.shape == (3, 6)
    assert torch.equal(cos[0], torch.ones_like(cos[0]))  # the first position
    assert torch.equal(sin[0], torch.zeros_like(sin[0]))
    angles = torch.tensor([1.0, 39.0], dtype=torch.float64)[:, None] * 500.0 ** (
        -torch.tensor([0.0, 2, 4], dtype=torch.float64) / 6
    )
    # an angle of 39 has an error of 39 · 2⁻²³ in float32
    for half, sign in ((slice(0, 3), -1), (slice(3, 6), 1)):
        torch.testing.assert_close(cos[1:, half].double(), angles.cos(), rtol=0, atol=1e-5)
        torch.testing.assert_close(sin[1:, half].double(), sign * angles.sin(), rtol=0, atol=1e-5)


def test_loading_takes_hardly_more_memory_than_the_weights(tmp_path: Path) -> None:
    """bfloat16 weights loaded as float32: the embedding stays memory-mapped, also as the source of the tied
    head, and a layer's source tensors are freed before the next layer is loaded."""
    tiny = TinyModel(hidden=256, vocab_size=40_000, intermediate=4096, layers=5, dtype=torch.bfloat16)
    weights = 4 * sum(tensor.numel() for tensor in tiny.tensors().values())
    setup = """
from trimtab.models.loader.loader import load_bundle
opened = load_bundle(sys.argv[1])
torch.ones(300, 300) @ torch.ones(300, 300)
"""
    load = "model = opened.load_model(torch.float32, torch.device('cpu'))"
    assert peak_memory(setup, load, tiny.write(tmp_path / "wide")) < 1.15 * weights
