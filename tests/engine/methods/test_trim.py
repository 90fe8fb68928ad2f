"""Trim in the engine: weights as intensities, fulfilment, notes, and answers alone as in a batch."""

from __future__ import annotations

import pytest
from trimtab import DEFAULT_METHOD, Base, Engine, Mato, Mixture, Objective, Request, SamplingParams, Trim
from trimtab.engine.methods.base import Method
from trimtab.engine.methods.builtin import METHODS
from trimtab.kernels.common.errors import InputError

GREEDY = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=2, temperature=0.9, top_p=0.9, seed=3)
QUESTION = "What happens if an earthworm is cut in half?"


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", [m for m in METHODS if m is not Base], ids=lambda method: method.name)
def test_all_weights_zero_is_plain_decoding_for_every_method(
    method: type[Method], sampling: SamplingParams, tiny_engine: Engine
) -> None:
    plain, steered = tiny_engine.generate(
        [
            Request(QUESTION, Base(), sampling),
            Request(QUESTION, method((Objective("Be kind.", 0), Objective("Be brief.", 0))), sampling),
        ]
    )
    assert (steered.error, steered.token_ids, steered.logprobs) == (None, plain.token_ids, plain.logprobs)


def test_objectives_alone_are_those_of_the_default_method() -> None:
    expected = Trim((Objective("Be kind.", 0.7), Objective("Be brief.")))
    assert DEFAULT_METHOD is Trim
    assert Request("Hi", {"Be kind.": 0.7, "Be brief.": 1}).steering == expected
    assert Request("Hi", [Objective("Be kind.", 0.7), Objective("Be brief.")]).steering == expected
    assert Request("Hi", {}).steering == Request("Hi", []).steering == Base()
    with pytest.raises(InputError, match=r"weight of objective 'Be kind\.' is -1\.0"):
        Request("Hi", {"Be kind.": -1})


def test_an_answer_is_the_same_alone_and_in_a_batch(tiny_engine: Engine) -> None:
    pair = [Objective("Be kind."), Objective("Be brief.", 2)]
    many = [Objective(f"Be {index}.", index / 4) for index in range(7)]
    requests = [
        Request(QUESTION, {"Be kind.": 0.4}, GREEDY),
        Request("Why?", Trim(many, control_rate=0.5), SAMPLED),
        Request(QUESTION, Trim(pair, relative_top=None), SAMPLED),
        Request("Is it so?", Mato(pair), GREEDY),
    ]
    batch = tiny_engine.generate(requests)
    for alone, batched in zip(map(tiny_engine.generate, requests), batch, strict=True):
        assert (alone.token_ids, alone.trace, alone.logprobs) == (
            batched.token_ids,
            batched.trace,
            batched.logprobs,
        )
        assert alone.trace is not None
        assert alone.fulfilment == alone.trace.fulfilment[-1]


def test_fulfilment_is_told_without_a_trace_by_trim_alone(tiny_engine: Engine) -> None:
    objectives = [Objective("Be kind."), Objective("Be brief.", 0.3)]
    traced, untraced, other = tiny_engine.generate(
        [
            Request(QUESTION, objectives, GREEDY),
            Request(QUESTION, objectives, GREEDY, trace=False),
            Request(QUESTION, Mixture(objectives), GREEDY, trace=False),
        ]
    )
    assert untraced.token_ids == traced.token_ids
    assert untraced.fulfilment == traced.fulfilment
    assert None not in traced.fulfilment
    assert other.fulfilment == [None, None]


def test_an_objective_that_changes_nothing_is_noted(tiny_engine: Engine) -> None:
    ids = [5, 6, 7]
    request = Request(
        steering=Trim([Objective("Be kind."), Objective("Be brief.")]),
        branch_token_ids=[ids, ids, [9, 8, 11, 12]],
        sampling=GREEDY,
    )
    output = tiny_engine.generate(request)
    assert output.fulfilment[0] is None
    assert output.fulfilment[1] is not None
    assert output.notes == [
        "the model hardly reacts to objective 'Be kind.': its prompt changed the predictions by less than "
        "1 nat in 24 tokens"
    ]


def test_published_methods_say_what_they_make_of_the_weights() -> None:
    pair = [Objective("Be kind.", 3), Objective("Be brief.")]
    assert Mato(pair).notes() == ["mato uses only the ratios of the weights: they become 0.75, 0.25"]
    assert Mato([Objective("Be kind.", 0.5), Objective("Be brief.", 0.5)]).notes() == []
    assert Trim(pair).notes() == []
