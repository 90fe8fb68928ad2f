"""Stop texts in an answer that comes in pieces: each is found as soon as it is whole, wherever it is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from trimtab.engine.outputs import Pick
from trimtab.engine.sampling_params import SamplingParams
from trimtab.engine.sequence.output_processor import Answer
from trimtab.engine.sequence.stop_strings import StopStrings
from trimtab.kernels.common.errors import InputError
from trimtab.models.tokenizer.huggingface import JsonVocabulary
from trimtab.models.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence


def expected_stop(text: str, stops: Sequence[str], include: bool) -> tuple[str, bool]:
    """The contract on the whole text: the earliest start, then the shortest."""
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
def test_a_text_is_cut_at_its_earliest_stop_wherever_the_pieces_are_cut(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    finder = StopStrings(stops, include)
    shown, hits = "", []
    for piece in pieces:
        text, hit = finder.push(piece)
        shown += text
        hits.append(hit)
    shown += finder.finish()
    assert (shown, finder.hit) == expected_stop("".join(pieces), stops, include)
    assert hits == sorted(hits)


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_only_what_may_become_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    shown, hit = StopStrings(stops).push(text)
    if not hit:
        held = text[len(shown) :]
        longest = max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        assert held == text[len(text) - longest :]


def test_a_stop_across_pieces_is_found_as_soon_as_it_is_complete() -> None:
    finder = StopStrings(["\n\nUser:"])
    assert finder.push("Yes.\n") == ("Yes.", False)
    assert finder.push("\nUs") == ("", False)
    assert finder.push("er: more") == ("", True)
    assert finder.push("and more") == ("", True)
    assert finder.finish() == ""


@pytest.mark.parametrize(("last", "shown"), [("d", ""), ("x", "a"), ("", "a")])
def test_a_match_waits_for_one_that_starts_before_it(last: str, shown: str) -> None:
    finder = StopStrings(["bc", "abcd"])
    assert finder.push("abc") == ("", False)
    assert finder.push(last)[0] + finder.finish() == shown
    assert finder.hit


def test_a_stop_that_does_not_come_is_released() -> None:
    finder = StopStrings(["END"])
    assert [finder.push(piece)[0] for piece in ("a E", "N", "d")] == ["a ", "", "ENd"]
    finder.push("EN")
    assert (finder.finish(), finder.hit) == ("EN", False)


def test_an_included_stop_is_shown_and_what_follows_is_not() -> None:
    assert StopStrings(["END"], include=True).push("the ENDING") == ("the END", True)


def test_one_stop_may_be_given_as_a_text() -> None:
    assert StopStrings("ab").push("b a ab") == ("b a ", True)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(InputError, match="must not be empty"):
        StopStrings(["a", ""])


@pytest.mark.parametrize(("held", "ended"), [("", False), ("c", True), ("x", False), ("xabc", True)])
def test_it_can_be_told_what_a_text_to_come_would_end(held: str, ended: bool) -> None:
    finder = StopStrings(["abc", "0bcd"])
    assert finder.push("ab") == ("", False)
    assert finder.ended_by(held) == ended
    assert finder.push("c") == ("", True)


def test_what_waits_for_an_earlier_stop_has_not_ended() -> None:
    finder = StopStrings(["bc", "abcd"])
    assert finder.push("abc") == ("", False)
    assert (finder.ended_by(""), finder.ended_by("d"), finder.ended_by("x")) == (False, True, True)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_fallback() -> Tokenizer:
    backend = Backend(models.BPE({token: n for n, token in enumerate([*BYTES, "x"])}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return Tokenizer(JsonVocabulary(backend))


@pytest.mark.parametrize(
    ("sampling", "text", "taken", "shown", "reason"),
    [
        ({"stop": ["\n\n"]}, "x\n\n\nx", 3, "x", "stop"),
        ({"stop": ["é"], "include_stop_str_in_output": True}, "\néx", 3, "\né", "stop"),
        ({"stop": ["\n\n"], "min_tokens": 5}, "x\n\n\n\nx", 5, "x", "stop"),
        ({"stop": ["\nx"]}, "\n\nx\n", 3, "\n", "stop"),
        ({}, "\n\nx\n", 4, "\n\nx\n", "length"),
    ],
)
def test_a_stop_spelled_in_bytes_needs_no_token_more(
    sampling: dict[str, Any], text: str, taken: int, shown: str, reason: str
) -> None:
    """Such bytes are held until their run ends, for the next may make no character of them."""
    ids = [256 if byte == ord("x") else byte for byte in text.encode()]
    answer, count = Answer(byte_fallback(), SamplingParams(**sampling), trace=False), 0
    while answer.finish_reason is None:
        answer.append(Pick(ids[count], False, 0.0, [], [], 0.0, None, [], []), limit=len(ids))
        count += 1
    assert (count, answer.text, answer.finish_reason) == (taken, shown, reason)


def test_broken_bytes_are_no_stop() -> None:
    answer = Answer(byte_fallback(), SamplingParams(stop=["\ufffd", "\n"]), trace=False)
    pushed = [answer.append(Pick(i, False, 0.0, [], [], 0.0, None, [], []), 9) for i in (0xC3, 0x0A, 0xFF)]
    assert (pushed, answer.finish_reason) == (["", "", ""], None)
    answer.append(Pick(256, False, 0.0, [], [], 0.0, None, [], []), 9)
    assert (answer.text, answer.finish_reason) == ("", "stop")
