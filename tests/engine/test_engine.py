from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor
from trimtab.engine import (
    Amulet,
    Base,
    ContextSteering,
    Engine,
    Guidance,
    LinearAlignment,
    Mato,
    Mixture,
    Objective,
    Opad,
    Prompt,
    Request,
    SamplingParams,
)
from trimtab.kernels.errors import InputError
from trimtab.kernels.lm_head import AnyHead, choose

from ..bits import steady
from ..literal import reference
from ..tiny import Tiny, at_rest, write_tensors

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.engine import Method
    from trimtab.engine.output import Output
    from trimtab.kernels.steer import Choice
    from trimtab.kernels.steer_table import Groups

KIND, SHORT = Objective("Your answer should be kind.", 3), Objective("Your answer should be short.", 1)
TRUE, ODD = Objective("Be true.", 0.25), Objective("東京 café!", 2)
EOS = 2
ASK = "What happens if an earthworm is cut in half?"
METHODS: list[Method] = [
    Base(),
    Prompt([KIND]),
    LinearAlignment([KIND]),
    ContextSteering([KIND, SHORT]),
    Guidance([KIND], kl_budget=0.3),
    Opad([KIND]),
    Amulet([KIND]),
    Amulet([KIND], kl_budget=0.05),
    Mato([KIND, SHORT]),
    Mato([KIND, SHORT, TRUE, ODD], accumulate="ema"),
    Mato([KIND, Objective("Be rude.", 0), SHORT], kl_budget=0.2, accumulate="mean", beta=2.0),
    Mixture([KIND, SHORT, ODD]),
]


def described(value: object) -> str:
    return f"{value.name}-{len(value.objectives)}" if hasattr(value, "objectives") else str(value)


each_method = pytest.mark.parametrize("method", METHODS, ids=described)


def sampled(seed: int, tokens: int = 20, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=1.0, seed=seed, ignore_eos=True, **fields)


def greedy(tokens: int = 20, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, **fields)


def prompt_ids(output: Output) -> list[list[int]]:
    return [branch.prompt_token_ids for branch in output.branches]


# Lists, errors, seeds


def test_a_list_is_answered_in_order_and_wrong_members_do_not_stop_it(tiny: Engine) -> None:
    wrong = [
        Request("x " * 600),
        Request(branch_token_ids=[[1, 300]]),
        Request(branch_token_ids=[[1, 2**40]]),
        Request(branch_token_ids=[[-1]]),
        Request("Why?", sampling=SamplingParams(logit_bias={307: 1.0})),
        Request("Why?", sampling=SamplingParams(stop_token_ids=(-1,))),
        Request([{"role": "user", "content": "Why?"}, {"role": "user", "content": "How?", 5: object()}]),
        Request("\ud800"),
    ]
    said = [
        r"the prompt of branch 'base' has \d+ tokens; .* max_model_len, which is 512",
        "branch_token_ids has token id 300; the model's ids are 0 to 299",
        f"branch_token_ids has token id {2**40}",
        "branch_token_ids has token id -1",
        "logit_bias has token id 307",
        "stop_token_ids has token id -1",
        "a chat template takes only JSON values",
        "must be valid Unicode",
    ]
    right = [Request(prompt, method, greedy(6)) for prompt, method in zip("abcdefgh", METHODS, strict=False)]
    outputs = tiny.generate([request for pair in zip(wrong, right, strict=True) for request in pair])
    for output, sentence in zip(outputs[::2], said, strict=True):
        assert output.finish_reason == "error"
        assert output.error is not None
        assert re.search(sentence, output.error)
        assert (output.text, output.token_ids) == ("", [])
        assert [o.error for o in output.outputs] == [output.error]
    for output, request in zip(outputs[1::2], right, strict=True):
        assert output.error is None
        assert output.token_ids == tiny.generate(request).token_ids
        assert f"user\n{request.prompt}<" in output.branches[0].prompt
    for request, sentence in zip(wrong, said, strict=True):
        with pytest.raises(InputError, match=sentence):
            tiny.generate(request)
        with pytest.raises(InputError, match=sentence):
            tiny.stream(request)


def test_an_empty_list_has_no_answers(tiny: Engine) -> None:
    assert tiny.generate([]) == []


def test_scores_are_refused_for_no_ids_too_many_and_unknown_ones(tiny: Engine) -> None:
    for ids, said in (
        ([], "0 ids; it must have 1 to 512"),
        ([5] * 513, "513 ids"),
        ([300], "id 300"),
        ([-1], "id -1"),
    ):
        with pytest.raises(InputError, match=said):
            tiny.score(ids)
    assert tiny.score([5] * 512).shape == (512, 307)


