"""The steering step on parts of a vocabulary; each part is a thread here, and gloo joins them."""

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
from trimtab.kernels.distributed.communicator import LostPeerError, Peers
from trimtab.kernels.distributed.vocab_parallel import WHOLE, Shard
from trimtab.kernels.steering.state import SteerTable
from trimtab.kernels.steering.top_k_top_p import support_threshold

from ..steering_harness import VOCAB, Request, Seen, decode, mixture_of_requests, random_logits, same, tokens

T = TypeVar("T")
SIZES = (2, 3, 4)
WAIT = timedelta(seconds=20)


def in_parts(size: int, vocab: int, call: Callable[[Shard], T]) -> list[T]:
    """What `call` gives for each of `size` parts of the vocabulary, all at the same time."""
    store = c10d.HashStore()

    def part(rank: int) -> T:
        gloo: Any = c10d.ProcessGroupGloo
        options = gloo._Options()
        options._devices, options._timeout = [gloo.create_device(hostname="127.0.0.1")], WAIT
        peers = Peers(gloo(store, rank, size, options))
        ids = Shard.part(rank, size, vocab)
        return call(Shard(peers, ids.start, len(ids), vocab))

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(part, range(size)))


def own(rows: Tensor, shard: Shard) -> Tensor:
    return rows[..., shard.first : shard.first + shard.width].contiguous()


def decoded(shard: Shard, requests: list[Request], named: int) -> list[list[Seen]]:
    """All requests on this part; ids from `named` on have no token."""
    table = SteerTable(min(max(named - shard.first, 0), shard.width), shard=shard)
    return decode(*(replace(each, logits=own(each.logits, shard)) for each in requests), table=table)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("named", [VOCAB, 700])
def test_parts_choose_the_tokens_of_the_whole_and_all_agree_to_the_last_bit(size: int, named: int) -> None:
    requests = mixture_of_requests()
    whole = decode(*requests, table=SteerTable(named))
    first, *others = in_parts(size, VOCAB, lambda shard: decoded(shard, requests, named))
    assert all(same(other, first) for other in others)
    assert [tokens(seen) for seen in first] == [tokens(seen) for seen in whole]
    assert max(max(tokens(seen)) for seen in first) < named


@pytest.mark.parametrize("size", SIZES)
def test_log_probabilities_of_parts_are_as_near_to_float64_as_those_of_the_whole(size: int) -> None:
    requests = mixture_of_requests()
    whole = decode(*requests)
    (parts, *_) = in_parts(size, VOCAB, lambda shard: decoded(shard, requests, VOCAB))
    for request, one, other in zip(requests, whole, parts, strict=True):
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
def test_a_request_gives_the_same_bits_on_parts_in_a_mixed_batch_as_alone(size: int) -> None:
    requests = mixture_of_requests()
    (together, *_) = in_parts(size, VOCAB, lambda shard: decoded(shard, requests, VOCAB))
    for index in (1, 7, 11, 14):
        alone, *_ = in_parts(size, VOCAB, lambda shard, i=index: decoded(shard, [requests[i]], VOCAB))
        assert same(alone[0], together[index])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_a_support_on_parts_is_that_of_sorting(size: int, spread: float) -> None:
    scores = random_logits(4, 1, 6, VOCAB, spread)[0]
    scores[:, 5:9] = -torch.inf
    scores[:, 9] = -0.0
    scores[0, 10:60] = scores[0].amax()
    top_k = torch.tensor([1, 2, 0, VOCAB - 1, 700, 2 * VOCAB])
    top_p = torch.tensor([0.5, 0.01, 0.999, 1.0, 0.9, 0.3]).double()
    min_p = torch.tensor([0.0, 0.5, 0.0, 0.01, 0.0, 1.0]).double()
    limits = (top_k, top_p, min_p)
    expected = scores >= support_threshold(scores, *limits)
    for threshold in in_parts(
        size, VOCAB, lambda shard: support_threshold(own(scores, shard), *limits, shard)
    ):
        assert torch.equal(scores >= threshold, expected)
    wanted = WHOLE.nucleus(scores, top_p)
    for threshold in in_parts(size, VOCAB, lambda shard: shard.nucleus(own(scores, shard), top_p)):
        assert torch.equal(threshold, wanted)


def test_of_equal_scores_the_lowest_id_is_taken_in_whichever_part_it_lies() -> None:
    scores = torch.zeros(3, 11)
    scores[0, [4, 9]], scores[1, 10] = 1.0, 1.0
    assert all(found.tolist() == [4, 10, 0] for found in in_parts(3, 11, lambda s: s.argmax(own(scores, s))))


def test_the_likeliest_tokens_are_merged_where_a_part_has_fewer_than_are_asked_for() -> None:
    rows = torch.randperm(22).float().view(2, 11)
    expected = WHOLE.topk(rows, 20)
    for values, ids in in_parts(4, 11, lambda shard: shard.topk(own(rows, shard), 20)):
        assert torch.equal(values, expected[0])
        assert torch.equal(ids, expected[1])


def test_rows_are_put_together_from_parts_of_different_widths() -> None:
    rows = torch.randn(2, 11)
    assert all(torch.equal(whole, rows) for whole in in_parts(4, 11, lambda s: s.whole(own(rows, s))))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_in_one_part_fails_in_all_and_alone(value: float) -> None:
    requests = mixture_of_requests()[-4:]
    well, *_ = in_parts(2, VOCAB, lambda shard: decoded(shard, requests, VOCAB))
    requests[1].logits[:, :, VOCAB - 1] = value
    for found in in_parts(2, VOCAB, lambda shard: decoded(shard, requests, VOCAB)):
        assert all(seen.failed for seen in found[1])
        assert [same(found[i], well[i]) for i in range(4)] == [True, False, True, True]


def test_a_part_that_does_not_come_is_an_error() -> None:
    def leave(shard: Shard) -> str:
        try:
            return "" if shard.peers.rank else str(shard.amax(torch.zeros(1, shard.width)))
        except LostPeerError as error:
            return str(error)

    assert "another process does not answer" in in_parts(2, 4, leave)[0]
