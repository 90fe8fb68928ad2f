"""A whole model decodes with Triton's kernels as it does with torch's operations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from trimtab.engine import (
    Amulet,
    Base,
    Engine,
    LinearAlignment,
    Mato,
    Objective,
    Opad,
    Request,
    SamplingParams,
)
from trimtab.tools.gpu import shapes

from ...tiny import Tiny, at_rest

KIND, SHORT = Objective("Be kind."), Objective("Be short.", 2)
TOKENS = 4


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    folder = Tiny(hidden=40, heads=4, kv_heads=2, head_dim=12, seed=3).write(tmp_path_factory.mktemp("tiny"))
    triton, plain = (
        Engine.from_pretrained(str(folder), kv_cache_memory="1MiB", block_size=16, kernels=kernels)
        for kernels in ("triton", "torch")
    )
    return triton, plain


def requests() -> list[Request]:
    """Every kind of method and draw, prompts of one and of several pages, joined in one batch."""
    greedy = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    drawn = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0.8, top_k=40, top_p=0.95, seed=5)
    return [
        Request("Why?", Base(), greedy),
        Request("What happens if an earthworm is cut in half?", Amulet([KIND]), greedy),
        Request("Why?", Mato([KIND, SHORT], kl_budget=0.2), drawn),
        Request("naïve café", LinearAlignment([KIND]), greedy),
        Request("What?", Opad([SHORT]), greedy),
    ]


def test_answers_are_the_same_and_their_numbers_near(engines: tuple[Engine, Engine]) -> None:
    found, expected = (engine.generate(requests()) for engine in engines)
    for one, other in zip(found, expected, strict=True):
        assert one.error is None
        assert one.token_ids == other.token_ids
        assert one.trace is not None
        assert other.trace is not None
        for name in ("weights", "branch_logprobs", "rewards"):
            for row, exact in zip(getattr(one.trace, name), getattr(other.trace, name), strict=True):
                assert row == pytest.approx(exact, abs=1e-4)
        assert one.trace.strength == pytest.approx(other.trace.strength, rel=1e-2)
        kls = zip(one.trace.kl, other.trace.kl, strict=True)
        assert all(a == b or math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-4) for a, b in kls)  # type: ignore[arg-type]
    assert all(map(at_rest, engines))


def test_scores_are_near(engines: tuple[Engine, Engine]) -> None:
    ids = [5 + 7 * n % 290 for n in range(40)]
    ours, reference = (engine.score(ids) for engine in engines)
    assert float((ours - reference).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["mistral", "qwen3"])
def test_scores_are_near_with_windows_norms_of_heads_and_turns_by_the_length(
    tmp_path: Path, kind: str
) -> None:
    folder = shapes.write(tmp_path / "model", kind, shapes.TINY, torch.float32)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"max_position_embeddings": 20, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ids = [5 + 7 * n % 290 for n in range(50)]
    ours, reference = (
        Engine.from_pretrained(str(folder), kv_cache_memory="1MiB", block_size=16, kernels=kernels).score(ids)
        for kernels in ("triton", "torch")
    )
    assert float((ours - reference).abs().max()) < 1e-4


def test_an_answer_is_its_own_alone_and_in_a_crowd(engines: tuple[Engine, Engine]) -> None:
    triton, _ = engines
    first, second, *_ = requests()
    alone, crowded = triton.generate(second), triton.generate([first, second])[1]
    assert (alone.token_ids, alone.trace) == (crowded.token_ids, crowded.trace)


def test_prompts_may_be_cut_and_pages_be_few(tmp_path: Path) -> None:
    folder = Tiny(hidden=40, heads=4, kv_heads=2, head_dim=12, seed=3).write(tmp_path / "tiny")
    narrow = Engine.from_pretrained(
        str(folder),
        kv_cache_memory="80KiB",
        block_size=16,
        max_num_seqs=6,
        max_num_batched_tokens=23,
        kernels="triton",
    )
    roomy = Engine.from_pretrained(str(folder), kv_cache_memory="1MiB", block_size=16, kernels="torch")
    asked = [requests()[0], requests()[1]]
    found, expected = narrow.generate(asked), roomy.generate(asked)
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]
    assert narrow.stats.steps > 2 * TOKENS
