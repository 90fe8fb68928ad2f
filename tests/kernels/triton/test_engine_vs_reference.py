"""Engines with Triton kernels against engines with torch operations, on complete models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from trimtab.engine import (
    Amulet,
    Base,
    Engine,
    LinearAlignment,
    Mato,
    Mixture,
    Objective,
    Opad,
    Request,
    SamplingParams,
)
from trimtab.kernels.triton.lm_head import launch as launch_module
from trimtab.kernels.triton.lm_head.plan import FusedPlan
from trimtab.tools.gpu import tiny_models

from ...helpers.tiny_model import TinyModel, is_idle

if TYPE_CHECKING:
    from trimtab.engine import Method

KIND, SHORT = Objective("Be kind."), Objective("Be short.", 2)
TOKENS = 4


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    folder = TinyModel(hidden=40, heads=4, kv_heads=2, head_dim=12, seed=3).write(
        tmp_path_factory.mktemp("tiny")
    )
    triton, plain = (
        Engine.from_pretrained(str(folder), kv_cache_memory="1MiB", block_size=16, kernels=kernels)
        for kernels in ("triton", "torch")
    )
    return triton, plain


def make_requests() -> list[Request]:
    """Different methods and sampling settings, prompts of one and of several KV blocks, for one batch."""
    greedy = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    sampled = SamplingParams(
        max_tokens=TOKENS, ignore_eos=True, temperature=0.8, top_k=40, top_p=0.95, seed=5
    )
    return [
        Request("Why?", Base(), greedy),
        Request("What happens if an earthworm is cut in half?", Amulet([KIND]), greedy),
        Request("Why?", Mato([KIND, SHORT], kl_budget=0.2), sampled),
        Request("naïve café", LinearAlignment([KIND]), greedy),
        Request("What?", Opad([SHORT]), greedy),
    ]


def assert_engines_agree(engines: tuple[Engine, Engine], requests: list[Request]) -> None:
    """Assert equal tokens and close traces."""
    actual, expected = (engine.generate(requests) for engine in engines)
    for one, other in zip(actual, expected, strict=True):
        assert (one.error, one.token_ids) == (None, other.token_ids)
        assert (one.trace is None) == (other.trace is None)
        if one.trace is None or other.trace is None:
            continue
        for name in ("weights", "branch_logprobs", "rewards", "fulfilment"):
            for row, exact in zip(getattr(one.trace, name), getattr(other.trace, name), strict=True):
                assert row == pytest.approx(exact, abs=1e-4)
        assert one.trace.strength == pytest.approx(other.trace.strength, rel=1e-2)
        kls = zip(one.trace.kl, other.trace.kl, strict=True)
        assert all(a == b or math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-4) for a, b in kls)  # type: ignore[arg-type]
    assert all(map(is_idle, engines))


def test_triton_and_torch_engines_give_the_same_tokens_and_close_traces(
    engines: tuple[Engine, Engine],
) -> None:
    assert_engines_agree(engines, make_requests())


def make_request(method: Method, trace: bool = False, **sampling: Any) -> Request:
    """A request with prompts of two tokens."""
    ids = [[5 + 9 * branch, 6] for branch in range(1 + len(method.branch_objectives()))]
    greedy = SamplingParams(max_tokens=3, ignore_eos=True, **sampling)
    return Request(branch_token_ids=ids, steering=method, sampling=greedy, trace=trace)


SAMPLING_PATHS = {
    "fused": [make_request(Mato([KIND, SHORT])), make_request(Base(), temperature=0.8, seed=3)],
    "fused with trace": [
        make_request(Base(), trace=True),
        make_request(Base(), trace=True, temperature=0.8, seed=3),
    ],
    "mixed before head": [
        make_request(Amulet([KIND])),
        make_request(Mixture([KIND, SHORT]), temperature=0.8, seed=3),
    ],
    "mixed before head, stored": [
        make_request(Amulet([KIND])),
        make_request(Base(), temperature=0.8, top_k=9, seed=3),
    ],
    "stored": [
        make_request(Amulet([KIND]), trace=True, logprobs=2),
        make_request(Mato([KIND, SHORT], kl_budget=0.2)),
    ],
    "unfused": [make_request(Opad([SHORT])), make_request(Mato([KIND, SHORT], kl_budget=0.2))],
}


@pytest.mark.parametrize("path", SAMPLING_PATHS)
def test_every_path_from_hidden_states_to_tokens_is_used_and_matches_torch(
    engines: tuple[Engine, Engine], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[str] = []

    def record_plan(*args: Any, **named: Any) -> FusedPlan | None:
        plan = FusedPlan.from_features(*args, **named)
        paths.append(path_name(plan))
        return plan

    monkeypatch.setattr(launch_module, "FusedPlan", SimpleNamespace(from_features=record_plan))
    assert_engines_agree(engines, SAMPLING_PATHS[path])
    assert paths == [path] * 3


def path_name(plan: FusedPlan | None) -> str:
    if plan is None:
        return "unfused"
    if plan.mix_before_head:
        return "mixed before head, stored" if plan.materialize else "mixed before head"
    if plan.materialize:
        return "stored"
    return "fused with trace" if plan.branch_logprobs and plan.branch_slots == 1 else "fused"


def test_triton_scores_are_close_to_torch(engines: tuple[Engine, Engine]) -> None:
    ids = [5 + 7 * n % 290 for n in range(40)]
    ours, reference = (engine.score(ids) for engine in engines)
    assert float((ours - reference).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_scores_are_close_with_sliding_windows_qk_norms_and_dynamic_rope(tmp_path: Path, kind: str) -> None:
    folder = tiny_models.write_model(tmp_path / "model", kind, tiny_models.TINY_MODEL, torch.float32)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"max_position_embeddings": 20, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ids = [5 + 7 * n % 290 for n in range(50)]
    ours, reference = (
        Engine.from_pretrained(str(folder), kv_cache_memory="1MiB", block_size=16, kernels=kernels).score(ids)
        for kernels in ("triton", "torch")
    )
    assert float((ours - reference).abs().max()) < 1e-4


def test_an_answer_is_the_same_alone_and_batched(engines: tuple[Engine, Engine]) -> None:
    triton, _ = engines
    first, second, *_ = make_requests()
    alone, batched = triton.generate(second), triton.generate([first, second])[1]
    assert (alone.token_ids, alone.trace) == (batched.token_ids, batched.trace)


def test_chunked_prompts_and_few_blocks_give_the_same_answers(tmp_path: Path) -> None:
    folder = TinyModel(hidden=40, heads=4, kv_heads=2, head_dim=12, seed=3).write(tmp_path / "tiny")
    small_engine = Engine.from_pretrained(
        str(folder),
        kv_cache_memory="80KiB",
        block_size=16,
        max_num_seqs=6,
        max_num_batched_tokens=23,
        kernels="triton",
    )
    large_engine = Engine.from_pretrained(str(folder), kv_cache_memory="1MiB", block_size=16, kernels="torch")
    requests = [make_requests()[0], make_requests()[1]]
    actual, expected = small_engine.generate(requests), large_engine.generate(requests)
    assert [output.token_ids for output in actual] == [output.token_ids for output in expected]
    assert small_engine.stats.steps > 2 * TOKENS
