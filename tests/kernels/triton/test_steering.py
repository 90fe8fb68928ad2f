"""The Triton steering step against the torch reference, request by request."""

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
from trimtab.engine.methods.trim import Trim
from trimtab.kernels.steering.layout import LogitEdits, RequestLayout
from trimtab.kernels.steering.sampling import RowSampling
from trimtab.kernels.steering.state import SteeringState
from trimtab.kernels.steering.step import steer as reference
from trimtab.kernels.triton.steering import step as step_module
from trimtab.kernels.triton.steering import top_k_top_p as threshold_module
from trimtab.kernels.triton.steering.step import steer

from ..steering_harness import GREEDY, SAMPLED, make_objectives

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trimtab.kernels.steering.step import SamplerOutput

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLAT_SAMPLING = RowSampling(temperature=3.0, top_p=0.9, seed=2**63 + 5)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass(frozen=True)
class SteeringCase:
    method: Method
    sampling: RowSampling = GREEDY

    @property
    def branches(self) -> list[int]:
        return list(range(0 if self.method.coefficients().needs_base else 1, len(self.method.weights()) + 1))


ALL_CASES = [
    SteeringCase(Base()),
    SteeringCase(Base(), FLAT_SAMPLING),
    SteeringCase(Prompt(make_objectives(1.0)), RowSampling(0.7, top_k=3, seed=3)),
    SteeringCase(LinearAlignment(make_objectives(1.0))),
    SteeringCase(LinearAlignment(make_objectives(1.0), mask_temperature=2.0), SAMPLED),
    SteeringCase(
        ContextSteering(make_objectives(0.5, 0.0, 2.0), strength=-1.5), RowSampling(0.9, min_p=0.1, seed=-4)
    ),
    SteeringCase(Guidance(make_objectives(1.0), kl_budget=0.3), RowSampling(temperature=1.3, seed=9)),
    SteeringCase(Opad(make_objectives(1.0))),
    SteeringCase(Opad(make_objectives(1.0), gain=0.5), SAMPLED),
    SteeringCase(Amulet(make_objectives(1.0))),
    SteeringCase(Mato(make_objectives(1.0, 3.0), tau=0.5), RowSampling(temperature=1.0, seed=1)),
    SteeringCase(Mato(make_objectives(*[1.0] * 7), accumulate="mean", tau=0.2, kl_budget=0.1)),
    SteeringCase(Mato(make_objectives(0.1, 0.0, 0.3), accumulate="ema", utility="reward")),
    SteeringCase(Mixture(make_objectives(0.5, 0.2, 0.3)), FLAT_SAMPLING),
    SteeringCase(Base(relative_top=0.2), FLAT_SAMPLING),
    SteeringCase(ContextSteering(make_objectives(0.3, 0.7), relative_top=0.05)),
    SteeringCase(Mato(make_objectives(1.0, 3.0), kl_budget=0.1, relative_top=0.3), FLAT_SAMPLING),
    SteeringCase(LinearAlignment(make_objectives(1.0), relative_top=0.1), SAMPLED),
    SteeringCase(Amulet(make_objectives(1.0), kl_budget=0.2, relative_top=0.1)),
    SteeringCase(Trim(make_objectives(0.5))),
    SteeringCase(Trim(make_objectives(0.7, 0.0, 1.2), control_rate=0.5, max_gain=1.5), SAMPLED),
    SteeringCase(Trim(make_objectives(*[0.01 * index for index in range(40)]), relative_top=None)),
]


def make_layout(requests: Sequence[SteeringCase]) -> RequestLayout:
    """State rows are in reverse order of the batch, so that mixing up the two fails."""
    last = len(requests) - 1
    return RequestLayout.from_branches(
        [(last - i, request.branches) for i, request in enumerate(requests)], DEVICE
    )


def make_state(requests: Sequence[SteeringCase], vocab: int) -> SteeringState:
    state = SteeringState(vocab, DEVICE)
    for index, request in enumerate(requests):
        method = request.method
        state.add_request(
            len(requests) - 1 - index, method.cached_coefficients, method.weights(), request.sampling
        )
    return state


def random_logits(
    layout: RequestLayout, vocab: int, seed: int, spread: float = 3, branch_spread: float = 1
) -> Tensor:
    """Logits [rows, vocab] float32; the branches of a request differ by `branch_spread` and a constant."""
    generator = torch.Generator().manual_seed(seed)
    shared = spread * torch.randn(len(layout.state_rows), vocab, generator=generator)
    per_branch = branch_spread * torch.randn(len(layout.branch_of_row), vocab, generator=generator)
    constant = 10 * torch.randn(len(layout.branch_of_row), 1, generator=generator)
    return (
        shared.to(DEVICE)[layout.request_of_row] + per_branch.to(DEVICE) + constant.to(DEVICE)
    ).contiguous()


