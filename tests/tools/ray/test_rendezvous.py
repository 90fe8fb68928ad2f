"""Where calls go: by how their prompts begin, and by what the replicas have to do."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from trimtab import Engine, Mato, Objective, Request, SamplingParams
from trimtab.tools.ray.http_call import Call, key_of
from trimtab.tools.ray.rendezvous import ranked

KIND, BRIEF = {"text": "Be kind.", "weight": 0.7}, "Be brief."


def key(content: str = "Why?", system: str | None = None, **values: Any) -> bytes:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content})
    return key_of(json.dumps({"messages": messages, **values}).encode())


def steered(*objectives: Any, **more: Any) -> dict[str, Any]:
    return {"steering": {"objectives": list(objectives), **more}}


def test_a_key_is_of_the_system_text_and_the_wishes() -> None:
    assert key("Why?", **steered(KIND)) == key("How?", **steered("Be kind."), temperature=1)
    assert key("Why?", "Be a pirate.") == key("How?", "Be a pirate.")
    assert key(steering="profile") == key("How?", steering="profile")
    distinct = [key(**steered(KIND)), key(**steered(BRIEF)), key(**steered(KIND, BRIEF)), key(steering="p")]
    distinct += [key("Why?"), key("How?"), key("Why?", "s"), key("Why?", "s", **steered(KIND))]
    assert len(set(distinct)) == len(distinct)


def test_without_wishes_a_conversation_keeps_its_key() -> None:
    first = {"role": "user", "content": "Why?"}
    later = [first, {"role": "assistant", "content": "So."}, {"role": "user", "content": "How?"}]
    assert key_of(json.dumps({"messages": later}).encode()) == key("Why?")


def test_what_is_no_body_has_a_key_or_none_and_never_an_error() -> None:
    for body in (b"", b"{", b"[1]", b"\xff", b"5"):
        assert key_of(body) == b""
    for values in (
        {},
        {"messages": 5},
        {"messages": [5]},
        {"prompt": [1, 2]},
        {"steering": {"objectives": 1}},
    ):
        assert len(key_of(json.dumps(values).encode())) == 16
    assert len(key_of(b'{"prompt": "\\ud800"}')) == 16


def test_a_call_is_plain_data() -> None:
    scope = {"type": "http", "method": "POST", "path": "/x", "headers": [], "app": object()}
    assert Call.of(scope, b"{}").scope == {"type": "http", "method": "POST", "path": "/x", "headers": []}


def test_keys_are_spread_and_move_only_with_their_replica() -> None:
    keys = [str(index).encode() for index in range(600)]
    loads = dict.fromkeys("abc", 0)
    before = {each: ranked(each, loads, 0)[0] for each in keys}
    assert min(Counter(before.values()).values()) > 150
    after = {each: ranked(each, dict.fromkeys("ab", 0), 0)[0] for each in keys}
    assert all(after[each] == before[each] for each in keys if before[each] != "c")


def test_who_has_too_much_to_do_comes_last() -> None:
    first, second, third = ranked(b"key", dict.fromkeys("abc", 0), 2)
    assert ranked(b"key", {first: 2, second: 0, third: 0}, 2)[0] == first
    assert ranked(b"key", {first: 3, second: 1, third: 0}, 2) == [second, third, first]


def test_prompts_that_begin_alike_are_computed_once_where_the_idler_of_two_computes_them_everywhere(
    tiny_folder: Path,
) -> None:
    """Real engines and their counts of tokens; no network, and three calls are under way at once."""
    wishes = [f"{word}. " + "Your answer should be kind and true. " * 4 for word in "abcdef"]
    rng = random.Random(0)
    traffic = [(rng.choice(wishes), f"What is {index}?") for index in range(36)]

    def computed(by_prefix: bool) -> int:
        options = {"kv_cache_memory": "2MiB", "block_size": 16}
        engines = {name: Engine.from_pretrained(str(tiny_folder), **options) for name in "abc"}
        loads = dict.fromkeys(engines, 0)
        under_way: list[str] = []
        draw = random.Random(1)
        for wish, question in traffic:
            idler = sorted(draw.sample(sorted(engines), 2), key=loads.__getitem__)
            chosen = (ranked(key(**steered(wish)), loads, 2) if by_prefix else idler)[0]
            under_way.append(chosen)
            loads[chosen] += 1
            steering = Mato([Objective(wish)])
            engines[chosen].generate(Request(question, steering, SamplingParams(max_tokens=2)))
            if len(under_way) > 2:
                loads[under_way.pop(0)] -= 1
        stats = [engine.stats for engine in engines.values()]
        return sum(each.prompt_tokens - each.cached for each in stats)

    assert computed(by_prefix=True) < 0.8 * computed(by_prefix=False)
