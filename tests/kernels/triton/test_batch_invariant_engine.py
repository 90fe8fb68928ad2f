"""With batch_invariant a whole model's log-probabilities are a request's own, to the last bit."""

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
from trimtab.engine.execution.cuda_graphs import DecodeGraphs
from trimtab.engine.execution.model_runner import plain_tensors
from trimtab.kernels.triton import tuning

from ...helpers.fake_graph import again
from ...helpers.tiny_model import Tiny, at_rest

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.engine.methods.base import Method
    from trimtab.engine.outputs import Output
    from trimtab.kernels.reference.paged_kv_cache import DeviceKV

KIND, SHORT = Objective("Be kind."), Objective("Be short.", 2)
TOKENS = 3
PAGE = 2 * 2 * 16 * 12 * 4
"""Bytes: keys and values, their heads, tokens, numbers of four bytes."""

pytestmark = pytest.mark.usefixtures("tensor_cores", "short_splits")


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that these prompts have several."""
    attention = replace(tuning.SHIPPED.attention, split=32, keys=32)
    monkeypatch.setattr(tuning, "of", lambda device: replace(tuning.SHIPPED, attention=attention))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = Tiny(hidden=40, heads=4, kv_heads=2, head_dim=12, layers=1, seed=3)
    return tiny.write(tmp_path_factory.mktemp("tiny"))


def opened(folder: Path, **fields: Any) -> Engine:
    usual = {"kv_cache_memory": "1MiB", "block_size": 16, "kernels": "triton", "batch_invariant": True}
    return Engine.from_pretrained(str(folder), **(usual | fields))


def requests() -> list[Request]:
    """Each asks a step for something else; their prompts are of one and of several splits."""
    greedy: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True}
    drawn = {**greedy, "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 5}
    asked: list[tuple[Method, dict[str, Any], tuple[int, ...]]] = [
        (Amulet([KIND], kl_budget=0.2), greedy, (40, 37)),
        (Base(), {**greedy, "logprobs": 3}, (41,)),
        (Mato([KIND, SHORT]), drawn, (40, 20, 34)),
        (Opad([SHORT]), {**greedy, "repetition_penalty": 1.2}, (9, 18)),
    ]
    return [
        Request(
            branch_token_ids=list(map(prompt, lengths)), steering=method, sampling=SamplingParams(**fields)
        )
        for method, fields, lengths in asked
    ]


def prompt(length: int) -> list[int]:
    """Ids that another length does not begin with."""
    return [5 + length * n % 290 for n in range(length)]


def alone(folder: Path, asked: list[Request]) -> list[Output]:
    engine = opened(folder, enable_prefix_caching=False)
    return [engine.generate(request) for request in asked]


def same(found: list[Output], expected: list[Output]) -> bool:
    for one, other in zip(found, expected, strict=True):
        assert (one.error, other.error) == (None, None)
        assert one.token_ids == other.token_ids
        assert one.trace is not None
    return [(one.trace, one.logprobs) for one in found] == [(one.trace, one.logprobs) for one in expected]


def test_together_and_from_the_prefix_cache_and_replayed_requests_are_as_alone(folder: Path) -> None:
    engine, exact = opened(folder), alone(folder, requests())
    assert same(engine.generate(requests()), exact)
    runner, cached = engine._core.runner, engine.stats.cached
    cache: DeviceKV = runner.cache  # type: ignore[assignment]
    with plain_tensors():
        runner.graphs = DecodeGraphs(runner.model, cache, 8, 128, again)
    assert same(engine.generate(requests()), exact)
    assert engine.stats.cached > cached + 64


def test_in_pieces_and_preempted_requests_are_as_alone(folder: Path) -> None:
    """Both need a fourth page for their answers, and there is one."""
    sampling = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=2)
    prompts = [[first, *prompt(47)] for first in (7, 11)]
    asked = [Request(branch_token_ids=[ids], steering=Base(), sampling=sampling) for ids in prompts]
    engine = opened(folder, kv_cache_memory=7 * PAGE, max_num_seqs=2, max_num_batched_tokens=19)
    assert engine.stats.pages == 7
    assert same(engine.generate(asked), alone(folder, asked))
    assert engine.stats.preemptions > 0
    assert at_rest(engine)


@pytest.mark.parametrize("invariant", [True, False])
def test_a_prompt_in_one_piece_is_as_one_token_by_token_and_without_it_is_not(
    folder: Path, invariant: bool
) -> None:
    found = []
    for most in (1, 2048):
        fields = {"max_num_seqs": 1, "max_num_batched_tokens": most, "batch_invariant": invariant}
        found.append([opened(folder, **fields).generate(requests()[1])])
    assert same(*found) is invariant