def run_steps(
    steer_fn: Callable[..., SamplerOutput],
    requests: Sequence[SteeringCase],
    logits: Sequence[Tensor],
    vocab: int,
    edits: LogitEdits | None = None,
    **options: bool,
) -> list[SamplerOutput]:
    state, layout = make_state(requests, vocab), make_layout(requests)
    return [steer_fn(z, layout, state, edits, **options) for z in logits]


def fields_of_request(
    choice: SamplerOutput, layout: RequestLayout, index: int, num_objectives: int
) -> list[Tensor]:
    """All outputs of a step for one request."""
    first, count = int(layout.row_start[index]), int(layout.num_rows[index])
    values = []
    for field in fields(choice):
        value = getattr(choice, field.name)
        if field.name == "top_logprobs":
            values += [] if value is None else [column[index] for column in value]
        elif field.name == "branch_logprobs":
            values.append(value[first : first + count])
        elif field.name in ("weights", "rewards", "fulfilment"):
            values.append(value[index, :num_objectives])
        else:
            values.append(value[index])
    return values


def bitwise_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether all tensors are bitwise equal; NaN equals NaN."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) or repr(a.tolist()) == repr(b.tolist()) for a, b in pairs)


def is_close(got: Tensor, rough: Tensor, exact: Tensor) -> bool:
    """Whether the error of `got` against float64 is at most twice that of float32 torch, plus 1e-5."""
    if not torch.equal(got.isnan(), exact.isnan()):
        return False
    allowed = 2 * (rough.double() - exact).abs().nan_to_num().max() + 1e-5
    return bool(((got.double() - exact).abs().nan_to_num() <= allowed).all())


def make_edits(num_groups: int) -> LogitEdits:
    """A ban, two biases on one token, and penalties, for the even requests of a batch."""
    even = torch.arange(0, num_groups, 2, device=DEVICE)

    def entries(*tokens: int) -> tuple[Tensor, Tensor]:
        return even.repeat(len(tokens)), torch.tensor(tokens, device=DEVICE).repeat_interleave(len(even))

    bias = torch.tensor([-math.inf, 1.5, 0.25], device=DEVICE).repeat_interleave(len(even))
    return LogitEdits(
        entries(3, 5, 5), bias, entries(*range(5, 25)), torch.full((20 * len(even),), 1.3, device=DEVICE)
    )


def assert_reported_close(
    ours: SamplerOutput, single: SamplerOutput, truth: SamplerOutput, no_trust_region: Tensor
) -> None:
    """Assert that the reported values are as close to float64 as those of float32 torch.

    no_trust_region [requests]: False for requests with a trust region, whose strength is approximate.
    """
    assert not ours.failed.any()
    for name in ("weights", "rewards", "branch_logprobs"):
        assert is_close(getattr(ours, name), getattr(single, name), getattr(truth, name)), name
    assert torch.allclose(ours.fulfilment, truth.fulfilment, rtol=2e-5, atol=1e-5, equal_nan=True)
    for name in ("logprob", "strength", "kl"):
        assert is_close(*(getattr(choice, name)[no_trust_region] for choice in (ours, single, truth))), name
    assert torch.allclose(ours.strength[~no_trust_region], truth.strength[~no_trust_region], rtol=1e-3)


def lacks_trust_region(requests: Sequence[SteeringCase]) -> Tensor:
    """Which of the requests have no trust region, [requests]."""
    return torch.tensor(
        [each.method.coefficients().kl_budget == math.inf for each in requests], device=DEVICE
    )


def test_every_method_and_sampling_in_one_batch_matches_the_reference_over_several_steps() -> None:
    vocab, valid_vocab = 333, 326
    layout, edits = make_layout(ALL_CASES), make_edits(len(ALL_CASES))
    logits = [random_logits(layout, vocab, seed) for seed in range(3)]
    exact = run_steps(reference, ALL_CASES, [z.double() for z in logits], valid_vocab, edits, top=True)
    rough = run_steps(reference, ALL_CASES, logits, valid_vocab, edits, top=True)
    got = run_steps(steer, ALL_CASES, logits, valid_vocab, edits, top=True)
    no_trust_region = lacks_trust_region(ALL_CASES)
    for ours, single, truth in zip(got, rough, exact, strict=True):
        assert torch.equal(ours.tokens, single.tokens)
        assert_reported_close(ours, single, truth, no_trust_region)
        assert ours.top_logprobs
        assert single.top_logprobs
        assert truth.top_logprobs
        assert is_close(
            *(
                choice.top_logprobs[0][no_trust_region]
                for choice in (ours, single, truth)
                if choice.top_logprobs
            )
        )
        assert torch.equal(ours.top_logprobs[1][no_trust_region], single.top_logprobs[1][no_trust_region])


