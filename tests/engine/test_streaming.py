"""Streams of an Engine: joined deltas, interleaved streams, streams beside a list, streams left early."""

from __future__ import annotations

from itertools import zip_longest

import pytest
from trimtab.engine import Amulet, Engine, Guidance, Mato, Opad, Request, SamplingParams

from ..helpers.sample_requests import KIND, QUESTION, SHORT, greedy_params, sampled_params
from ..helpers.tiny_model import is_idle


@pytest.mark.parametrize("seed", range(6))
def test_the_deltas_of_a_stream_join_to_the_text_for_any_bytes(seed: int, tiny: Engine) -> None:
    sampling = SamplingParams(max_tokens=60, temperature=2.0, seed=seed, ignore_eos=True, n=2, stop=("e",))
    request = Request("東京 👩‍👩‍👧‍👦", Guidance([KIND]), sampling)
    deltas = list(tiny.stream(request))
    output = tiny.generate(request)
    for index, sample in enumerate(output.outputs):
        mine = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in mine) == sample.text
        assert [token for delta in mine for token in delta.token_ids] == sample.token_ids
        assert [delta.output is not None for delta in mine] == [False] * (len(mine) - 1) + [True]
        assert sample.trace is not None
        traces = [delta.trace for delta in mine if delta.trace]
        assert [row for trace in traces for row in trace.weights] == sample.trace.weights
        assert [kl for trace in traces for kl in trace.kl] == sample.trace.kl
        last = mine[-1].output
        assert last is not None
        assert (last.text, last.token_ids, last.trace) == (sample.text, sample.token_ids, sample.trace)
    assert any("\ufffd" in sample.text for sample in output.outputs)


def test_a_stream_left_early_frees_everything(tiny: Engine) -> None:
    for delta in tiny.stream(Request(QUESTION, Mato([KIND, SHORT]), sampled_params(2, 100, n=3))):
        assert delta.output is None
        assert not is_idle(tiny)
        break
    assert is_idle(tiny)


def test_an_unread_stream_uses_no_resources(tiny: Engine) -> None:
    tiny.stream(Request(QUESTION, Mato([KIND, SHORT])))
    assert is_idle(tiny)


def test_interleaved_streams_do_not_affect_each_other(tiny: Engine) -> None:
    requests = [
        Request(QUESTION, Mato([KIND, SHORT]), sampled_params(1, 25)),
        Request("Why?", Opad([KIND]), greedy_params(40, ignore_eos=True)),
        Request("naïve " * 9, sampling=sampled_params(3, 10, n=2)),
    ]
    alone = [list(tiny.stream(request)) for request in requests]
    left = tiny.stream(Request("Hello", Amulet([KIND]), sampled_params(9, 100)))
    turns = list(zip_longest(*(tiny.stream(request) for request in requests), [next(left)]))
    assert not is_idle(tiny)
    left.close()
    assert is_idle(tiny)
    for index, expected in enumerate(alone):
        deltas = [turn[index] for turn in turns if turn[index] is not None]
        deltas.sort(key=lambda delta: delta.index)
        expected.sort(key=lambda delta: delta.index)
        assert [(d.index, d.text, d.token_ids, d.trace) for d in deltas] == [
            (d.index, d.text, d.token_ids, d.trace) for d in expected
        ]


def test_generating_a_list_while_a_stream_is_open_affects_neither(tiny: Engine) -> None:
    request = Request(QUESTION, Mato([KIND, SHORT]), sampled_params(1, 25))
    expected = tiny.generate(request)
    stream = tiny.stream(request)
    pieces = [next(stream).text]
    assert tiny.generate([request, request])[1].trace == expected.trace
    pieces += [delta.text for delta in stream]
    assert "".join(pieces) == expected.text