def test_bias_and_stop_ids_may_be_more_than_the_context_is_long(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB", max_model_len=64)
    bans = dict.fromkeys(range(100), -1e9)
    output = engine.generate(
        Request("Why?", sampling=greedy(5, logit_bias=bans, stop_token_ids=range(250, 290)))
    )
    assert min(output.token_ids) >= 100


def test_a_model_that_lacks_tokens_of_its_tokenizer_is_refused_with_both_numbers(tmp_path: Path) -> None:
    folder = Tiny(rows=290, tied=False).write(tmp_path / "short")  # the tokenizer has ids to 299
    with pytest.raises(InputError, match=r"the tokenizer has id 299, .* the model's embedding has 290 rows"):
        Engine.from_pretrained(str(folder), kv_cache_memory="1MiB")


def test_samples_differ_in_seed_and_each_can_be_had_alone(tiny: Engine) -> None:
    request = Request(ASK, Mato([KIND, SHORT]), sampled(40, n=4))
    output = tiny.generate(request)
    assert [sample.seed for sample in output.outputs] == [40, 41, 42, 43]
    assert replace(output, outputs=[]) == replace(output.outputs[0], outputs=[])
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4
    for sample in output.outputs:
        alone = tiny.generate(replace(request, sampling=sampled(sample.seed)))
        assert (alone.token_ids, alone.trace) == (sample.token_ids, sample.trace)


def test_a_seed_that_was_not_asked_for_is_reported_and_brings_the_answer_back(tiny: Engine) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=1.0, n=2)
    for sample in tiny.generate(Request(ASK, sampling=sampling)).outputs:
        again = tiny.generate(Request(ASK, sampling=replace(sampling, n=1, seed=sample.seed)))
        assert again.token_ids == sample.token_ids


def test_every_reported_seed_can_be_asked_for_again(tiny: Engine) -> None:
    output = tiny.generate(Request("Why?", sampling=sampled(2**64 - 1, 6, n=2)))
    for sample in output.outputs:
        again = tiny.generate(Request("Why?", sampling=sampled(sample.seed, 6)))
        assert again.token_ids == sample.token_ids


def test_an_engine_with_a_seed_draws_the_same_seeds_again(tiny_folder: Path, tiny: Engine) -> None:
    def seeds(seed: int | None) -> list[int]:
        engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB", seed=seed)
        return [output.seed for output in engine.generate([Request("Why?", sampling=greedy(1))] * 3)]

    assert seeds(7) == seeds(7)
    assert len({*seeds(7), *seeds(8), *seeds(None), *seeds(None)}) == 12


def test_greedy_answers_do_not_depend_on_the_seed(tiny: Engine) -> None:
    one, two = tiny.generate([Request(ASK, sampling=greedy(seed=seed)) for seed in (1, 2)])
    assert one.token_ids == two.token_ids
    assert (one.seed, two.seed) == (1, 2)


# A crowd


def crowd() -> list[Request]:
    """Every method, no objective to four, greedy and sampled, over prompts of many lengths."""
    prompts = [ASK, "Why?", "naïve 👩‍👩‍👧‍👦 " * 6, "Hello there, you two worms! " * 9]
    return [
        Request(prompts[i % 4], method, sampled(i) if i % 3 else greedy(8 + i, logprobs=3))
        for i, method in enumerate(METHODS)
    ]


@steady
def test_a_request_in_a_crowd_gives_what_it_gives_alone_to_the_last_bit(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="8MiB", max_num_batched_tokens=9999)
    for request, crowded in zip(crowd(), engine.generate(crowd()), strict=True):
        alone = engine.generate(request)
        assert crowded.token_ids == alone.token_ids, request.steering.name
        assert crowded.trace == alone.trace, request.steering.name
        assert crowded.logprobs == alone.logprobs, request.steering.name
        assert crowded.text == alone.text


