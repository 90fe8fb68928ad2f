"""The steering step as Triton kernels gives what the torch reference gives, request by request."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trimtab.engine.methods.builtin import (
    Amulet,
    Base,
    ContextSteering,
    Guidance,
    LinearAlignment,
    Mato,
    Method,
    Mixture,
    Opad,
    Prompt,
)
from trimtab.kernels.steering.state import Draw, Edits, Groups, SteerTable
from trimtab.kernels.steering.step import steer as reference
from trimtab.kernels.triton.steering import step as launching
from trimtab.kernels.triton.steering import top_k_top_p as searching
from trimtab.kernels.triton.steering.step import steer

from ..steering_harness import GREEDY, SAMPLED, wishes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trimtab.kernels.steering.step import Choice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLAT = Draw(temperature=3.0, top_p=0.9, seed=2**63 + 5)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class Request:
    method: Method
    draw: Draw = GREEDY

    @property
    def branches(self) -> list[int]:
        return list(range(0 if self.method.program().needs_base else 1, len(self.method.weights()) + 1))


EVERY = [
    Request(Base()),
    Request(Base(), FLAT),
    Request(Prompt(wishes(1.0)), Draw(0.7, top_k=3, seed=3)),
    Request(LinearAlignment(wishes(1.0))),
    Request(LinearAlignment(wishes(1.0), mask_temperature=2.0), SAMPLED),
    Request(ContextSteering(wishes(0.5, 0.0, 2.0), strength=-1.5), Draw(0.9, min_p=0.1, seed=-4)),
    Request(Guidance(wishes(1.0), kl_budget=0.3), Draw(temperature=1.3, seed=9)),
    Request(Opad(wishes(1.0))),
    Request(Opad(wishes(1.0), gain=0.5), SAMPLED),
    Request(Amulet(wishes(1.0))),
    Request(Mato(wishes(1.0, 3.0), tau=0.5), Draw(temperature=1.0, seed=1)),
    Request(Mato(wishes(*[1.0] * 7), accumulate="mean", tau=0.2, kl_budget=0.1)),
    Request(Mato(wishes(0.1, 0.0, 0.3), accumulate="ema", utility="reward")),
    Request(Mixture(wishes(0.5, 0.2, 0.3)), FLAT),
]


def layout(requests: Sequence[Request]) -> Groups:
    """Requests stand in the table in reverse, so that a row of it is not a place in the batch."""
    last = len(requests) - 1
    return Groups.of([(last - i, request.branches) for i, request in enumerate(requests)], DEVICE)


def table_of(requests: Sequence[Request], vocab: int) -> SteerTable:
    table = SteerTable(vocab, DEVICE)
    for index, request in enumerate(requests):
        method = request.method
        table.admit(len(requests) - 1 - index, method.program(), method.weights(), request.draw)
    return table


def logits_of(groups: Groups, vocab: int, seed: int, spread: float = 3, apart: float = 1) -> Tensor:
    """Logits of branches that agree but for `apart` and a constant, [rows, vocab] float32."""
    generator = torch.Generator().manual_seed(seed)
    common = spread * torch.randn(len(groups.table), vocab, generator=generator)
    own = apart * torch.randn(len(groups.branch), vocab, generator=generator)
    constant = 10 * torch.randn(len(groups.branch), 1, generator=generator)
    return (common.to(DEVICE)[groups.owner] + own.to(DEVICE) + constant.to(DEVICE)).contiguous()


def steps_of(
    how: Callable[..., Choice],
    requests: Sequence[Request],
    logits: Sequence[Tensor],
    vocab: int,
    edits: Edits | None = None,
    **options: bool,
) -> list[Choice]:
    table, groups = table_of(requests, vocab), layout(requests)
    return [how(z, groups, table, edits, **options) for z in logits]


def of_request(choice: Choice, groups: Groups, index: int, objectives: int) -> list[Tensor]:
    """All that a step said of one request."""
    first, count = int(groups.first[index]), int(groups.count[index])
    found = []
    for field in fields(choice):
        value = getattr(choice, field.name)
        if field.name == "top":
            found += [] if value is None else [part[index] for part in value]
        elif field.name == "branch_logprobs":
            found.append(value[first : first + count])
        elif field.name in ("weights", "rewards"):
            found.append(value[index, :objectives])
        else:
            found.append(value[index])
    return found


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether all are equal to the last bit, NaN and all."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) or repr(a.tolist()) == repr(b.tolist()) for a, b in pairs)


def near(got: Tensor, rough: Tensor, exact: Tensor) -> bool:
    """Whether `got` is as near to the float64 truth as twice what torch in float32 is, plus 1e-5."""
    if not torch.equal(got.isnan(), exact.isnan()):
        return False
    allowed = 2 * (rough.double() - exact).abs().nan_to_num().max() + 1e-5
    return bool(((got.double() - exact).abs().nan_to_num() <= allowed).all())


def edits_of(groups: int) -> Edits:
    """Bans, two biases on one token, and penalties, for the even requests of a batch."""
    even = torch.arange(0, groups, 2, device=DEVICE)

    def at(*tokens: int) -> tuple[Tensor, Tensor]:
        return even.repeat(len(tokens)), torch.tensor(tokens, device=DEVICE).repeat_interleave(len(even))

    bias = torch.tensor([-math.inf, 1.5, 0.25], device=DEVICE).repeat_interleave(len(even))
    return Edits(at(3, 5, 5), bias, at(*range(5, 25)), torch.full((20 * len(even),), 1.3, device=DEVICE))


def told_alike(ours: Choice, single: Choice, truth: Choice, free: Tensor) -> None:
    """What is told of a choice is as near to that of float64 as torch in float32 is.

    free [groups]: without a trust region, whose strength is only near.
    """
    assert not ours.failed.any()
    for name in ("weights", "rewards", "branch_logprobs"):
        assert near(getattr(ours, name), getattr(single, name), getattr(truth, name)), name
    for name in ("logprob", "strength", "kl"):
        assert near(*(getattr(choice, name)[free] for choice in (ours, single, truth))), name
    assert torch.allclose(ours.strength[~free], truth.strength[~free], rtol=1e-3)


def without_region(requests: Sequence[Request]) -> Tensor:
    """Which of the requests have no trust region, [groups]."""
    return torch.tensor([each.method.program().kl_budget == math.inf for each in requests], device=DEVICE)


def test_every_method_and_draw_in_one_batch_equals_the_reference_over_several_steps() -> None:
    vocab, named = 333, 326
    groups, edits = layout(EVERY), edits_of(len(EVERY))
    logits = [logits_of(groups, vocab, seed) for seed in range(3)]
    exact = steps_of(reference, EVERY, [z.double() for z in logits], named, edits, top=True)
    rough = steps_of(reference, EVERY, logits, named, edits, top=True)
    got = steps_of(steer, EVERY, logits, named, edits, top=True)
    free = without_region(EVERY)
    for ours, single, truth in zip(got, rough, exact, strict=True):
        assert torch.equal(ours.tokens, single.tokens)
        told_alike(ours, single, truth, free)
        assert ours.top
        assert single.top
        assert truth.top
        assert near(*(choice.top[0][free] for choice in (ours, single, truth) if choice.top))
        assert torch.equal(ours.top[1][free], single.top[1][free])


def test_a_vocabulary_of_two_splits_in_float32_and_in_bfloat16() -> None:
    requests = [EVERY[index] for index in (3, 8, 11)]
    vocab = 2048 + 41
    groups = layout(requests)
    logits = [logits_of(groups, vocab, seed).bfloat16() for seed in range(2)]
    single = [z.float() for z in logits]
    rough = steps_of(reference, requests, single, vocab)
    half, full = (steps_of(steer, requests, given, vocab) for given in (logits, single))
    for narrow, wide, truth in zip(half, full, rough, strict=True):
        assert torch.equal(wide.tokens, truth.tokens)
        assert torch.allclose(wide.branch_logprobs, truth.branch_logprobs, atol=1e-5, rtol=0)
        for field in fields(wide):
            if field.name != "top":
                assert same([getattr(narrow, field.name)], [getattr(wide, field.name)]), field.name


def test_a_request_gives_the_same_bits_in_a_crowd_as_alone_with_no_to_fifteen_objectives() -> None:
    draws = [GREEDY, FLAT, Draw(0.8, top_k=4, seed=5), Draw(1.0, min_p=0.1, seed=6)]
    crowd = [Request(Base(), draws[1])]
    for count in range(1, 16):
        budget = 0.05 if count % 5 == 0 else None
        crowd.append(Request(Mato(wishes(*range(1, count + 1)), tau=0.5, kl_budget=budget), draws[count % 4]))
    crowd += [EVERY[4], EVERY[7], Request(Mato(wishes(*range(1, 41))))]
    vocab, groups = 97, layout(crowd)
    logits = [logits_of(groups, vocab, seed) for seed in (0, 1)]
    together = steps_of(steer, crowd, logits, vocab)
    for index in (0, 1, 5, 6, 7, 10, 15, 16, 17, 18):
        first, count = int(groups.first[index]), int(groups.count[index])
        alone = steps_of(steer, [crowd[index]], [z[first : first + count] for z in logits], vocab)
        objectives = len(crowd[index].method.weights())
        for single, many in zip(alone, together, strict=True):
            there = of_request(many, groups, index, objectives)
            assert same(of_request(single, layout([crowd[index]]), 0, objectives), there), index


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_fails_its_own_request_and_no_other(value: float) -> None:
    requests = [EVERY[index] for index in (0, 2, 4, 6, 7, 11)]
    groups = layout(requests)
    healthy = [logits_of(groups, 41, seed) for seed in (0, 1)]
    ill = [healthy[0].clone(), healthy[1]]
    broken = (1, 3, 5)
    for index in broken:
        ill[0][int(groups.first[index] + groups.count[index]) - 1, 7 * index] = value
    well, sick = steps_of(steer, requests, healthy, 41), steps_of(steer, requests, ill, 41)
    assert sick[0].failed.tolist() == [index in broken for index in range(len(requests))]
    assert not sick[0].tokens[sick[0].failed].any()
    assert bool(sick[1].weights.isfinite().all())
    for index in set(range(len(requests))) - set(broken):
        objectives = len(requests[index].method.weights())
        for one, other in zip(well, sick, strict=True):
            pair = [of_request(choice, groups, index, objectives) for choice in (one, other)]
            assert same(*pair), index


def test_a_request_whose_every_token_is_banned_fails_alone() -> None:
    requests = [Request(Base()), Request(Base()), Request(Base(), SAMPLED), Request(Base(), SAMPLED)]
    logits = logits_of(layout(requests), 9, 0)
    at = (torch.tensor([1, 2], device=DEVICE).repeat_interleave(9), torch.arange(9, device=DEVICE).repeat(2))
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    banned = Edits(at, torch.full((18,), -math.inf, device=DEVICE), (none, none), none.float())
    (before,), (after,) = (steps_of(steer, requests, [logits], 9, edits) for edits in (None, banned))
    assert after.failed.tolist() == [False, True, True, False]
    assert after.tokens[[1, 2]].tolist() == [0, 0]
    assert torch.equal(after.tokens[[0, 3]], before.tokens[[0, 3]])


def test_the_lowest_of_tied_tokens_is_chosen() -> None:
    requests = [Request(Base())]
    logits = torch.zeros(1, 2048 + 9, device=DEVICE)
    logits[0, [700, 900, 2050]] = 4.0
    (choice,) = steps_of(steer, requests, [logits], 2057)
    assert choice.tokens.tolist() == [700]


def student(groups: Groups, vocab: int, seed: int) -> Tensor:
    """Rows whose few outliers overtake each other suddenly as the strength grows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, len(groups.branch), vocab, generator=generator)
    return (2 * rows[0] / rows[1:].square().mean(0).sqrt()).to(DEVICE)


