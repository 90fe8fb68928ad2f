"""The fused last product gives the tokens of its float64 logits, and tells of them what `steer` tells."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from trimtab.engine.methods.builtin import (
    Amulet,
    Base,
    ContextSteering,
    Guidance,
    LinearAlignment,
    Mato,
    Mixture,
    Opad,
)
from trimtab.kernels.lm_head import lm_head_steer as torch_lm_head_steer
from trimtab.kernels.lm_head import product
from trimtab.kernels.steering.features import Features
from trimtab.kernels.steering.state import Draw, Edits
from trimtab.kernels.steering.step import steer as reference
from trimtab.kernels.triton.configs import TUNING, Tile, Tuning
from trimtab.kernels.triton.lm_head import launch as launching
from trimtab.kernels.triton.lm_head.launch import lm_head_steer
from trimtab.kernels.triton.lm_head.plan import Plan
from trimtab.kernels.triton.steering import step as steering
from trimtab.kernels.triton.steering import top_k_top_p as searching

from ..steering_harness import wishes
from .test_steering import (
    DEVICE,
    EVERY,
    FLAT,
    SAMPLED,
    NoReading,
    Request,
    edits_of,
    layout,
    near,
    of_request,
    same,
    table_of,
    told_alike,
    without_region,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trimtab.kernels.steering.state import Groups
    from trimtab.kernels.steering.step import Choice

WARM = Draw(temperature=0.7, seed=11)
SMALL = Tuning({rows: Tile(128, 32, 4, 2) for rows in (16, 64)}, most_rows=10**6)
"""Tiles for a width of few numbers; any number of rows is fused."""
VOCAB, NAMED, WIDTH = 333, 326, 41
PAIRS = [request for request in EVERY if len(request.branches) <= 2]
MANY = [request for request in EVERY if not (isinstance(request.method, LinearAlignment | Opad))]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def head_of(vocab: int = VOCAB, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[vocab, width]."""
    return torch.randn(vocab, width, generator=torch.Generator().manual_seed(99)).to(DEVICE, dtype)


def hidden_of(
    groups: Groups, seed: int, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16, apart: float = 1
) -> Tensor:
    """Hidden states of branches that agree but for `apart`, [rows, width]."""
    generator = torch.Generator().manual_seed(seed)
    common = 3 * torch.randn(len(groups.table), width, generator=generator)
    own = apart * torch.randn(len(groups.branch), width, generator=generator)
    return ((common.to(DEVICE)[groups.owner] + own.to(DEVICE)) * width**-0.5).to(dtype)


def fused(
    requests: Sequence[Request],
    hidden: Sequence[Tensor],
    weight: Tensor,
    edits: Edits | None = None,
    named: int = NAMED,
    tuning: Tuning = SMALL,
    **options: bool,
) -> list[Choice]:
    table, groups = table_of(requests, named), layout(requests)
    return [lm_head_steer(h, weight, groups, table, edits, tuning=tuning, **options) for h in hidden]


def expected(
    multiply: Callable[[Tensor, Tensor], Tensor],
    requests: Sequence[Request],
    hidden: Sequence[Tensor],
    weight: Tensor,
    edits: Edits | None = None,
    named: int = NAMED,
    **options: bool,
) -> list[Choice]:
    """`steer` of torch, of logits that `multiply` makes."""
    table, groups = table_of(requests, named), layout(requests)
    return [reference(multiply(h, weight), groups, table, edits, **options) for h in hidden]