def test_a_crowd_whose_prompts_are_cut_gives_the_same_tokens(tiny_folder: Path, tiny: Engine) -> None:
    """How a prompt is cut changes the rounding of its attention, so the trace agrees to float32 only."""
    small = {"max_num_batched_tokens": 48, "max_num_seqs": 9, "kv_cache_memory": "512KiB"}
    engine = Engine.from_pretrained(str(tiny_folder), **small)
    for whole, cut in zip(tiny.generate(crowd()), engine.generate(crowd()), strict=True):
        assert cut.token_ids == whole.token_ids
        assert cut.trace is not None
        assert whole.trace is not None
        for ours, theirs in zip(cut.trace.branch_logprobs, whole.trace.branch_logprobs, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_rows_of_the_table_are_left_clean_for_the_next_request(tiny: Engine) -> None:
    request = Request("Why?", Opad([KIND]), greedy(8))
    first = tiny.generate(request)
    tiny.generate([Request(ASK, method, sampled(3, 5)) for method in METHODS])
    assert tiny.generate(request).trace == first.trace


# Where an answer ends


def test_answers_end_at_max_tokens(tiny: Engine) -> None:
    output = tiny.generate(Request(ASK, sampling=greedy(7, ignore_eos=True)))
    assert (len(output.token_ids), output.finish_reason) == (7, "length")
    assert output.text == tiny.tokenizer.decode(output.token_ids)


def test_an_answer_ends_where_the_longest_branch_fills_the_context(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB", max_model_len=200)
    output = engine.generate(Request("Why?", Amulet([KIND]), greedy(500, ignore_eos=True)))
    longest = max(len(ids) for ids in prompt_ids(output))
    assert longest + len(output.token_ids) == 200
    assert output.finish_reason == "length"


def test_end_of_text_ends_the_answer_and_is_an_id_but_no_text(tiny: Engine) -> None:
    for field in ({}, {"skip_special_tokens": False}, {"include_stop_str_in_output": True}):
        output = tiny.generate(Request(ASK, sampling=greedy(logit_bias={EOS: 1e4}, **field)))
        assert (output.token_ids, output.text, output.finish_reason) == ([EOS], "", "stop")


def test_end_of_text_can_be_ignored(tiny: Engine) -> None:
    output = tiny.generate(Request(ASK, sampling=greedy(6, logit_bias={EOS: 1e4}, ignore_eos=True)))
    assert (output.token_ids, output.finish_reason) == ([EOS] * 6, "length")
    shown = tiny.generate(
        Request(ASK, sampling=greedy(2, logit_bias={EOS: 1e4}, ignore_eos=True, skip_special_tokens=False))
    )
    assert shown.text == "<|im_end|>" * 2


def test_no_answer_ends_before_min_tokens(tiny: Engine) -> None:
    plain = tiny.generate(Request(ASK, sampling=greedy(ignore_eos=True)))
    sampling = greedy(min_tokens=5, logit_bias={EOS: 1e4}, stop_token_ids=plain.token_ids[:3])
    output = tiny.generate(Request(ASK, sampling=sampling))
    assert len(output.token_ids) == 6
    assert output.token_ids[-1] == EOS
    assert not {EOS, *plain.token_ids[:3]} & set(output.token_ids[:5])


def test_stop_token_ids_end_the_answer_before_their_text(tiny: Engine) -> None:
    plain = tiny.generate(Request(ASK, sampling=greedy(ignore_eos=True)))
    stop = plain.token_ids[4]
    first = plain.token_ids.index(stop)
    output = tiny.generate(Request(ASK, sampling=greedy(stop_token_ids=(stop,), ignore_eos=True)))
    assert output.token_ids == plain.token_ids[: first + 1]
    assert output.text == tiny.tokenizer.decode(output.token_ids[:-1])
    assert output.finish_reason == "stop"


FORCED = "one two STOP three"


def forced(engine: Engine, text: str, **fields: Any) -> Output:
    """The answer of a model that says exactly `text`, character by character: every token is one byte."""
    ids = [id_ for character in text for id_ in engine.tokenizer.encode(character)]
    request = Request("Say it.", sampling=SamplingParams(max_tokens=len(ids), **fields))
    given = iter(ids)
    head: Any = engine._core.runner.model.head
    own = head._product

    def only(hidden: torch.Tensor) -> torch.Tensor:
        logits = own(hidden)
        logits[:, next(given)] = 1e4
        return logits

    head._product = only
    try:
        return engine.generate(request)
    finally:
        head._product = own


@pytest.mark.parametrize(
    ("stop", "include", "text", "tokens"),
    [
        (("STOP",), False, "one two ", 12),
        (("STOP",), True, "one two STOP", 12),
        (("o S", "STOP"), False, "one tw", 9),
        (("wo ST", "o S"), False, "one t", 10),
        (("never",), False, FORCED, len(FORCED)),
        (("threes",), False, FORCED, len(FORCED)),
        (("e",), False, "on", 3),
        (("e",), True, "one", 3),
        ((FORCED,), False, "", len(FORCED)),
    ],
)
def test_an_answer_ends_at_a_stop_text_that_spans_tokens(
    stop: tuple[str, ...], include: bool, text: str, tokens: int, tiny: Engine
) -> None:
    output = forced(tiny, FORCED, stop=stop, include_stop_str_in_output=include)
    assert (output.text, len(output.token_ids)) == (text, tokens)
    assert output.finish_reason == ("length" if text == FORCED else "stop")


def test_a_stop_text_found_only_as_the_answer_ends_is_a_stop(tiny: Engine) -> None:
    """ "abcd" may still come when "bc" has: only the end of the answer decides."""
    output = forced(tiny, "abc", stop=("abcd", "bc"))
    assert (output.text, output.finish_reason) == ("a", "stop")


def test_stop_texts_within_min_tokens_are_let_through(tiny: Engine) -> None:
    output = forced(tiny, "aXbXc", stop=("X",), min_tokens=3)
    assert (output.text, output.finish_reason, len(output.token_ids)) == ("aXb", "stop", 4)


# Log-probabilities, bias, penalties


def test_log_probabilities_are_those_of_scoring_the_finished_text(tiny: Engine) -> None:
    output = tiny.generate(Request(ASK, sampling=sampled(5, 30, logprobs=20)))
    prompt = prompt_ids(output)[0]
    scores = tiny.score(prompt + output.token_ids)[len(prompt) - 1 : -1]
    assert output.logprobs is not None
    assert output.trace is not None
    assert len(output.logprobs) == 30
    for place, (found, row) in enumerate(zip(output.logprobs, scores, strict=True)):
        assert found.token_id == output.token_ids[place]
        assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-4)
        assert found.logprob == pytest.approx(output.trace.branch_logprobs[place][0], abs=1e-5)
        assert len(found.top) == 20
        assert [*found.top.values()] == sorted(found.top.values(), reverse=True)
        values = row.topk(20).values.tolist()
        assert [*found.top.values()] == pytest.approx(values, abs=1e-4)
        assert all(value == pytest.approx(float(row[token]), abs=1e-4) for token, value in found.top.items())


def test_log_probabilities_are_as_many_as_asked_for(tiny: Engine) -> None:
    for count in (0, 1, 20):
        output = tiny.generate(Request("Why?", Amulet([KIND]), greedy(4, logprobs=count), trace=False))
        assert output.logprobs is not None
        assert [len(found.top) for found in output.logprobs] == [count] * len(output.token_ids)
        assert all(found.logprob <= 0 for found in output.logprobs)
    assert tiny.generate(Request("Why?", sampling=greedy(2))).logprobs is None


def test_log_probabilities_of_a_steered_answer_are_of_the_mixture_before_temperature(tiny: Engine) -> None:
    method = Mixture([KIND, SHORT])
    output = tiny.generate(Request(ASK, method, sampled(8, 10, logprobs=5, top_k=3)))
    assert output.logprobs is not None
    rows = [
        tiny.score(prompt + output.token_ids)[len(prompt) - 1 : -1].double() for prompt in prompt_ids(output)
    ]
    mixed = (0.75 * rows[1] + 0.25 * rows[2]).log_softmax(-1)
    for found, row in zip(output.logprobs, mixed, strict=True):
        assert found.logprob == pytest.approx(float(row[found.token_id]), abs=1e-4)
        assert [*found.top.values()] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)


