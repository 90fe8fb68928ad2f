"""Request: accepted values, defaults, copies, and refused values."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from trimtab.engine import Base, Engine, Mato, Mixture, Objective, Prompt, Request, SamplingParams
from trimtab.kernels.common.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

TWO_OBJECTIVES = Mato([Objective("Be kind."), Objective("Be short.", 2)])
EMPTY_PART, BLANK_PART = {"type": "text", "text": ""}, {"type": "text", "text": " \n"}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "a request needs either a prompt or branch_token_ids, and not both"),
    ({"prompt": "Hi", "branch_token_ids": [[1]]}, "and not both"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": " \n\t"}, "the prompt is empty"),
    ({"prompt": []}, "the prompt is empty"),
    ({"prompt": [{"role": "user", "content": ""}]}, "the prompt is empty"),
    ({"prompt": [{"role": "user"}]}, "the prompt is empty"),
    ({"prompt": [{"role": "user", "content": []}]}, "the prompt is empty"),
    ({"prompt": [{"role": "user", "content": [EMPTY_PART, BLANK_PART]}]}, "the prompt is empty"),
    ({"prompt": ["hi"]}, "item 0 of prompt is 'hi'; it must be a dictionary"),
    (
        {"prompt": "Hi", "chat_template_kwargs": {1: 2}},
        "a key of chat_template_kwargs is 1; it must be a string",
    ),
    ({"prompt": "Hi", "steering": Mato}, "it must be a method such as Trim("),
    ({"prompt": "Hi", "sampling": {"n": 2}}, "sampling is {'n': 2}; it must be of type SamplingParams"),
    ({"branch_token_ids": []}, "branch_token_ids has 0 branches; base here needs 1"),
    ({"branch_token_ids": [[1], [2]]}, "branch_token_ids has 2 branches; base here needs 1"),
    ({"branch_token_ids": [[1], [2]], "steering": TWO_OBJECTIVES}, "has 2 branches; mato here needs 3"),
    ({"branch_token_ids": [[1], [], [2]], "steering": TWO_OBJECTIVES}, "branch_token_ids[1] is empty"),
    ({"branch_token_ids": [1]}, "item 0 of branch_token_ids is 1; it must be a list of integers"),
    ({"branch_token_ids": ["12"]}, "item 0 of branch_token_ids is '12'; it must be a list of integers"),
    (
        {"branch_token_ids": [[1, "2"]]},
        "item 1 of item 0 of branch_token_ids is '2'; it must be an integer",
    ),
    (
        {"branch_token_ids": [[1, 2.0]]},
        "item 1 of item 0 of branch_token_ids is 2.0; it must be an integer",
    ),
    (
        {"branch_token_ids": [[True]]},
        "item 0 of item 0 of branch_token_ids is True; it must be an integer",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_an_invalid_request_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Request(**fields)


def test_a_string_is_one_user_turn() -> None:
    assert Request("Why?").messages == [{"role": "user", "content": "Why?"}]


def test_a_message_with_a_non_text_part_is_not_empty() -> None:
    content = [EMPTY_PART, {"type": "image_url", "image_url": {"url": "x"}}]
    assert Request([{"role": "user", "content": content}]).messages[0]["content"] == content


def test_ids_may_be_numpy_arrays_and_are_copied() -> None:
    ids = np.array([[1, 2]])
    request = Request(branch_token_ids=ids)
    ids[0, 0] = 9
    assert request.branch_token_ids == [[1, 2]]
    assert [type(token) for token in request.branch_token_ids[0]] == [int, int]


@pytest.mark.parametrize("where", ["prompt", "content", "kwargs"])
def test_a_self_referencing_value_is_refused_alone(tiny: Engine, where: str) -> None:
    endless: list[Any] = []
    endless.append(endless)
    turn = {"role": "user", "content": endless if where == "content" else "Why?"}
    value = [{**turn, "more": endless}] if where == "prompt" else [turn]
    kwargs = {"more": endless} if where == "kwargs" else {}
    sampling = SamplingParams(max_tokens=1)
    request = Request(value, sampling=sampling, chat_template_kwargs=kwargs)
    wrong, right = tiny.generate([request, Request("Why?", sampling=sampling)])
    assert (wrong.finish_reason, right.error) == ("error", None)


def test_a_template_may_have_a_variable_of_any_name(tiny: Engine) -> None:
    sampling = SamplingParams(max_tokens=1)
    extra = dict.fromkeys(("self", "extra", "spell", "kwargs", "template", "context", ""), 1)
    output = tiny.generate(Request("Why?", sampling=sampling, chat_template_kwargs=extra))
    assert output.token_ids == tiny.generate(Request("Why?", sampling=sampling)).token_ids


def test_changing_a_requests_messages_does_not_change_the_callers() -> None:
    message = {"role": "user", "content": "Why?"}
    request = Request([message])
    request.messages[0]["content"] = "How?"
    assert message["content"] == "Why?"
    assert request.messages == [message]


def test_a_request_is_plain_traced_greedy_decoding_by_default() -> None:
    request = Request("Why?")
    assert request.steering == Base()
    assert request.sampling == SamplingParams()
    assert request.trace


def test_a_joined_method_needs_two_branches_however_many_objectives_it_has() -> None:
    both = (Objective("a"), Objective("b"))
    assert Request(branch_token_ids=[[1], [2]], steering=Prompt(both)).branch_token_ids == [[1], [2]]
    with pytest.raises(InputError, match="mixture here needs 3"):
        Request(branch_token_ids=[[1], [2]], steering=Mixture(both))


def test_a_template_that_renders_nothing_is_refused(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="8MiB", chat_template="{{ '' }}")
    with pytest.raises(InputError, match="'base' has no tokens"):
        engine.generate(Request("hi"))