def exactly(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.double() @ weight.double().T


def agree(
    requests: Sequence[Request],
    hidden: Sequence[Tensor],
    weight: Tensor,
    edits: Edits | None = None,
    **options: Any,
) -> None:
    """The tokens are those of float64 logits; what is told is as near to those as torch in float32."""
    got = fused(requests, hidden, weight, edits, **options)
    options.pop("tuning", None)
    truths = expected(exactly, requests, hidden, weight, edits, **options)
    rough = expected(product, requests, hidden, weight, edits, **options)
    free = without_region(requests)
    for ours, single, truth in zip(got, rough, truths, strict=True):
        assert torch.equal(ours.tokens, truth.tokens)
        told_alike(ours, single, truth, free)
        if options.get("top"):
            assert ours.top is not None
            assert single.top is not None
            assert truth.top is not None
            assert near(ours.top[0][free], single.top[0][free], truth.top[0][free])
            assert torch.equal(ours.top[1][free], truth.top[1][free])


@pytest.mark.parametrize("requests", [PAIRS, MANY], ids=["pairs", "many"])
def test_every_method_and_draw_over_stored_rows_with_edits(requests: list[Request]) -> None:
    groups = layout(requests)
    hidden = [hidden_of(groups, seed) for seed in range(3)]
    agree(requests, hidden, head_of(), edits_of(len(requests)), trace=True, top=True)


def test_what_decides_on_chip() -> None:
    rewarded = [
        Request(Base(), WARM),
        Request(Mato(wishes(1.0, 3.0), tau=0.5), Draw(temperature=1.0, seed=1)),
        Request(Mato(wishes(0.1, 0.0, 0.3), accumulate="ema", utility="reward")),
        Request(Mixture(wishes(0.5, 0.2, 0.3)), WARM),
        Request(ContextSteering(wishes(0.5, 0.0, 2.0), strength=-1.5)),
    ]
    hidden = [hidden_of(layout(rewarded), seed) for seed in range(3)]
    agree(rewarded, hidden, head_of(), trace=False)
    plain = [Request(Base()), Request(Base(), WARM), Request(Base(), Draw(temperature=2.0, seed=-5))]
    agree(plain, [hidden_of(layout(plain), seed) for seed in range(3)], head_of(), trace=True)


def test_hidden_states_mixed_before_the_product() -> None:
    requests = [
        Request(Amulet(wishes(1.0))),
        Request(Guidance(wishes(1.0)), WARM),
        Request(Mixture(wishes(0.5, 0.2, 0.3))),
        Request(Base(), WARM),
        Request(ContextSteering(wishes(0.5, 0.0, 2.0), strength=-1.5)),
    ]
    hidden = [hidden_of(layout(requests), seed) for seed in range(3)]
    agree(requests, hidden, head_of(), trace=False)
    filtered = [*requests, Request(Amulet(wishes(1.0)), SAMPLED), Request(Mixture(wishes(1.0, 1.0)), FLAT)]
    hidden = [hidden_of(layout(filtered), seed) for seed in range(2)]
    agree(filtered, hidden, head_of(), edits_of(len(filtered)), trace=False)


def test_what_the_type_of_hidden_states_rounds_off_is_multiplied_too() -> None:
    """Among requests whose token it would change: a GPU rounds to the nearest, the interpreter cuts off."""
    strength, weight = Amulet(wishes(1.0)).program().scale, head_of(512)
    many = hidden_of(layout([Request(Amulet(wishes(1.0)))] * 2000), 0)
    base, wish = many.double().unflatten(0, (-1, 2)).unbind(1)
    mixed = base + strength * (wish - base)
    cut = (mixed.float().view(torch.int32) & -(2**16)).view(torch.float32)
    tokens, rounded, shortened = (exactly(h, weight).argmax(-1) for h in (mixed, mixed.bfloat16(), cut))
    assert all(int((found != tokens).sum()) > 3 for found in (rounded, shortened))
    changed = ((rounded != tokens) | (shortened != tokens)).nonzero()[:, 0]
    hidden = many.unflatten(0, (-1, 2))[changed].flatten(0, 1)
    (choice,) = fused([Request(Amulet(wishes(1.0)))] * len(changed), [hidden], weight, named=512, trace=False)
    assert torch.equal(choice.tokens, tokens[changed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_splits_of_the_vocabulary_in_every_type(dtype: torch.dtype) -> None:
    vocab = 2048 + 41
    weight = head_of(vocab, dtype=dtype)
    for trace, requests in ((True, [EVERY[index] for index in (3, 8, 6)]), (False, [EVERY[9], EVERY[1]])):
        hidden = [hidden_of(layout(requests), seed, dtype=dtype) for seed in range(2)]
        agree(requests, hidden, weight, named=vocab, trace=trace)


@pytest.mark.parametrize("trace", [True, False])
def test_a_request_gives_the_same_bits_in_a_crowd_as_alone_with_no_to_fifteen_objectives(trace: bool) -> None:
    draws = [Draw(), WARM] if not trace else [Draw(), WARM, FLAT]
    crowd = [Request(Base(), draws[1])]
    for count in (1, 2, 3, 5, 8, 15):
        budget = 0.05 if trace and count % 5 == 0 else None
        method = Mato(wishes(*range(1, count + 1)), tau=0.5, kl_budget=budget)
        crowd.append(Request(method, draws[count % len(draws)]))
    groups, weight = layout(crowd), head_of()
    hidden = [hidden_of(groups, seed) for seed in (0, 1)]
    tuning = Tuning({16: SMALL.tiles[16]}, SMALL.most_rows)
    together = fused(crowd, hidden, weight, tuning=tuning, trace=trace)
    for index in (0, 1, 3, 4, 6):
        first, count = int(groups.first[index]), int(groups.count[index])
        rows = [h[first : first + count].contiguous() for h in hidden]
        objectives = len(crowd[index].method.weights())
        alone = fused([crowd[index]], rows, weight, tuning=tuning, trace=trace or index == 0)
        for single, many in zip(alone, together, strict=True):
            if index == 0 and not trace:  # alone it needs no normalisers, and would be another launch
                assert torch.equal(single.tokens[0], many.tokens[0])
                continue
            there = of_request(many, groups, index, objectives)
            assert same(of_request(single, layout([crowd[index]]), 0, objectives), there), index


def test_a_request_of_more_branches_than_the_smallest_tile_has_rows() -> None:
    requests = [Request(Mato(wishes(*range(1, 41)))), Request(Base()), Request(Mato(wishes(1.0)))]
    for trace in (True, False):
        agree(requests, [hidden_of(layout(requests), 0)], head_of(), trace=trace)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["stored", "on chip", "mixed before"])
def test_a_row_that_is_not_finite_fails_its_own_request_and_no_other(value: float, kind: str) -> None:
    requests = [Request(Base()), Request(Amulet(wishes(1.0)), WARM), Request(Mixture(wishes(0.0, 1.0, 2.0)))]
    requests += (
        [Request(Mato(wishes(1.0, 2.0)))] if kind != "mixed before" else [Request(Amulet(wishes(1.0)))]
    )
    trace, groups = kind == "stored", layout(requests)
    healthy = hidden_of(groups, 0)
    ill = healthy.clone()
    for index in (1, 2):
        ill[groups.first[index], 7] = value  # of the mixture, a branch that weighs nothing
    (well,), (sick,) = (fused(requests, [h], head_of(), trace=trace) for h in (healthy, ill))
    assert sick.failed.tolist() == [False, True, True, False]
    assert sick.tokens[1:3].tolist() == [0, 0]
    for index in (0, 3):
        objectives = len(requests[index].method.weights())
        pair = [of_request(choice, groups, index, objectives) for choice in (well, sick)]
        assert same(*pair), index


@pytest.mark.parametrize("trace", [True, False])
def test_the_lowest_of_tied_tokens_is_chosen(trace: bool) -> None:
    weight = head_of()
    hidden = hidden_of(layout([Request(Base())]), 0)
    weight[[70, 90, 300]] = 4 * hidden / hidden.norm()
    (choice,) = fused([Request(Base())], [hidden], weight, trace=trace)
    assert choice.tokens.tolist() == [70]


@pytest.mark.parametrize("trace", [True, False])
def test_rows_of_the_head_without_a_token_are_never_chosen(trace: bool) -> None:
    requests, weight = [Request(Mato(wishes(1.0))), Request(Base(), WARM)], head_of()
    hidden = hidden_of(layout(requests), 0, apart=0)
    weight[NAMED:] = 20 * hidden.float().sum(0).to(weight.dtype)
    agree(requests, [hidden], weight, trace=trace)


class Noted:
    """A jitted function that notes its launches."""

    def __init__(self, function: Any, names: list[str]) -> None:
        self.function, self.names = function, names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.names.append(self.function.__name__.removesuffix("_kernel"))
        return self.function[grid]


ENDS = ["settle", "finish"]
ROWS = ["weigh", "weigh", "project", "mix"]
SEARCH = ["survey", "survey", "gather", "halve"]
LAUNCHED = {
    "Mato": ([EVERY[0], EVERY[10]], False, ["weigh", "project", *ENDS]),
    "Base, traced": ([Request(Base(), WARM)], True, ["weigh", "project", *ENDS]),
    "Amulet": ([EVERY[9], EVERY[0]], False, ["weigh", "blend", "project", *ENDS]),
    "Amulet, traced": ([EVERY[9]], True, [*ROWS, "score", *ENDS]),
    "top-k": (
        [Request(Amulet(wishes(1.0)), Draw(0.7, top_k=3))],
        False,
        ["weigh", "weigh", "blend", "project", "mix", "score", *SEARCH, "choose", *ENDS],
    ),
    "trust region": ([EVERY[6]], False, [*ROWS, "refine", "score", *ENDS]),
    "mask": ([EVERY[3]], False, [*ROWS, *SEARCH, "score", *ENDS]),
    "delay": ([EVERY[7]], False, [*ROWS, "score", *ENDS]),
    "mask among many branches": (
        [EVERY[3], EVERY[10]],
        False,
        ["weigh", "mix", *SEARCH, "score", "finish"],
    ),
    "too many rows": ([EVERY[10]] * 17, False, ["weigh", "mix", "score", "finish"]),
}


@pytest.mark.parametrize("what", LAUNCHED)
def test_what_a_step_launches_is_fixed_and_nothing_is_read_back(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    requests, trace, launches = LAUNCHED[what]
    for module in (launching, steering, searching):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Noted(getattr(module, name), names))
    table, groups = table_of(requests, 9), layout(requests)
    hidden, weight = hidden_of(groups, 0), head_of(9)
    with NoReading():
        lm_head_steer(hidden, weight, groups, table, trace=trace)
    assert names == launches


def test_beyond_the_rows_of_the_table_one_product_follows_the_other() -> None:
    requests = [Request(Mato(wishes(1.0)))] * 33
    hidden, weight = hidden_of(layout(requests), 0), head_of()
    (choice,) = fused(requests, [hidden], weight, tuning=TUNING)
    table = table_of(requests, NAMED)
    truth = torch_lm_head_steer(hidden, weight, layout(requests), table)
    assert torch.equal(choice.tokens, truth.tokens)
    assert torch.allclose(choice.logprob, truth.logprob, atol=1e-5, rtol=0)


def plan_of(requests: Sequence[Request], tuning: Tuning = TUNING, *, trace: bool = False) -> Plan:
    groups, table = layout(requests), table_of(requests, 9)
    features = Features.of(groups, table)
    plan = Plan.of(features, groups, table, trace=trace, top=False, edited=False, tuning=tuning)
    assert plan is not None
    return plan


def test_a_plan_knows_its_tiles_bytes_and_operations() -> None:
    """Of Llama 3.1 8B's head, by hand."""
    vocab, width = 128_256, 4096
    eight = plan_of([Request(Mato(wishes(*[1.0] * 4)))] * 8)
    assert (eight.slots, eight.rows, eight.row_tiles, eight.tiles(vocab)) == (8, 64, 1, 1002)
    assert eight.flops(40, vocab, width) == 2 * 40 * vocab * width
    assert eight.bytes(40, vocab, width, 2) == (vocab + 40) * width * 2 + 40 * 1002 * 8 + 8 * 1002 * 12
    mixed = plan_of([Request(Amulet(wishes(1.0)))] * 16)
    assert (mixed.slots, mixed.rows, mixed.kept) == (1, 16, 0)
    assert mixed.flops(32, vocab, width) == 2 * 2 * 16 * vocab * width
    told = plan_of([Request(Amulet(wishes(1.0)))] * 3, trace=True)
    assert (told.slots, told.rows, told.kept) == (2, 16, 2)
    assert told.bytes(6, vocab, width, 2) == (vocab + 6) * width * 2 + 6 * 1002 * 8 + 3 * 2 * vocab * 4
    assert plan_of([Request(Mato(wishes(*[1.0] * 4)))] * 8, SMALL).row_tiles == 1
    assert plan_of([Request(Mato(wishes(*[1.0] * 4)))] * 9, SMALL).row_tiles == 2


def test_what_cannot_be_multiplied_is_refused() -> None:
    requests = [Request(Base()), Request(Base())]
    table, groups = table_of(requests, 9), layout(requests)
    hidden, weight = hidden_of(groups, 0), head_of(9)
    for given, by, message in (
        (hidden, weight.float(), "of one floating type"),
        (hidden.double(), weight.double(), "of one floating type"),
        (hidden[:, 1:].contiguous(), weight, r"must be \[rows, width\]"),
        (hidden[:, 1:], weight[:, 1:], "must be contiguous"),
        (hidden[:1], weight, "1 rows and the groups 2"),
    ):
        with pytest.raises(ValueError, match=message):
            lm_head_steer(given, by, groups, table)