def test_bias_bans_and_forces_tokens(tiny: Engine) -> None:
    plain = tiny.generate(Request(ASK, sampling=greedy(12, ignore_eos=True)))
    bans = dict.fromkeys(plain.token_ids, -1e9)
    banned = tiny.generate(Request(ASK, sampling=greedy(12, ignore_eos=True, logit_bias=bans)))
    assert not set(banned.token_ids) & set(plain.token_ids)
    force = tiny.generate(Request(ASK, Amulet([KIND]), sampled(1, 12, logit_bias={77: 1e9})))
    assert force.token_ids == [77] * 12


def greedy_by_hand(tiny: Engine, output: Output, change: Any) -> list[int]:
    """The arg max at every place of an answer after `change(log-probabilities, tokens so far)`."""
    prompt = prompt_ids(output)[0]
    rows = tiny.score(prompt + output.token_ids)[len(prompt) - 1 : -1, : tiny.tokenizer.vocab_size]
    return [int(change(row.clone(), output.token_ids[:place]).argmax()) for place, row in enumerate(rows)]


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (0.8, 0.4), (-1.0, -0.3)])
def test_presence_counts_a_token_once_and_frequency_every_use(
    presence: float, frequency: float, tiny: Engine
) -> None:
    def penalised(row: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        for token in set(tokens):
            row[token] -= presence + frequency * tokens.count(token)
        return row

    plain = tiny.generate(Request(ASK, sampling=greedy(40, ignore_eos=True)))
    sampling = greedy(40, ignore_eos=True, presence_penalty=presence, frequency_penalty=frequency)
    output = tiny.generate(Request(ASK, sampling=sampling))
    assert output.token_ids == greedy_by_hand(tiny, output, penalised)
    assert output.token_ids != plain.token_ids


@pytest.mark.parametrize("penalty", [1.3, 3.0, 0.8])
def test_the_repetition_penalty_is_that_of_transformers(
    penalty: float, tiny: Engine, tiny_folder: Path
) -> None:
    output = tiny.generate(Request(ASK, sampling=greedy(30, ignore_eos=True, repetition_penalty=penalty)))
    prompt = prompt_ids(output)[0]
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    with torch.inference_mode():
        logits = reference(tiny_folder)(torch.tensor([prompt + output.token_ids])).logits[0]
    for place, token in enumerate(output.token_ids):
        ids = torch.tensor([prompt + output.token_ids[:place]])
        row = logits[None, len(prompt) - 1 + place].clone()
        assert token == int(processor(ids, row)[0, : tiny.tokenizer.vocab_size].argmax())
    plain = tiny.generate(Request(ASK, sampling=greedy(30, ignore_eos=True)))
    assert output.token_ids != plain.token_ids


def test_sampling_keeps_to_top_k(tiny: Engine) -> None:
    output = tiny.generate(Request(ASK, Mato([KIND, SHORT]), sampled(11, 40, top_k=3, logprobs=10)))
    assert output.logprobs is not None
    tokens = 300  # rows without one are reported too, but never drawn
    ranks = [
        [token for token in found.top if token < tokens].index(found.token_id) for found in output.logprobs
    ]
    assert set(ranks) == {0, 1, 2}


def test_rows_without_a_token_are_never_chosen(tiny: Engine) -> None:
    request = Request(ASK, sampling=SamplingParams(max_tokens=300, temperature=50.0, seed=3, ignore_eos=True))
    assert max(tiny.generate(request).token_ids) < tiny.tokenizer.vocab_size == 300


# Streams


@pytest.mark.parametrize("seed", range(6))
def test_pieces_of_a_stream_join_to_the_text_whatever_bytes_come(seed: int, tiny: Engine) -> None:
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


def test_text_without_stops_is_the_decoding_of_all_its_tokens(tiny: Engine) -> None:
    for seed in range(4):
        output = tiny.generate(Request(ASK, sampling=replace(sampled(seed, 60), temperature=3.0)))
        assert output.text == tiny.tokenizer.decode(output.token_ids)


def test_a_stream_left_early_gives_everything_back(tiny: Engine) -> None:
    for delta in tiny.stream(Request(ASK, Mato([KIND, SHORT]), sampled(2, 100, n=3))):
        assert delta.output is None
        assert not at_rest(tiny)
        break
    assert at_rest(tiny)


def test_a_stream_that_is_never_read_takes_nothing(tiny: Engine) -> None:
    tiny.stream(Request(ASK, Mato([KIND, SHORT])))
    assert at_rest(tiny)


def test_streams_read_in_turn_do_not_disturb_each_other(tiny: Engine) -> None:
    requests = [
        Request(ASK, Mato([KIND, SHORT]), sampled(1, 25)),
        Request("Why?", Opad([KIND]), greedy(40, ignore_eos=True)),
        Request("naïve " * 9, sampling=sampled(3, 10, n=2)),
    ]
    alone = [list(tiny.stream(request)) for request in requests]
    left = tiny.stream(Request("Hello", Amulet([KIND]), sampled(9, 100)))
    turns = list(zip_longest(*(tiny.stream(request) for request in requests), [next(left)]))
    assert not at_rest(tiny)
    left.close()
    assert at_rest(tiny)
    for index, expected in enumerate(alone):
        found = [turn[index] for turn in turns if turn[index] is not None]
        found.sort(key=lambda delta: delta.index)
        expected.sort(key=lambda delta: delta.index)
        assert [(d.index, d.text, d.token_ids, d.trace) for d in found] == [
            (d.index, d.text, d.token_ids, d.trace) for d in expected
        ]


def test_answering_a_list_while_a_stream_is_open_disturbs_neither(tiny: Engine) -> None:
    request = Request(ASK, Mato([KIND, SHORT]), sampled(1, 25))
    expected = tiny.generate(request)
    stream = tiny.stream(request)
    pieces = [next(stream).text]
    assert tiny.generate([request, request])[1].trace == expected.trace
    pieces += [delta.text for delta in stream]
    assert "".join(pieces) == expected.text


# Numbers that are not numbers


POISON = 0xE2
"""The first byte of a character of three: when the answer fails after it, half a character is held back."""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, int]:
    """A model that breaks after one token: the embedding of byte E2 is NaN."""
    tiny = Tiny(tied=False, seed=6)
    folder = tiny.write(tmp_path_factory.mktemp("poisoned"))
    token = Engine.from_pretrained(str(folder), kv_cache_memory="1MiB").tokenizer.encode("┐")[0]
    tensors = tiny.tensors()
    tensors["model.embed_tokens.weight"][token] = torch.nan
    write_tensors(folder, tensors)
    with pytest.warns(UserWarning, match="infinite or none"):
        return Engine.from_pretrained(str(folder), kv_cache_memory="64KiB", max_num_seqs=6), token


