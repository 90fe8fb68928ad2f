"""The fused LM head against float64 logits and the torch steering step."""

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
from trimtab.kernels.lm_head import LMHead, logits_matmul
from trimtab.kernels.lm_head import lm_head_steer as torch_lm_head_steer
from trimtab.kernels.steering.layout import LogitEdits
from trimtab.kernels.steering.sampling import RowSampling
from trimtab.kernels.steering.step import steer as reference
from trimtab.kernels.triton.backend import sample_fused
from trimtab.kernels.triton.configs import DEFAULT_LM_HEAD_CONFIG, LMHeadConfig, LMHeadTile
from trimtab.kernels.triton.lm_head import launch as launch_module
from trimtab.kernels.triton.lm_head.launch import lm_head_steer
from trimtab.kernels.triton.lm_head.plan import FusedPlan
from trimtab.kernels.triton.steering import step as step_module
from trimtab.kernels.triton.steering import top_k_top_p as threshold_module

from ..steering_harness import make_objectives
from .test_steering import (
    ALL_CASES,
    DEVICE,
    FLAT_SAMPLING,
    SAMPLED,
    ForbidHostSync,
    SteeringCase,
    assert_reported_close,
    bitwise_equal,
    fields_of_request,
    is_close,
    lacks_trust_region,
    make_edits,
    make_layout,
    make_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trimtab.kernels.steering.layout import RequestLayout
    from trimtab.kernels.steering.step import SamplerOutput

WARM_SAMPLING = RowSampling(temperature=0.7, seed=11)
SMALL_CONFIG = LMHeadConfig({rows: LMHeadTile(128, 32, 4, 2) for rows in (16, 64)}, max_rows=10**6)
"""Tiles for a small hidden size; any number of rows is fused."""
VOCAB, NUM_TOKENS, HIDDEN_SIZE = 333, 326, 41
TWO_BRANCH_CASES = [request for request in ALL_CASES if len(request.branches) <= 2]
FUSABLE_CASES = [
    request
    for request in ALL_CASES
    if not (isinstance(request.method, LinearAlignment | Opad) or request.method.relative_top)
]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


def random_head(
    vocab: int = VOCAB, hidden_size: int = HIDDEN_SIZE, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """LM head weight [vocab, hidden_size]."""
    return torch.randn(vocab, hidden_size, generator=torch.Generator().manual_seed(99)).to(DEVICE, dtype)


def random_hidden(
    layout: RequestLayout,
    seed: int,
    hidden_size: int = HIDDEN_SIZE,
    dtype: torch.dtype = torch.bfloat16,
    branch_spread: float = 1,
) -> Tensor:
    """Hidden states [rows, hidden_size]; the branches of a request differ by `branch_spread`."""
    generator = torch.Generator().manual_seed(seed)
    shared = 3 * torch.randn(len(layout.state_rows), hidden_size, generator=generator)
    per_branch = branch_spread * torch.randn(len(layout.branch_of_row), hidden_size, generator=generator)
    return ((shared.to(DEVICE)[layout.request_of_row] + per_branch.to(DEVICE)) * hidden_size**-0.5).to(dtype)


def run_fused(
    requests: Sequence[SteeringCase],
    hidden: Sequence[Tensor],
    weight: Tensor,
    edits: LogitEdits | None = None,
    num_tokens: int = NUM_TOKENS,
    tuning: LMHeadConfig = SMALL_CONFIG,
    **options: bool,
) -> list[SamplerOutput]:
    state, layout = make_state(requests, num_tokens), make_layout(requests)
    return [lm_head_steer(h, weight, layout, state, edits, config=tuning, **options) for h in hidden]


def run_reference(
    logits_matmul: Callable[[Tensor, Tensor], Tensor],
    requests: Sequence[SteeringCase],
    hidden: Sequence[Tensor],
    weight: Tensor,
    edits: LogitEdits | None = None,
    num_tokens: int = NUM_TOKENS,
    **options: bool,
) -> list[SamplerOutput]:
    """The torch `steer` on logits computed by `logits_matmul`."""
    state, layout = make_state(requests, num_tokens), make_layout(requests)
    return [reference(logits_matmul(h, weight), layout, state, edits, **options) for h in hidden]


def float64_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.double() @ weight.double().T


def assert_agrees(
    requests: Sequence[SteeringCase],
    hidden: Sequence[Tensor],
    weight: Tensor,
    edits: LogitEdits | None = None,
    **options: Any,
) -> None:
    """Assert the tokens of float64 logits, and reported values as close to them as float32 torch."""
    got = run_fused(requests, hidden, weight, edits, **options)
    options.pop("tuning", None)
    truths = run_reference(float64_logits, requests, hidden, weight, edits, **options)
    rough = run_reference(logits_matmul, requests, hidden, weight, edits, **options)
    no_trust_region = lacks_trust_region(requests)
    for ours, single, truth in zip(got, rough, truths, strict=True):
        assert torch.equal(ours.tokens, truth.tokens)
        assert_reported_close(ours, single, truth, no_trust_region)
        if options.get("top"):
            assert ours.top_logprobs is not None
            assert single.top_logprobs is not None
            assert truth.top_logprobs is not None
            assert is_close(
                ours.top_logprobs[0][no_trust_region],
                single.top_logprobs[0][no_trust_region],
                truth.top_logprobs[0][no_trust_region],
            )
            assert torch.equal(ours.top_logprobs[1][no_trust_region], truth.top_logprobs[1][no_trust_region])


@pytest.mark.parametrize("requests", [TWO_BRANCH_CASES, FUSABLE_CASES], ids=["pairs", "many"])
def test_every_method_and_sampling_with_stored_branch_logits_and_edits_matches_the_reference(
    requests: list[SteeringCase],
) -> None:
    layout = make_layout(requests)
    hidden = [random_hidden(layout, seed) for seed in range(3)]
    assert_agrees(requests, hidden, random_head(), make_edits(len(requests)), trace=True, top=True)


def test_requests_decided_without_storing_logits_match_the_reference() -> None:
    rewarded = [
        SteeringCase(Base(), WARM_SAMPLING),
        SteeringCase(Mato(make_objectives(1.0, 3.0), tau=0.5), RowSampling(temperature=1.0, seed=1)),
        SteeringCase(Mato(make_objectives(0.1, 0.0, 0.3), accumulate="ema", utility="reward")),
        SteeringCase(Mixture(make_objectives(0.5, 0.2, 0.3)), WARM_SAMPLING),
        SteeringCase(ContextSteering(make_objectives(0.5, 0.0, 2.0), strength=-1.5)),
    ]
    hidden = [random_hidden(make_layout(rewarded), seed) for seed in range(3)]
    assert_agrees(rewarded, hidden, random_head(), trace=False)
    plain = [
        SteeringCase(Base()),
        SteeringCase(Base(), WARM_SAMPLING),
        SteeringCase(Base(), RowSampling(temperature=2.0, seed=-5)),
    ]
    assert_agrees(
        plain, [random_hidden(make_layout(plain), seed) for seed in range(3)], random_head(), trace=True
    )


def test_hidden_states_mixed_before_the_lm_head_match_the_reference() -> None:
    requests = [
        SteeringCase(Amulet(make_objectives(1.0))),
        SteeringCase(Guidance(make_objectives(1.0)), WARM_SAMPLING),
        SteeringCase(Mixture(make_objectives(0.5, 0.2, 0.3))),
        SteeringCase(Base(), WARM_SAMPLING),
        SteeringCase(ContextSteering(make_objectives(0.5, 0.0, 2.0), strength=-1.5)),
    ]
    hidden = [random_hidden(make_layout(requests), seed) for seed in range(3)]
    assert_agrees(requests, hidden, random_head(), trace=False)
    filtered = [
        *requests,
        SteeringCase(Amulet(make_objectives(1.0)), SAMPLED),
        SteeringCase(Mixture(make_objectives(1.0, 1.0)), FLAT_SAMPLING),
    ]
    hidden = [random_hidden(make_layout(filtered), seed) for seed in range(2)]
    assert_agrees(filtered, hidden, random_head(), make_edits(len(filtered)), trace=False)


def test_mixed_hidden_states_keep_the_precision_their_dtype_would_round_off() -> None:
    """Uses requests whose token rounding would change; a GPU rounds to nearest, the interpreter truncates."""
    strength, weight = Amulet(make_objectives(1.0)).coefficients().objective_coef, random_head(512)
    many = random_hidden(make_layout([SteeringCase(Amulet(make_objectives(1.0)))] * 2000), 0)
    base, objective = many.double().unflatten(0, (-1, 2)).unbind(1)
    mixed = base + strength * (objective - base)
    truncated = (mixed.float().view(torch.int32) & -(2**16)).view(torch.float32)
    tokens, rounded_tokens, truncated_tokens = (
        float64_logits(h, weight).argmax(-1) for h in (mixed, mixed.bfloat16(), truncated)
    )
    assert all(int((approx != tokens).sum()) > 3 for approx in (rounded_tokens, truncated_tokens))
    changed = ((rounded_tokens != tokens) | (truncated_tokens != tokens)).nonzero()[:, 0]
    hidden = many.unflatten(0, (-1, 2))[changed].flatten(0, 1)
    (choice,) = run_fused(
        [SteeringCase(Amulet(make_objectives(1.0)))] * len(changed),
        [hidden],
        weight,
        num_tokens=512,
        trace=False,
    )
    assert torch.equal(choice.tokens, tokens[changed])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_splits_of_the_vocabulary_match_the_reference_in_every_dtype(dtype: torch.dtype) -> None:
    vocab = 2048 + 41
    weight = random_head(vocab, dtype=dtype)
    for trace, requests in (
        (True, [ALL_CASES[index] for index in (3, 8, 6)]),
        (False, [ALL_CASES[9], ALL_CASES[1]]),
    ):
        hidden = [random_hidden(make_layout(requests), seed, dtype=dtype) for seed in range(2)]
        assert_agrees(requests, hidden, weight, num_tokens=vocab, trace=trace)


@pytest.mark.parametrize("trace", [True, False])
def test_a_request_of_any_number_of_objectives_gives_the_same_bits_batched_as_alone(trace: bool) -> None:
    samplings = [RowSampling(), WARM_SAMPLING] if not trace else [RowSampling(), WARM_SAMPLING, FLAT_SAMPLING]
    batch = [SteeringCase(Base(), samplings[1])]
    for count in (1, 2, 3, 5, 8, 15):
        budget = 0.05 if trace and count % 5 == 0 else None
        method = Mato(make_objectives(*range(1, count + 1)), tau=0.5, kl_budget=budget)
        batch.append(SteeringCase(method, samplings[count % len(samplings)]))
    layout, weight = make_layout(batch), random_head()
    hidden = [random_hidden(layout, seed) for seed in (0, 1)]
    tuning = LMHeadConfig({16: SMALL_CONFIG.tiles[16]}, SMALL_CONFIG.max_rows)
    batched = run_fused(batch, hidden, weight, tuning=tuning, trace=trace)
    for index in (0, 1, 3, 4, 6):
        first, count = int(layout.row_start[index]), int(layout.num_rows[index])
        rows = [h[first : first + count].contiguous() for h in hidden]
        objectives = len(batch[index].method.weights())
        alone = run_fused([batch[index]], rows, weight, tuning=tuning, trace=trace or index == 0)
        for single, many in zip(alone, batched, strict=True):
            if index == 0 and not trace:  # alone it needs no normalisers, so its launches differ
                assert torch.equal(single.tokens[0], many.tokens[0])
                continue
            batched_fields = fields_of_request(many, layout, index, objectives)
            assert bitwise_equal(
                fields_of_request(single, make_layout([batch[index]]), 0, objectives), batched_fields
            ), index


def test_a_request_may_have_more_branches_than_the_smallest_tile_has_rows() -> None:
    requests = [
        SteeringCase(Mato(make_objectives(*range(1, 41)))),
        SteeringCase(Base()),
        SteeringCase(Mato(make_objectives(1.0))),
    ]
    for trace in (True, False):
        assert_agrees(requests, [random_hidden(make_layout(requests), 0)], random_head(), trace=trace)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["stored", "fused", "mixed before head"])
def test_a_nonfinite_row_fails_only_its_own_request(value: float, kind: str) -> None:
    requests = [
        SteeringCase(Base()),
        SteeringCase(Amulet(make_objectives(1.0)), WARM_SAMPLING),
        SteeringCase(Mixture(make_objectives(0.0, 1.0, 2.0))),
    ]
    requests += (
        [SteeringCase(Mato(make_objectives(1.0, 2.0)))]
        if kind != "mixed before head"
        else [SteeringCase(Amulet(make_objectives(1.0)))]
    )
    trace, layout = kind == "stored", make_layout(requests)
    valid_hidden = random_hidden(layout, 0)
    corrupted_hidden = valid_hidden.clone()
    for index in (1, 2):
        corrupted_hidden[layout.row_start[index], 7] = value  # for the mixture, a branch with weight 0
    (expected,), (actual,) = (
        run_fused(requests, [h], random_head(), trace=trace) for h in (valid_hidden, corrupted_hidden)
    )
    assert actual.failed.tolist() == [False, True, True, False]
    assert actual.tokens[1:3].tolist() == [0, 0]
    for index in (0, 3):
        objectives = len(requests[index].method.weights())
        pair = [fields_of_request(choice, layout, index, objectives) for choice in (expected, actual)]
        assert bitwise_equal(*pair), index


@pytest.mark.parametrize("trace", [True, False])
def test_the_lowest_of_tied_tokens_is_chosen(trace: bool) -> None:
    weight = random_head()
    hidden = random_hidden(make_layout([SteeringCase(Base())]), 0)
    weight[[70, 90, 300]] = 4 * hidden / hidden.norm()
    (choice,) = run_fused([SteeringCase(Base())], [hidden], weight, trace=trace)
    assert choice.tokens.tolist() == [70]


@pytest.mark.parametrize("trace", [True, False])
def test_padding_rows_of_the_lm_head_are_never_chosen(trace: bool) -> None:
    requests, weight = (
        [SteeringCase(Mato(make_objectives(1.0))), SteeringCase(Base(), WARM_SAMPLING)],
        random_head(),
    )
    hidden = random_hidden(make_layout(requests), 0, branch_spread=0)
    weight[NUM_TOKENS:] = 20 * hidden.float().sum(0).to(weight.dtype)
    assert_agrees(requests, [hidden], weight, trace=trace)


class RecordedKernel:
    """A Triton kernel that records its launches."""

    def __init__(self, function: Any, names: list[str]) -> None:
        self.function, self.names = function, names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.names.append(self.function.__name__.removesuffix("_kernel"))
        return self.function[grid]


END_KERNELS = ["reduce_tiles", "finalize"]
ROW_KERNELS = ["reweight", "reweight", "lm_head", "mix_logits"]
SEARCH_KERNELS = ["count_ge", "count_ge", "compact", "bisect"]
EXPECTED_LAUNCHES = {
    "Mato": ([ALL_CASES[0], ALL_CASES[10]], False, ["reweight", "lm_head", *END_KERNELS]),
    "Base, traced": ([SteeringCase(Base(), WARM_SAMPLING)], True, ["reweight", "lm_head", *END_KERNELS]),
    "Amulet": ([ALL_CASES[9], ALL_CASES[0]], False, ["reweight", "mix_hidden", "lm_head", *END_KERNELS]),
    "Amulet, traced": ([ALL_CASES[9]], True, [*ROW_KERNELS, "score", *END_KERNELS]),
    "top-k": (
        [SteeringCase(Amulet(make_objectives(1.0)), RowSampling(0.7, top_k=3))],
        False,
        [
            "reweight",
            "reweight",
            "mix_hidden",
            "lm_head",
            "mix_logits",
            "score",
            *SEARCH_KERNELS,
            "sample_truncated",
            *END_KERNELS,
        ],
    ),
    "trust region": ([ALL_CASES[6]], False, [*ROW_KERNELS, "kl_bracket", "score", *END_KERNELS]),
    "mask": ([ALL_CASES[3]], False, [*ROW_KERNELS, *SEARCH_KERNELS, "score", *END_KERNELS]),
    "OPAD": ([ALL_CASES[7]], False, [*ROW_KERNELS, "score", *END_KERNELS]),
    "mask among many branches": (
        [ALL_CASES[3], ALL_CASES[10]],
        False,
        ["reweight", "mix_logits", *SEARCH_KERNELS, "score", "finalize"],
    ),
    "too many rows": ([ALL_CASES[10]] * 17, False, ["reweight", "mix_logits", "score", "finalize"]),
}


@pytest.mark.parametrize("case", EXPECTED_LAUNCHES)
def test_a_step_has_fixed_launches_and_never_syncs_with_the_host(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    requests, trace, launches = EXPECTED_LAUNCHES[case]
    for module in (launch_module, step_module, threshold_module):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, RecordedKernel(getattr(module, name), names))
    state, layout = make_state(requests, 9), make_layout(requests)
    hidden, weight = random_hidden(layout, 0), random_head(9)
    with ForbidHostSync():
        lm_head_steer(hidden, weight, layout, state, trace=trace)
    assert names == launches


def test_more_rows_than_the_tuned_maximum_run_unfused() -> None:
    requests = [SteeringCase(Mato(make_objectives(1.0)))] * 33
    hidden, weight = random_hidden(make_layout(requests), 0), random_head()
    (choice,) = run_fused(requests, [hidden], weight, tuning=DEFAULT_LM_HEAD_CONFIG)
    state = make_state(requests, NUM_TOKENS)
    truth = torch_lm_head_steer(hidden, weight, make_layout(requests), state)
    assert torch.equal(choice.tokens, truth.tokens)
    assert torch.allclose(choice.logprob, truth.logprob, atol=1e-5, rtol=0)


def make_plan(
    requests: Sequence[SteeringCase], tuning: LMHeadConfig = DEFAULT_LM_HEAD_CONFIG, *, trace: bool = False
) -> FusedPlan:
    layout, state = make_layout(requests), make_state(requests, 9)
    features = state.features(layout)
    plan = FusedPlan.from_features(
        features, layout, state, trace=trace, top=False, has_edits=False, config=tuning
    )
    assert plan is not None
    return plan


def test_a_plan_counts_tiles_bytes_and_flops() -> None:
    """Counted by hand for the LM head of Llama 3.1 8B."""
    vocab, width = 128_256, 4096
    eight = make_plan([SteeringCase(Mato(make_objectives(*[1.0] * 4)))] * 8)
    assert (eight.branch_slots, eight.tile_rows, eight.num_row_tiles, eight.num_vocab_tiles(vocab)) == (
        8,
        64,
        1,
        1002,
    )
    assert eight.flops(40, vocab, width) == 2 * 40 * vocab * width
    assert eight.bytes_moved(40, vocab, width, 2) == (vocab + 40) * width * 2 + 40 * 1002 * 8 + 8 * 1002 * 12
    mixed = make_plan([SteeringCase(Amulet(make_objectives(1.0)))] * 16)
    assert (mixed.branch_slots, mixed.tile_rows, mixed.rows_stored) == (1, 16, 0)
    assert mixed.flops(32, vocab, width) == 2 * 2 * 16 * vocab * width
    traced_plan = make_plan([SteeringCase(Amulet(make_objectives(1.0)))] * 3, trace=True)
    assert (traced_plan.branch_slots, traced_plan.tile_rows, traced_plan.rows_stored) == (2, 16, 2)
    assert (
        traced_plan.bytes_moved(6, vocab, width, 2)
        == (vocab + 6) * width * 2 + 6 * 1002 * 8 + 3 * 2 * vocab * 4
    )
    assert make_plan([SteeringCase(Mato(make_objectives(*[1.0] * 4)))] * 8, SMALL_CONFIG).num_row_tiles == 1
    assert make_plan([SteeringCase(Mato(make_objectives(*[1.0] * 4)))] * 9, SMALL_CONFIG).num_row_tiles == 2


def test_incompatible_shapes_and_dtypes_are_refused() -> None:
    requests = [SteeringCase(Base()), SteeringCase(Base())]
    state, layout = make_state(requests, 9), make_layout(requests)
    hidden, weight = random_hidden(layout, 0), random_head(9)
    for hidden_arg, weight_arg, message in (
        (hidden, weight.float(), "must share one floating dtype"),
        (hidden.double(), weight.double(), "must share one floating dtype"),
        (hidden[:, 1:].contiguous(), weight, r"expected hidden \[rows, hidden_size\]"),
        (hidden[:, 1:], weight[:, 1:], "must be contiguous"),
        (hidden[:1], weight, "1 rows, the request layout 2"),
    ):
        with pytest.raises(ValueError, match=message):
            lm_head_steer(hidden_arg, weight_arg, layout, state)


def test_a_soft_cap_is_of_each_branchs_logits_and_never_of_mixed_hidden_states() -> None:
    """Without one, this request is mixed before the head; a cap of the mixed logits is another token's."""
    cap = 0.5
    requests = [SteeringCase(Mato(make_objectives(2)), WARM_SAMPLING) for _ in range(3)]
    layout, weight = make_layout(requests), random_head(dtype=torch.float32)
    hidden = random_hidden(layout, 5, dtype=torch.float32, branch_spread=4)

    def sample(logits_cap: float | None) -> SamplerOutput:
        head = LMHead(weight, logits_cap)
        return sample_fused(head, hidden, layout, make_state(requests, NUM_TOKENS), trace=False)

    logits = cap * torch.tanh(float64_logits(hidden, weight) / cap)
    expected = reference(
        logits.float(), layout, make_state(requests, NUM_TOKENS), None, trace=False, top=False
    )
    assert torch.equal(sample(cap).tokens, expected.tokens)
    assert not torch.equal(sample(None).tokens, expected.tokens)
