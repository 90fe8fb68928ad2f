"""Routing of calls by prompt prefix and replica load."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from trimtab import Engine, Mato, Objective, Request, SamplingParams
from trimtab.tools.ray.http_call import HTTPCall, prefix_key
from trimtab.tools.ray.rendezvous import rank_replicas

KIND, BRIEF = {"text": "Be kind.", "weight": 0.7}, "Be brief."


def routing_key(content: str = "Why?", system: str | None = None, **values: Any) -> bytes:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": content})
    return prefix_key(json.dumps({"messages": messages, **values}).encode())


def steering_body(*objectives: Any, **more: Any) -> dict[str, Any]:
    return {"steering": {"objectives": list(objectives), **more}}


def test_the_routing_key_depends_on_system_text_and_objectives() -> None:
    assert routing_key("Why?", **steering_body(KIND)) == routing_key(
        "How?", **steering_body("Be kind."), temperature=1
    )
    assert routing_key("Why?", "Be a pirate.") == routing_key("How?", "Be a pirate.")
    assert routing_key(steering="profile") == routing_key("How?", steering="profile")
    distinct = [
        routing_key(**steering_body(KIND)),
        routing_key(**steering_body(BRIEF)),
        routing_key(**steering_body(KIND, BRIEF)),
        routing_key(steering="p"),
    ]
    distinct += [
        routing_key("Why?"),
        routing_key("How?"),
        routing_key("Why?", "s"),
        routing_key("Why?", "s", **steering_body(KIND)),
    ]
    assert len(set(distinct)) == len(distinct)


def test_without_objectives_a_conversation_keeps_its_routing_key() -> None:
    first = {"role": "user", "content": "Why?"}
    later = [first, {"role": "assistant", "content": "So."}, {"role": "user", "content": "How?"}]
    assert prefix_key(json.dumps({"messages": later}).encode()) == routing_key("Why?")


def test_the_routing_key_of_an_invalid_body_does_not_raise() -> None:
    for body in (b"", b"{", b"[1]", b"\xff", b"5"):
        assert prefix_key(body) == b""
    for values in (
        {},
        {"messages": 5},
        {"messages": [5]},
        {"prompt": [1, 2]},
        {"steering": {"objectives": 1}},
    ):
        assert len(prefix_key(json.dumps(values).encode())) == 16
    assert len(prefix_key(b'{"prompt": "\\ud800"}')) == 16


def test_a_call_is_plain_data() -> None:
    scope = {"type": "http", "method": "POST", "path": "/x", "headers": [], "app": object()}
    assert HTTPCall.from_scope(scope, b"{}").scope == {
        "type": "http",
        "method": "POST",
        "path": "/x",
        "headers": [],
    }


def test_keys_are_spread_evenly_and_move_only_with_their_replica() -> None:
    keys = [str(index).encode() for index in range(600)]
    loads = dict.fromkeys("abc", 0)
    before = {each: rank_replicas(each, loads, 0)[0] for each in keys}
    assert min(Counter(before.values()).values()) > 150
    after = {each: rank_replicas(each, dict.fromkeys("ab", 0), 0)[0] for each in keys}
    assert all(after[each] == before[each] for each in keys if before[each] != "c")


def test_an_overloaded_replica_is_tried_last() -> None:
    first, second, third = rank_replicas(b"key", dict.fromkeys("abc", 0), 2)
    assert rank_replicas(b"key", {first: 2, second: 0, third: 0}, 2)[0] == first
    assert rank_replicas(b"key", {first: 3, second: 1, third: 0}, 2) == [second, third, first]


def test_prefix_routing_computes_fewer_prompt_tokens_than_power_of_two_choices(
    tiny_folder: Path,
) -> None:
    """Real engines and their token counts; no network, up to three concurrent calls."""
    objectives = [f"{word}. " + "Your answer should be kind and true. " * 4 for word in "abcdef"]
    rng = random.Random(0)
    traffic = [(rng.choice(objectives), f"What is {index}?") for index in range(36)]

    def num_computed(by_prefix: bool) -> int:
        options = {"kv_cache_memory": "2MiB", "block_size": 16}
        engines = {name: Engine.from_pretrained(str(tiny_folder), **options) for name in "abc"}
        loads = dict.fromkeys(engines, 0)
        in_flight: list[str] = []
        draw = random.Random(1)
        for objective, question in traffic:
            less_loaded = sorted(draw.sample(sorted(engines), 2), key=loads.__getitem__)
            chosen = (
                rank_replicas(routing_key(**steering_body(objective)), loads, 2) if by_prefix else less_loaded
            )[0]
            in_flight.append(chosen)
            loads[chosen] += 1
            steering = Mato([Objective(objective)])
            engines[chosen].generate(Request(question, steering, SamplingParams(max_tokens=2)))
            if len(in_flight) > 2:
                loads[in_flight.pop(0)] -= 1
        stats = [engine.stats for engine in engines.values()]
        return sum(each.prompt_tokens - each.cached for each in stats)

    assert num_computed(by_prefix=True) < 0.8 * num_computed(by_prefix=False)