def test_a_model_that_breaks_fails_its_own_request_with_a_reason(poisoned: tuple[Engine, int]) -> None:
    engine, token = poisoned
    good = Request("Why?", Prompt([Objective("a")]), greedy(12, ignore_eos=True))
    before = engine.generate(good)
    assert token not in before.token_ids
    bad = Request("a", sampling=greedy(12, logit_bias={token: 1e4}))
    outputs = engine.generate([bad, good, bad, good])
    for output in outputs[::2]:
        assert (output.finish_reason, output.token_ids) == ("error", [token])
        assert output.error == "the model gave no finite score to any allowed token at token 2 of the answer"
        assert output.trace is not None
        assert len(output.trace.branch_logprobs) == 1
    for output in outputs[1::2]:
        assert (output.token_ids, output.trace) == (before.token_ids, before.trace)
    assert at_rest(engine)


def test_pages_and_slots_of_a_broken_request_do_not_harm_the_next(poisoned: tuple[Engine, int]) -> None:
    engine, token = poisoned
    good = Request("Why?", sampling=greedy(12, ignore_eos=True))
    before = engine.generate(good)
    stream = engine.stream(Request("b", sampling=greedy(60, ignore_eos=True, logit_bias={token: -1e9})))
    next(stream)  # keeps the engine from resting, so that slots are used again as they are
    for _ in range(3):
        assert engine.generate(Request("a", sampling=greedy(12, logit_bias={token: 1e4}))).error
        after = engine.generate(good)
        assert (after.token_ids, after.trace) == (before.token_ids, before.trace)
    stream.close()
    assert at_rest(engine)


