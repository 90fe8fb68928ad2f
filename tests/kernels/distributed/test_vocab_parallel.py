"""The steering step on a sharded vocabulary; each shard is a thread, connected by gloo."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from trimtab.kernels.distributed.communicator import Communicator, WorkerDiedError
from trimtab.kernels.distributed.vocab_parallel import UNSHARDED, VocabShard
from trimtab.kernels.steering.state import SteeringState
from trimtab.kernels.steering.top_k_top_p import truncation_threshold

from ..steering_harness import (
    VOCAB,
    SteeringCase,
    StepResult,
    all_method_cases,
    bitwise_equal,
    decode,
    random_logits,
    token_ids,
)

T = TypeVar("T")
SIZES = (2, 3, 4)
TIMEOUT = timedelta(seconds=20)


def on_each_shard(size: int, vocab: int, function: Callable[[VocabShard], T]) -> list[T]:
    """Run `function` for each of `size` vocabulary shards at the same time, and return the results."""
    store = c10d.HashStore()

    def run_rank(rank: int) -> T:
        gloo: Any = c10d.ProcessGroupGloo
        options = gloo._Options()
        options._devices, options._timeout = [gloo.create_device(hostname="127.0.0.1")], TIMEOUT
        peers = Communicator(gloo(store, rank, size, options))
        ids = VocabShard.shard_range(rank, size, vocab)
        return function(VocabShard(peers, ids.start, len(ids), vocab))

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run_rank, range(size)))


def slice_of_shard(rows: Tensor, shard: VocabShard) -> Tensor:
    return rows[..., shard.vocab_start : shard.vocab_start + shard.shard_size].contiguous()


def decode_on_shard(
    shard: VocabShard, requests: list[SteeringCase], vocab_size: int
) -> list[list[StepResult]]:
    """Decode all requests on this shard; ids from `vocab_size` on have no token."""
    state = SteeringState(min(max(vocab_size - shard.vocab_start, 0), shard.shard_size), shard=shard)
    return decode(
        *(replace(each, logits=slice_of_shard(each.logits, shard)) for each in requests), state=state
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("named", [VOCAB, 700])
def test_shards_sample_the_unsharded_tokens_and_are_bitwise_equal(size: int, named: int) -> None:
    requests = all_method_cases()
    unsharded = decode(*requests, state=SteeringState(named))
    first, *others = on_each_shard(size, VOCAB, lambda shard: decode_on_shard(shard, requests, named))
    assert all(bitwise_equal(other, first) for other in others)
    assert [token_ids(step) for step in first] == [token_ids(seen) for seen in unsharded]
    assert max(max(token_ids(seen)) for seen in first) < named


@pytest.mark.parametrize("size", SIZES)
def test_sharded_log_probabilities_are_as_accurate_as_unsharded_ones(size: int) -> None:
    requests = all_method_cases()
    unsharded = decode(*requests)
    (parts, *_) = on_each_shard(size, VOCAB, lambda shard: decode_on_shard(shard, requests, VOCAB))
    for request, one, other in zip(requests, unsharded, parts, strict=True):
        for step, (single, shared) in enumerate(zip(one, other, strict=True)):
            truth = request.logits[step].double().log_softmax(-1)[:, single.token]
            error = (torch.tensor(single.branches).double() - truth).abs().max()
            assert bool(((torch.tensor(shared.branches) - truth).abs() <= 2 * error + 1e-5).all())
            assert shared.strength == pytest.approx(single.strength, rel=1e-3)
            assert shared.kl == pytest.approx(single.kl, rel=2e-3, abs=1e-5, nan_ok=True)
            scale = 1 + abs(single.strength)
            assert shared.logprob == pytest.approx(single.logprob, abs=1e-5 * scale)
            assert dict(shared.top) == pytest.approx(dict(single.top), abs=1e-5 * scale)


@pytest.mark.parametrize("size", SIZES)
def test_a_request_on_shards_gives_the_same_bits_batched_as_alone(size: int) -> None:
    requests = all_method_cases()
    (together, *_) = on_each_shard(size, VOCAB, lambda shard: decode_on_shard(shard, requests, VOCAB))
    for index in (1, 7, 11, 14):
        alone, *_ = on_each_shard(
            size, VOCAB, lambda shard, i=index: decode_on_shard(shard, [requests[i]], VOCAB)
        )
        assert bitwise_equal(alone[0], together[index])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_top_k_top_p_on_shards_match_sorting(size: int, spread: float) -> None:
    scores = random_logits(4, 1, 6, VOCAB, spread)[0]
    scores[:, 5:9] = -torch.inf
    scores[:, 9] = -0.0
    scores[0, 10:60] = scores[0].amax()
    top_k = torch.tensor([1, 2, 0, VOCAB - 1, 700, 2 * VOCAB])
    top_p = torch.tensor([0.5, 0.01, 0.999, 1.0, 0.9, 0.3]).double()
    min_p = torch.tensor([0.0, 0.5, 0.0, 0.01, 0.0, 1.0]).double()
    limits = (top_k, top_p, min_p)
    expected = scores >= truncation_threshold(scores, *limits)
    for threshold in on_each_shard(
        size, VOCAB, lambda shard: truncation_threshold(slice_of_shard(scores, shard), *limits, shard)
    ):
        assert torch.equal(scores >= threshold, expected)
    expected_threshold = UNSHARDED.nucleus_threshold(scores, top_p)
    for threshold in on_each_shard(
        size, VOCAB, lambda shard: shard.nucleus_threshold(slice_of_shard(scores, shard), top_p)
    ):
        assert torch.equal(threshold, expected_threshold)


def test_argmax_on_shards_takes_the_lowest_id_of_a_tie() -> None:
    scores = torch.zeros(3, 11)
    scores[0, [4, 9]], scores[1, 10] = 1.0, 1.0
    assert all(
        ids.tolist() == [4, 10, 0]
        for ids in on_each_shard(3, 11, lambda s: s.argmax(slice_of_shard(scores, s)))
    )


def test_top_tokens_are_merged_where_a_shard_has_fewer_than_requested() -> None:
    rows = torch.randperm(22).float().view(2, 11)
    expected = UNSHARDED.topk(rows, 20)
    for values, ids in on_each_shard(4, 11, lambda shard: shard.topk(slice_of_shard(rows, shard), 20)):
        assert torch.equal(values, expected[0])
        assert torch.equal(ids, expected[1])


def test_rows_are_gathered_from_shards_of_different_widths() -> None:
    rows = torch.randn(2, 11)
    assert all(
        torch.equal(gathered, rows)
        for gathered in on_each_shard(4, 11, lambda s: s.all_gather(slice_of_shard(rows, s)))
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_row_on_one_shard_fails_only_its_request_on_all_shards(value: float) -> None:
    requests = all_method_cases()[-4:]
    well, *_ = on_each_shard(2, VOCAB, lambda shard: decode_on_shard(shard, requests, VOCAB))
    requests[1].logits[:, :, VOCAB - 1] = value
    for results in on_each_shard(2, VOCAB, lambda shard: decode_on_shard(shard, requests, VOCAB)):
        assert all(step.failed for step in results[1])
        assert [bitwise_equal(results[i], well[i]) for i in range(4)] == [True, False, True, True]


def test_a_missing_shard_is_an_error() -> None:
    def leave(shard: VocabShard) -> str:
        try:
            return "" if shard.comm.rank else str(shard.amax(torch.zeros(1, shard.shard_size)))
        except WorkerDiedError as error:
            return str(error)

    assert "another process exited or timed out" in on_each_shard(2, 4, leave)[0]
