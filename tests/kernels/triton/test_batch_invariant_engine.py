"""With batch_invariant, engine outputs for a request are bitwise independent of the rest of the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from trimtab.engine import (
    Amulet,
    Base,
    Engine,
    Mato,
    Objective,
    Opad,
    Request,
    SamplingParams,
)
from trimtab.engine.execution.cuda_graphs import CUDAGraphRunner
from trimtab.engine.execution.model_runner import inference_context
from trimtab.kernels.triton import tuning

from ...harness import get_runner
from ...helpers.fake_graph import fake_capture
from ...helpers.tiny_model import TinyModel, is_idle

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.engine.methods.base import Method
    from trimtab.engine.outputs import Output
    from trimtab.kernels.reference.paged_kv_cache import PagedKVCache

KIND, SHORT = Objective("Be kind."), Objective("Be short.", 2)
TOKENS = 3
BLOCK_BYTES = 2 * 2 * 16 * 12 * 4
"""Keys and values · KV heads · block size · head_dim · 4 bytes."""

pytestmark = pytest.mark.usefixtures("tensor_cores", "short_splits")


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the splits so that these prompts have several."""
    attention = replace(tuning.DEFAULT_CONFIGS.attention, split=32, keys=32)
    monkeypatch.setattr(
        tuning, "get_launch_configs", lambda device: replace(tuning.DEFAULT_CONFIGS, attention=attention)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = TinyModel(hidden=40, heads=4, kv_heads=2, head_dim=12, layers=1, seed=3)
    return tiny.write(tmp_path_factory.mktemp("tiny"))


def make_engine(folder: Path, **fields: Any) -> Engine:
    defaults = {"kv_cache_memory": "1MiB", "block_size": 16, "kernels": "triton", "batch_invariant": True}
    return Engine.from_pretrained(str(folder), **(defaults | fields))


def make_requests() -> list[Request]:
    """Requests that use different step features, with prompts of one and of several splits."""
    greedy: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True}
    sampled = {**greedy, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 5}
    cases: list[tuple[Method, dict[str, Any], tuple[int, ...]]] = [
        (Amulet([KIND], kl_budget=0.2), greedy, (40, 37)),
        (Base(), {**greedy, "logprobs": 3}, (41,)),
        (Mato([KIND, SHORT]), sampled, (40, 20, 34)),
        (Opad([SHORT]), {**greedy, "repetition_penalty": 1.2}, (9, 18)),
    ]
    return [
        Request(
            branch_token_ids=list(map(prompt, lengths)), steering=method, sampling=SamplingParams(**fields)
        )
        for method, fields, lengths in cases
    ]


def prompt(length: int) -> list[int]:
    """Token ids that are no prefix of those of another length."""
    return [5 + length * n % 290 for n in range(length)]


def answers_alone(folder: Path, requests: list[Request]) -> list[Output]:
    engine = make_engine(folder, enable_prefix_caching=False)
    return [engine.generate(request) for request in requests]


def assert_same_outputs(actual: list[Output], expected: list[Output]) -> bool:
    for one, other in zip(actual, expected, strict=True):
        assert (one.error, other.error) == (None, None)
        assert one.token_ids == other.token_ids
        assert one.trace is not None
    return [(one.trace, one.logprobs) for one in actual] == [(one.trace, one.logprobs) for one in expected]


def test_batched_prefix_cached_and_replayed_requests_give_the_same_bits_as_alone(folder: Path) -> None:
    engine, exact = make_engine(folder), answers_alone(folder, make_requests())
    assert assert_same_outputs(engine.generate(make_requests()), exact)
    runner, cached = get_runner(engine), engine.stats.cached
    cache: PagedKVCache = runner.cache  # type: ignore[assignment]
    with inference_context():
        runner.cuda_graphs = CUDAGraphRunner(runner.model, cache, 8, 128, fake_capture)
    assert assert_same_outputs(engine.generate(make_requests()), exact)
    assert engine.stats.cached > cached + 64


def test_chunked_and_preempted_requests_give_the_same_bits_as_alone(folder: Path) -> None:
    """Both requests need a fourth block for their answers, and only one is free."""
    sampling = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=2)
    prompts = [[first, *prompt(47)] for first in (7, 11)]
    same_prompts = [Request(branch_token_ids=[ids], steering=Base(), sampling=sampling) for ids in prompts]
    engine = make_engine(folder, kv_cache_memory=7 * BLOCK_BYTES, max_num_seqs=2, max_num_batched_tokens=19)
    assert engine.stats.pages == 7
    assert assert_same_outputs(engine.generate(same_prompts), answers_alone(folder, same_prompts))
    assert engine.stats.preemptions > 0
    assert is_idle(engine)


@pytest.mark.parametrize("invariant", [True, False])
def test_a_prompt_in_one_chunk_equals_one_token_by_token_only_with_batch_invariance(
    folder: Path, invariant: bool
) -> None:
    outputs = []
    for max_batched in (1, 2048):
        fields = {"max_num_seqs": 1, "max_num_batched_tokens": max_batched, "batch_invariant": invariant}
        outputs.append([make_engine(folder, **fields).generate(make_requests()[1])])
    assert assert_same_outputs(*outputs) is invariant