def test_a_stream_that_fails_still_joins_to_the_text(poisoned: tuple[Engine, int]) -> None:
    engine, token = poisoned
    deltas = list(engine.stream(Request("a", sampling=greedy(12, logit_bias={token: 1e4}))))
    output = deltas[-1].output
    assert output is not None
    assert output.text == "\ufffd" == "".join(delta.text for delta in deltas)
    assert [token_id for delta in deltas for token_id in delta.token_ids] == output.token_ids


def test_a_failed_answer_stays_failed_though_its_rest_is_a_stop_text(poisoned: tuple[Engine, int]) -> None:
    engine, token = poisoned
    output = engine.generate(Request("a", sampling=greedy(12, logit_bias={token: 1e4}, stop=("\ufffd",))))
    assert output.finish_reason == "error"
    assert output.error


def test_a_request_without_any_allowed_token_fails_with_a_reason(tiny: Engine) -> None:
    sampling = greedy(4, min_tokens=2, stop_token_ids=range(300))
    bad, good = tiny.generate([Request("Why?", sampling=sampling), Request("Why?", sampling=greedy(4))])
    assert (bad.finish_reason, bad.token_ids, bad.text) == ("error", [], "")
    assert bad.error == "the model gave no finite score to any allowed token at token 1 of the answer"
    assert good.error is None


# The trace