def test_the_trust_region_is_kept_and_used_up_whatever_the_strength_and_the_rows() -> None:
    cases = [(a, budget) for a in (1.0, 1.9, 5.6, 40.0, 1000.0) for budget in (0.01, 0.2, 0.5)]
    requests = [Request(Guidance(wishes(1.0), guidance_scale=a, kl_budget=budget)) for a, budget in cases]
    groups = layout(requests)
    rows = student(groups, 2089, 0)
    odd = groups.owner % 2 == 1
    rows[odd] = logits_of(groups, 2089, 1, apart=0.4)[odd]
    (choice,) = steps_of(steer, requests, [rows], 2089)
    assert not choice.failed.any()
    base, wish = rows.double().unflatten(0, (-1, 2)).unbind(1)
    near_policy = wish.log_softmax(-1)
    far = (base + choice.strength[:, None] * (wish - base)).log_softmax(-1)
    kl = (far.exp() * (far - near_policy)).sum(-1)
    budget = torch.tensor([budget for _, budget in cases], dtype=torch.float64, device=DEVICE)
    limit = torch.tensor([a for a, _ in cases], dtype=torch.float64, device=DEVICE)
    assert bool((kl <= budget + 1e-4).all())
    assert bool(((kl >= budget * (1 - 5e-3)) | (choice.strength == limit)).all())
    assert torch.allclose(choice.kl, kl, atol=2e-5, rtol=1e-4)
    assert int((choice.strength < limit).sum()) > 3