def test_a_vocabulary_of_two_splits_works_in_float32_and_bfloat16() -> None:
    requests = [ALL_CASES[index] for index in (3, 8, 11)]
    vocab = 2048 + 41
    layout = make_layout(requests)
    logits = [random_logits(layout, vocab, seed).bfloat16() for seed in range(2)]
    single = [z.float() for z in logits]
    rough = run_steps(reference, requests, single, vocab)
    half, full = (run_steps(steer, requests, step_logits, vocab) for step_logits in (logits, single))
    for narrow, wide, truth in zip(half, full, rough, strict=True):
        assert torch.equal(wide.tokens, truth.tokens)
        assert torch.allclose(wide.branch_logprobs, truth.branch_logprobs, atol=1e-5, rtol=0)
        for field in fields(wide):
            if field.name != "top_logprobs":
                assert bitwise_equal([getattr(narrow, field.name)], [getattr(wide, field.name)]), field.name


def test_a_request_of_any_number_of_objectives_gives_the_same_bits_batched_as_alone() -> None:
    samplings = [
        GREEDY,
        FLAT_SAMPLING,
        RowSampling(0.8, top_k=4, seed=5),
        RowSampling(1.0, min_p=0.1, seed=6),
    ]
    batch = [SteeringCase(Base(), samplings[1])]
    for count in range(1, 16):
        budget = 0.05 if count % 5 == 0 else None
        batch.append(
            SteeringCase(
                Mato(make_objectives(*range(1, count + 1)), tau=0.5, kl_budget=budget), samplings[count % 4]
            )
        )
    batch += [ALL_CASES[4], ALL_CASES[7], SteeringCase(Mato(make_objectives(*range(1, 41))))]
    vocab, layout = 97, make_layout(batch)
    logits = [random_logits(layout, vocab, seed) for seed in (0, 1)]
    batched = run_steps(steer, batch, logits, vocab)
    for index in (0, 1, 5, 6, 7, 10, 15, 16, 17, 18):
        first, count = int(layout.row_start[index]), int(layout.num_rows[index])
        alone = run_steps(steer, [batch[index]], [z[first : first + count] for z in logits], vocab)
        objectives = len(batch[index].method.weights())
        for single, many in zip(alone, batched, strict=True):
            batched_fields = fields_of_request(many, layout, index, objectives)
            assert bitwise_equal(
                fields_of_request(single, make_layout([batch[index]]), 0, objectives), batched_fields
            ), index


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_row_fails_only_its_own_request(value: float) -> None:
    requests = [ALL_CASES[index] for index in (0, 2, 4, 6, 7, 11)]
    layout = make_layout(requests)
    valid_logits = [random_logits(layout, 41, seed) for seed in (0, 1)]
    corrupted_logits = [valid_logits[0].clone(), valid_logits[1]]
    broken = (1, 3, 5)
    for index in broken:
        corrupted_logits[0][int(layout.row_start[index] + layout.num_rows[index]) - 1, 7 * index] = value
    expected, actual = (
        run_steps(steer, requests, valid_logits, 41),
        run_steps(steer, requests, corrupted_logits, 41),
    )
    assert actual[0].failed.tolist() == [index in broken for index in range(len(requests))]
    assert not actual[0].tokens[actual[0].failed].any()
    assert bool(actual[1].weights.isfinite().all())
    for index in set(range(len(requests))) - set(broken):
        objectives = len(requests[index].method.weights())
        for one, other in zip(expected, actual, strict=True):
            pair = [fields_of_request(choice, layout, index, objectives) for choice in (one, other)]
            assert bitwise_equal(*pair), index


def test_only_the_request_with_every_token_banned_fails() -> None:
    requests = [
        SteeringCase(Base()),
        SteeringCase(Base()),
        SteeringCase(Base(), SAMPLED),
        SteeringCase(Base(), SAMPLED),
    ]
    logits = random_logits(make_layout(requests), 9, 0)
    index = (
        torch.tensor([1, 2], device=DEVICE).repeat_interleave(9),
        torch.arange(9, device=DEVICE).repeat(2),
    )
    empty = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    bans = LogitEdits(index, torch.full((18,), -math.inf, device=DEVICE), (empty, empty), empty.float())
    (before,), (after,) = (run_steps(steer, requests, [logits], 9, edits) for edits in (None, bans))
    assert after.failed.tolist() == [False, True, True, False]
    assert after.tokens[[1, 2]].tolist() == [0, 0]
    assert torch.equal(after.tokens[[0, 3]], before.tokens[[0, 3]])