@each_method
def test_the_trace_has_one_row_a_token_and_one_number_a_branch(method: Method, tiny: Engine) -> None:
    output = tiny.generate(Request(ASK, method, sampled(4, 25)))
    trace, objectives = output.trace, len(output.branches) - 1
    assert trace is not None
    assert [len(row) for row in trace.weights] == [objectives] * 25
    assert [len(row) for row in trace.rewards] == [objectives] * 25
    assert [len(row) for row in trace.branch_logprobs] == [objectives + 1] * 25
    assert (len(trace.strength), len(trace.kl)) == (25, 25)
    assert trace.weights[0] == pytest.approx(method.weights(), abs=1e-15)
    for row in trace.weights:
        assert all(weight >= 0 for weight in row)
        assert not objectives or sum(row) == pytest.approx(1, abs=1e-12)
        assert all(weight == 0 for weight, asked in zip(row, method.weights(), strict=True) if asked == 0)
    # each branch's log-probabilities are those of its own prompt followed by the answer
    for index, prompt in enumerate(prompt_ids(output)):
        rows = tiny.score(prompt + output.token_ids)[len(prompt) - 1 : -1]
        expected = [float(row[token]) for row, token in zip(rows, output.token_ids, strict=True)]
        assert [row[index] for row in trace.branch_logprobs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("accumulate", ["sum", "mean", "ema"])
def test_rewards_are_what_the_log_probabilities_of_the_tokens_so_far_add_up_to(
    accumulate: str, tiny: Engine
) -> None:
    method = Mato([KIND, SHORT, ODD], beta=2.5, tau=4.0, accumulate=accumulate, decay=0.7)
    trace = tiny.generate(Request(ASK, method, sampled(4, 25))).trace
    assert trace is not None
    total, mean = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    average = torch.zeros(3, dtype=torch.float64)
    asked = torch.tensor(method.weights(), dtype=torch.float64)
    for count, (rewards, weights, logprobs) in enumerate(
        zip(trace.rewards, trace.weights, trace.branch_logprobs, strict=True)
    ):
        expected = {"sum": total, "mean": mean, "ema": average}[accumulate]
        assert rewards == pytest.approx(expected.tolist(), abs=1e-9)
        assert weights == pytest.approx((asked * (-expected / 4.0).exp()).div(
            (asked * (-expected / 4.0).exp()).sum()).tolist(), abs=1e-9)  # fmt: skip
        row = torch.tensor(logprobs, dtype=torch.float64)
        total = total + 2.5 * (row[1:] - row[0]).float().double()
        mean = total / (count + 1)
        average = 0.7 * average + 0.3 * 2.5 * (row[1:] - row[0]).float().double()


@each_method
def test_tokens_are_the_same_without_a_trace(method: Method, tiny: Engine) -> None:
    for sampling in (greedy(25, ignore_eos=True), sampled(6, 25, top_p=0.9)):
        request = Request(ASK, method, sampling)
        traced, bare = tiny.generate(request), tiny.generate(replace(request, trace=False))
        assert bare.token_ids == traced.token_ids
        assert bare.trace is None
        mixed = tiny.generate([request, replace(request, trace=False)])
        assert [output.token_ids for output in mixed] == [traced.token_ids] * 2


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        (Base(), 1),
        (Prompt([KIND]), 1),
        (Guidance([KIND], guidance_scale=1.0), 1),
        (Guidance([KIND], guidance_scale=0.0), 1),
        (Guidance([KIND]), 2),
        (Guidance([KIND], guidance_scale=1.0, kl_budget=0.1), 2),
        (Opad([KIND]), 2),
        (Mixture([KIND, Objective("Be rude.", 0), SHORT]), 2),
        (Mato([KIND, Objective("Be rude.", 0), SHORT]), 3),
        (Mato([KIND, SHORT], optimise_online=False), 3),
        (Mato([KIND, SHORT], optimise_online=False, optimise_weights=False), 2),
    ],
    ids=described,
)
def test_a_branch_that_cannot_matter_is_not_run_without_a_trace(
    method: Method, rows: int, tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counted(head: AnyHead, hidden: torch.Tensor, groups: Groups, *args: Any, **more: Any) -> Choice:
        seen.append(len(groups.branch))
        return choose(head, hidden, groups, *args, **more)

    monkeypatch.setattr(tiny._core.runner, "choose", counted)
    bare = tiny.generate(Request(ASK, method, greedy(5, ignore_eos=True), trace=False))
    assert seen == [rows] * 5
    traced = tiny.generate(Request(ASK, method, greedy(5, ignore_eos=True)))
    assert seen[5:] == [len(traced.branches)] * 5
    assert bare.token_ids == traced.token_ids
    assert len(bare.branches) == len(traced.branches)


# Properties of steering (MATH §7)


def ids_of(engine: Engine, method: Method, prompts: list[list[int]], tokens: int = 30) -> list[int]:
    request = Request(branch_token_ids=prompts, steering=method, sampling=greedy(tokens, ignore_eos=True))
    return engine.generate(request).token_ids


def test_exact_ids_are_the_prompts_and_an_answer_to_text_is_the_answer_to_its_ids(tiny: Engine) -> None:
    method = Mato([KIND, SHORT])
    rendered = tiny.generate(Request(ASK, method, greedy(30, ignore_eos=True)))
    exact = tiny.generate(
        Request(branch_token_ids=prompt_ids(rendered), steering=method, sampling=greedy(30, ignore_eos=True))
    )
    assert exact.token_ids == rendered.token_ids
    assert [(b.name, b.prompt) for b in exact.branches] == [(b.name, b.prompt) for b in rendered.branches]
    assert exact.trace == rendered.trace


def test_a_coefficient_of_one_on_one_branch_is_plain_decoding_of_it(tiny: Engine) -> None:
    base, wish = [5, 9, 120, 30], [5, 9, 77, 210, 33]
    plain, wished = ids_of(tiny, Base(), [base]), ids_of(tiny, Base(), [wish])
    assert plain != wished
    assert ids_of(tiny, Guidance([KIND], guidance_scale=0.0), [base, wish]) == plain
    for method in (Prompt([KIND]), Guidance([KIND], guidance_scale=1.0), Amulet([KIND], iterations=0)):
        assert ids_of(tiny, method, [base, wish]) == wished
    one_hot = Mixture([Objective("a", 0), Objective("b", 1), Objective("c", 0)])
    assert ids_of(tiny, one_hot, [base, base, wish, [7, 7]]) == wished


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, Base)], ids=described)
def test_identical_branches_give_plain_decoding_whatever_the_weights(method: Method, tiny: Engine) -> None:
    prompt = [5, 9, 120, 30, 211]
    assert ids_of(tiny, method, [prompt] * (1 + len(method.branches()))) == ids_of(tiny, Base(), [prompt])