def test_a_step_gives_the_same_tokens_without_a_trace() -> None:
    requests = [EVERY[index] for index in (1, 6, 9, 10)]
    logits = [logits_of(layout(requests), 97, 0)]
    (told,), (silent,) = (steps_of(steer, requests, logits, 97, trace=on) for on in (True, False))
    for name in ("tokens", "weights", "strength"):
        assert torch.equal(getattr(told, name), getattr(silent, name))
    assert bool(silent.logprob.isnan().all())
    (likeliest,) = steps_of(reference, requests, logits, 97, trace=False)
    assert torch.equal(silent.kl.isnan(), likeliest.kl.isnan())
    assert torch.equal(silent.branch_logprobs.isnan(), likeliest.branch_logprobs.isnan())


class NoReading(TorchDispatchMode):
    """Refuses what would make the host wait for a value of the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal"), func
        return func(*args, **(kwargs or {}))


class Counted:
    """A jitted function that counts its launches."""

    def __init__(self, function: Any, counts: dict[str, int], name: str) -> None:
        self.function, self.counts, self.name = function, counts, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.counts[self.name] = self.counts.get(self.name, 0) + 1
        return self.function[grid]


@pytest.mark.parametrize(
    ("chosen", "launches"), [((0, 9), 4), ((0, 6), 5), ((3,), 8), ((5,), 5), ((4, 11), 18)]
)
def test_a_step_has_a_fixed_number_of_launches_and_reads_nothing_back(
    chosen: tuple[int, ...], launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[str, int] = {}
    for module in (launching, searching):
        for kernel in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Counted(getattr(module, kernel), counts, kernel))
    requests = [replace(EVERY[index]) for index in chosen]
    table, groups = table_of(requests, 9), layout(requests)
    logits = logits_of(groups, 9, 0)
    with NoReading():
        steer(logits, groups, table)
    assert sum(counts.values()) == launches
