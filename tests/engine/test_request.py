from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
from trimtab.engine import Base, Engine, Mato, Mixture, Objective, Prompt, Request, SamplingParams
from trimtab.kernels.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

TWO = Mato([Objective("Be kind."), Objective("Be short.", 2)])

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "a request needs either a prompt or branch_token_ids, and not both"),
    ({"prompt": "Hi", "branch_token_ids": [[1]]}, "and not both"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": " \n\t"}, "the prompt is empty"),
    ({"prompt": []}, "the prompt is empty"),
    ({"prompt": [{"role": "user", "content": ""}]}, "the prompt is empty"),
    ({"branch_token_ids": []}, "branch_token_ids has 0 branches; base here needs 1"),
    ({"branch_token_ids": [[1], [2]]}, "branch_token_ids has 2 branches; base here needs 1"),
    ({"branch_token_ids": [[1], [2]], "steering": TWO}, "has 2 branches; mato here needs 3"),
    ({"branch_token_ids": [[1], [], [2]], "steering": TWO}, "branch_token_ids[1] is empty"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_a_request_that_asks_nothing_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        Request(**fields)


def test_a_string_is_one_user_turn() -> None:
    assert Request("Why?").messages == [{"role": "user", "content": "Why?"}]


def test_messages_are_copied_so_that_the_request_cannot_change_the_callers() -> None:
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