@pytest.mark.parametrize("make", [Mato, Mixture, ContextSteering], ids=lambda method: method.name)
def test_permuting_objectives_with_their_weights_changes_nothing(make: type[Method], tiny: Engine) -> None:
    objectives = [KIND, SHORT, TRUE, ODD]
    order = [2, 0, 3, 1]
    one, other = tiny.generate(
        [
            Request(ASK, make(chosen), greedy(40, ignore_eos=True))
            for chosen in (objectives, [objectives[i] for i in order])
        ]
    )
    assert one.token_ids == other.token_ids
    assert one.trace is not None
    assert other.trace is not None
    for ours, theirs in zip(one.trace.weights, other.trace.weights, strict=True):
        assert [ours[i] for i in order] == pytest.approx(theirs, abs=1e-9)


def test_mato_with_one_objective_is_amulet_with_its_hyperparameters(tiny: Engine) -> None:
    mato = Mato([KIND], alpha=0.8, lam=1.2, nu=5, iterations=33)
    amulet = Amulet([KIND], alpha=0.8, lam=1.2, eta=5, iterations=33)
    for sampling in (greedy(30, ignore_eos=True), sampled(3, 30)):
        one, other = tiny.generate([Request(ASK, method, sampling) for method in (mato, amulet)])
        assert one.token_ids == other.token_ids


@pytest.mark.parametrize("budget", [0.01, 0.2, 1.0])
def test_a_trust_region_is_obeyed_at_every_token(budget: float, tiny: Engine) -> None:
    method = Amulet([KIND], kl_budget=budget)
    output = tiny.generate(Request(ASK, method, greedy(30, ignore_eos=True)))
    assert output.trace is not None
    limit = method.program().scale
    assert all(kl is not None and kl <= budget + 1e-4 for kl in output.trace.kl)
    assert all(1 <= a <= limit for a in output.trace.strength)
    assert any(a < limit for a in output.trace.strength), "the region never mattered"
    free = tiny.generate(Request(ASK, Amulet([KIND]), greedy(30, ignore_eos=True)))
    assert output.token_ids != free.token_ids


def test_a_wide_trust_region_is_the_plain_method(tiny: Engine) -> None:
    for make in (Amulet, Guidance):
        plain, wide = tiny.generate(
            [Request(ASK, make([KIND], kl_budget=budget), greedy(30)) for budget in (None, 1e6)]
        )
        assert plain.token_ids == wide.token_ids
        assert plain.trace is not None
        assert wide.trace is not None
        assert plain.trace.strength == wide.trace.strength


def test_branches_are_named_and_differ_only_by_their_wish(tiny: Engine) -> None:
    for placement in ("system", "user"):
        output = tiny.generate(Request(ASK, Mato([KIND, SHORT], placement=placement), greedy(2)))
        assert [branch.name for branch in output.branches] == ["base", KIND.text, SHORT.text]
        for branch in output.branches[1:]:
            assert branch.prompt.replace(f" {branch.name}", "") == output.branches[0].prompt
            assert branch.prompt_token_ids == tiny.tokenizer.encode(branch.prompt)


def test_steered_answers_differ_from_each_other(tiny: Engine) -> None:
    """So that no test above holds only because the model says the same whatever it is asked."""
    outputs = tiny.generate([Request(ASK, method, greedy(25, ignore_eos=True)) for method in METHODS])
    assert len({tuple(output.token_ids) for output in outputs}) >= len(METHODS) - 1


def test_timings_are_those_of_the_clock(tiny: Engine) -> None:
    timings = tiny.generate(Request(ASK, Amulet([KIND]), greedy(20, ignore_eos=True))).timings
    assert min(timings.queue, timings.prefill, timings.decode) >= 0
    assert timings.tokens_per_second == pytest.approx(19 / timings.decode)


def test_decoding_is_the_same_a_second_time(tiny: Engine) -> None:
    request = Request(ASK, Mato([KIND, SHORT]), sampled(4, 25))
    first, second = tiny.generate(request), tiny.generate(request)
    assert (first.token_ids, first.trace) == (second.token_ids, second.trace)
    assert all(a is not b for a, b in pairwise([first.trace, second.trace]))