def test_the_lowest_of_tied_tokens_is_chosen() -> None:
    requests = [SteeringCase(Base())]
    logits = torch.zeros(1, 2048 + 9, device=DEVICE)
    logits[0, [700, 900, 2050]] = 4.0
    (choice,) = run_steps(steer, requests, [logits], 2057)
    assert choice.tokens.tolist() == [700]


def heavy_tailed_rows(layout: RequestLayout, vocab: int, seed: int) -> Tensor:
    """Rows with few outliers that overtake each other suddenly as the strength grows."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, len(layout.branch_of_row), vocab, generator=generator)
    return (2 * rows[0] / rows[1:].square().mean(0).sqrt()).to(DEVICE)


def test_kl_reaches_but_never_exceeds_the_budget_at_any_strength() -> None:
    cases = [(a, budget) for a in (1.0, 1.9, 5.6, 40.0, 1000.0) for budget in (0.01, 0.2, 0.5)]
    requests = [
        SteeringCase(Guidance(make_objectives(1.0), guidance_scale=a, kl_budget=budget))
        for a, budget in cases
    ]
    layout = make_layout(requests)
    rows = heavy_tailed_rows(layout, 2089, 0)
    is_odd = layout.request_of_row % 2 == 1
    rows[is_odd] = random_logits(layout, 2089, 1, branch_spread=0.4)[is_odd]
    (choice,) = run_steps(steer, requests, [rows], 2089)
    assert not choice.failed.any()
    base, objective = rows.double().unflatten(0, (-1, 2)).unbind(1)
    log_pi_m = objective.log_softmax(-1)
    log_pi_a = (base + choice.strength[:, None] * (objective - base)).log_softmax(-1)
    kl = (log_pi_a.exp() * (log_pi_a - log_pi_m)).sum(-1)
    budget = torch.tensor([budget for _, budget in cases], dtype=torch.float64, device=DEVICE)
    limit = torch.tensor([a for a, _ in cases], dtype=torch.float64, device=DEVICE)
    assert bool((kl <= budget + 1e-4).all())
    assert bool(((kl >= budget * (1 - 5e-3)) | (choice.strength == limit)).all())
    assert torch.allclose(choice.kl, kl, atol=2e-5, rtol=1e-4)
    assert int((choice.strength < limit).sum()) > 3


def test_a_step_gives_the_same_tokens_without_a_trace() -> None:
    requests = [ALL_CASES[index] for index in (1, 6, 9, 10)]
    logits = [random_logits(make_layout(requests), 97, 0)]
    (traced,), (untraced,) = (run_steps(steer, requests, logits, 97, trace=on) for on in (True, False))
    for name in ("tokens", "weights", "strength"):
        assert torch.equal(getattr(traced, name), getattr(untraced, name))
    assert bool(untraced.logprob.isnan().all())
    (expected,) = run_steps(reference, requests, logits, 97, trace=False)
    assert torch.equal(untraced.kl.isnan(), expected.kl.isnan())
    assert torch.equal(untraced.branch_logprobs.isnan(), expected.branch_logprobs.isnan())


class ForbidHostSync(TorchDispatchMode):
    """Forbids operations that make the host wait for a device value."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal"), func
        return func(*args, **(kwargs or {}))


class CountedKernel:
    """A Triton kernel that counts its launches."""

    def __init__(self, function: Any, counts: dict[str, int], name: str) -> None:
        self.function, self.counts, self.name = function, counts, name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.counts[self.name] = self.counts.get(self.name, 0) + 1
        return self.function[grid]


@pytest.mark.parametrize(
    ("chosen", "launches"),
    [((0, 9), 4), ((0, 6), 5), ((3,), 8), ((5,), 5), ((4, 11), 18), ((15,), 4), ((18,), 6)],
)
def test_a_step_has_a_fixed_number_of_launches_and_never_syncs_with_the_host(
    chosen: tuple[int, ...], launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[str, int] = {}
    for module in (step_module, threshold_module):
        for kernel in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, CountedKernel(getattr(module, kernel), counts, kernel))
    requests = [replace(ALL_CASES[index]) for index in chosen]
    state, layout = make_state(requests, 9), make_layout(requests)
    logits = random_logits(layout, 9, 0)
    with ForbidHostSync():
        steer(logits, layout, state)
    assert sum(counts.values()) == launches
