"""Stop strings in a streamed answer: matched as soon as they are complete, for any split of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from trimtab.engine.engine import Engine
from trimtab.engine.methods.builtin import Base
from trimtab.engine.outputs import SampledToken
from trimtab.engine.request import Request
from trimtab.engine.sampling_params import SamplingParams
from trimtab.engine.sequence.output_processor import OutputState
from trimtab.engine.sequence.stop_strings import StopStringMatcher
from trimtab.kernels.common.errors import InputError
from trimtab.models.tokenizer.huggingface import HFTokenizerBackend
from trimtab.models.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence


def expected_stop(text: str, stops: Sequence[str], include: bool) -> tuple[str, bool]:
    """Reference on the complete text: the earliest start, then the shortest stop string."""
    for start in range(len(text)):
        for stop in sorted(stops, key=len):
            if text.startswith(stop, start):
                return text[: start + len(stop) if include else start], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_a_text_is_cut_at_its_earliest_stop_for_any_split_into_pieces(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    finder = StopStringMatcher(stops, include)
    visible, hits = "", []
    for piece in pieces:
        text, hit = finder.step(piece)
        visible += text
        hits.append(hit)
    visible += finder.flush()
    assert (visible, finder.matched) == expected_stop("".join(pieces), stops, include)
    assert hits == sorted(hits)


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_only_a_possible_stop_prefix_is_held_back(text: str, stops: list[str]) -> None:
    visible, hit = StopStringMatcher(stops).step(text)
    if not hit:
        pending = text[len(visible) :]
        longest = max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        assert pending == text[len(text) - longest :]


def test_a_stop_string_across_pieces_is_matched_as_soon_as_it_is_complete() -> None:
    finder = StopStringMatcher(["\n\nUser:"])
    assert finder.step("Yes.\n") == ("Yes.", False)
    assert finder.step("\nUs") == ("", False)
    assert finder.step("er: more") == ("", True)
    assert finder.step("and more") == ("", True)
    assert finder.flush() == ""


@pytest.mark.parametrize(("last", "visible"), [("d", ""), ("x", "a"), ("", "a")])
def test_a_match_waits_for_a_possible_earlier_match(last: str, visible: str) -> None:
    finder = StopStringMatcher(["bc", "abcd"])
    assert finder.step("abc") == ("", False)
    assert finder.step(last)[0] + finder.flush() == visible
    assert finder.matched


def test_an_incomplete_stop_string_is_released() -> None:
    finder = StopStringMatcher(["END"])
    assert [finder.step(piece)[0] for piece in ("a E", "N", "d")] == ["a ", "", "ENd"]
    finder.step("EN")
    assert (finder.flush(), finder.matched) == ("EN", False)


def test_an_included_stop_string_ends_the_text() -> None:
    assert StopStringMatcher(["END"], include=True).step("the ENDING") == ("the END", True)


def test_a_single_stop_string_need_not_be_a_list() -> None:
    assert StopStringMatcher("ab").step("b a ab") == ("b a ", True)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(InputError, match="must not be empty"):
        StopStringMatcher(["a", ""])


@pytest.mark.parametrize(("pending", "ended"), [("", False), ("c", True), ("x", False), ("xabc", True)])
def test_a_preview_of_the_next_text_reports_whether_it_would_stop(pending: str, ended: bool) -> None:
    finder = StopStringMatcher(["abc", "0bcd"])
    assert finder.step("ab") == ("", False)
    assert finder.would_match(pending) == ended
    assert finder.step("c") == ("", True)


def test_an_answer_that_waits_for_a_possible_earlier_stop_has_not_ended() -> None:
    finder = StopStringMatcher(["bc", "abcd"])
    assert finder.step("abc") == ("", False)
    assert (finder.would_match(""), finder.would_match("d"), finder.would_match("x")) == (False, True, True)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def make_byte_fallback() -> Tokenizer:
    backend = Backend(models.BPE({token: n for n, token in enumerate([*BYTES, "x"])}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(HFTokenizerBackend(backend))


@pytest.mark.parametrize(
    ("sampling", "text", "taken", "visible", "reason"),
    [
        ({"stop": ["\n\n"]}, "x\n\n\nx", 3, "x", "stop"),
        ({"stop": ["é"], "include_stop_str_in_output": True}, "\néx", 3, "\né", "stop"),
        ({"stop": ["\n\n"], "min_tokens": 5}, "x\n\n\n\nx", 5, "x", "stop"),
        ({"stop": ["\nx"]}, "\n\nx\n", 3, "\n", "stop"),
        ({}, "\n\nx\n", 4, "\n\nx\n", "length"),
    ],
)
def test_a_stop_spelled_in_byte_tokens_ends_at_its_last_byte(
    sampling: dict[str, Any], text: str, taken: int, visible: str, reason: str
) -> None:
    """Byte tokens are pending until their run ends: the next byte may make the sequence invalid."""
    ids = [256 if byte == ord("x") else byte for byte in text.encode()]
    answer, count = OutputState(make_byte_fallback(), SamplingParams(**sampling), trace=False), 0
    while answer.finish_reason is None:
        answer.append(
            SampledToken(ids[count], False, 0.0, [], [], 0.0, None, [], []), max_new_tokens=len(ids)
        )
        count += 1
    assert (count, answer.text, answer.finish_reason) == (taken, visible, reason)


def test_invalid_bytes_do_not_match_a_stop() -> None:
    answer = OutputState(make_byte_fallback(), SamplingParams(stop=["\ufffd", "\n"]), trace=False)
    pushed = [
        answer.append(SampledToken(i, False, 0.0, [], [], 0.0, None, [], []), 9) for i in (0xC3, 0x0A, 0xFF)
    ]
    assert (pushed, answer.finish_reason) == (["", "", ""], None)
    answer.append(SampledToken(256, False, 0.0, [], [], 0.0, None, [], []), 9)
    assert (answer.text, answer.finish_reason) == ("", "stop")


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_that_is_a_special_token_stops_at_it(
    include: bool, skip_special_tokens: bool, tiny_engine: Engine
) -> None:
    end = "<|endoftext|>"
    (token,) = tiny_engine.tokenizer.token_to_ids(end)
    options: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True, "logit_bias": {token: 1000.0}}
    options |= {"include_stop_str_in_output": include, "skip_special_tokens": skip_special_tokens}
    never, stopped = tiny_engine.generate(
        [
            Request("Why?", Base(), SamplingParams(**options)),
            Request("Why?", Base(), SamplingParams(stop=(end,), **options)),
        ]
    )
    assert (never.finish_reason, len(never.token_ids)) == ("length", 6)
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", [token])
    assert stopped.text == (end if include else "")


def test_an_ordinary_token_of_the_vocabulary_stops_as_text(tiny_engine: Engine) -> None:
    (token,) = tiny_engine.tokenizer.token_to_ids("e")
    assert tiny_engine.tokenizer.added_token_id("e") is None
    state = OutputState(tiny_engine.tokenizer, SamplingParams(stop=("e",)), trace=False)
    assert token not in state.stop_token_ids
