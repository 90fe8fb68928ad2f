"""Seeded mutators for bytes, JSON and binary fields."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

EXTREME_NUMBERS = [0, 1, 2, 3, 7, 127, 255, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**60]
EXTREME_NUMBERS += [2**63 - 1, 2**63, 2**64 - 1]
ODD_TEXTS = ["", " ", "\0", "x" * 5000, "é\u0301", "\U0010ffff", "\ufffd", "<s>", "<|im_end|>", "▁", "<0x00>"]
ODD_TEXTS += [
    "../outside",
    "/etc/passwd",
    "..",
    ".",
    "a/b",
    "auto",
    "nan",
    "-1",
    "0x10",
    "{",
    "{{ x }}",
    "%s%n",
]
DEPTHS = [1, 40, 130, 900, 960, 985, 995, 20_000, 100_000]


MAX_BYTES = 1 << 20
"""Maximum bytes of a damaged text; repeated doubling would exceed it."""


class RawJSON(str):
    """Text to write verbatim into a JSON document, valid JSON or not."""


class JSONPairs(list[list[Any]]):
    """A JSON object as [key, value] pairs, which allows duplicate keys."""


def damage_bytes(data: bytes, rng: Random) -> bytes:
    """Flip, delete, insert or repeat bytes, or overwrite some with a large number."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        rng.choice((_flip, _flip, _cut, _insert, _repeat, _overwrite_number))(result, rng)
    return bytes(result)


def damage_json(data: bytes, rng: Random) -> bytes:
    """Change types or sizes of values; duplicate, delete or rename keys; nest too deeply."""
    tree: list[Any] = [json.loads(data, object_pairs_hook=lambda pairs: JSONPairs(map(list, pairs)))]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _mutate_tree(tree, rng)
    text = to_json(tree[0]) if tree else ""
    chance = rng.random()
    if chance < 0.02:
        return text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32-be")), "surrogatepass")
    encoded = text.encode("utf-8", "surrogatepass")[:MAX_BYTES]
    return damage_bytes(encoded, rng) if chance < 0.06 else encoded


def to_json(tree: Any) -> str:
    """Serialise a tree to JSON."""
    if isinstance(tree, RawJSON):
        return tree
    if isinstance(tree, JSONPairs):
        return "{" + ",".join(f"{json.dumps(key)}:{to_json(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(to_json, tree)) + "]"
    return json.dumps(tree)


def odd_value(rng: Random) -> Any:
    """A random edge-case value."""
    return rng.choice((_odd_number, _odd_number, _odd_text, _odd_container, _deep_nesting))(rng)


@dataclass(frozen=True)
class BinaryField:
    """A part of a file. `format`: a struct format for a number ("<I", "<Q", …), "" for bytes."""

    format: str
    data: bytes


def damage_fields(fields: Sequence[BinaryField], rng: Random) -> bytes:
    """Change, delete or duplicate some of the fields and join them to a file."""
    changed = list(fields)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        index = rng.randrange(len(changed))
        chance = rng.random()
        if chance < 0.1:
            del changed[index]
        elif chance < 0.2:
            changed.insert(index, rng.choice(changed))
        elif changed[index].format:
            size = len(changed[index].data)
            near = int.from_bytes(changed[index].data, "little") + rng.choice((-1, 1, 8, -8))
            value = rng.choice((near, rng.choice(EXTREME_NUMBERS), rng.randrange(14)))
            changed[index] = BinaryField(changed[index].format, (value % 256**size).to_bytes(size, "little"))
        else:
            changed[index] = BinaryField("", damage_bytes(changed[index].data, rng))
    return b"".join(field.data for field in changed)


def _flip(data: bytearray, rng: Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _cut(data: bytearray, rng: Random) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : rng.choice((len(data), start + rng.randrange(1, 40)))]


def _insert(data: bytearray, rng: Random) -> None:
    offset = rng.randrange(len(data) + 1)
    data[offset:offset] = rng.choice(
        (rng.randbytes(rng.randrange(1, 9)), b'"', b"}", b"[" * 2000, b"\0" * 64, b"\xff")
    )


def _repeat(data: bytearray, rng: Random) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = data[start : start + rng.randrange(1, 200)]


def _overwrite_number(data: bytearray, rng: Random) -> None:
    offset, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8))
    data[offset : offset + size] = (rng.choice(EXTREME_NUMBERS) % 256**size).to_bytes(size, "little")


def _mutate_tree(tree: list[Any], rng: Random) -> None:
    """Make one change at a random node."""
    if not tree:
        return
    slots, index = _pick_slot(tree, rng)
    rng.choice(
        (_replace, _replace, _tweak, _tweak, _delete, _duplicate, _rename, _nest, _copy_elsewhere(tree))
    )(slots, index, rng)


def _pick_slot(tree: list[Any], rng: Random) -> tuple[list[Any], int]:
    """A container and an index, by a random walk from the root. Inside an object: a pair and index 1."""
    slots, index = tree, 0
    while True:
        child = slots[index]
        if not isinstance(child, list) or not child or rng.random() < 0.15:
            return slots, index
        child_index = rng.randrange(len(child))
        if isinstance(child, JSONPairs):
            if rng.random() < 0.15:
                return child, child_index
            slots, index = child[child_index], 1
        else:
            slots, index = child, child_index


def _replace(slots: list[Any], index: int, rng: Random) -> None:
    _set_value(slots, index, odd_value(rng))


def _set_value(slots: list[Any], index: int, value: Any) -> None:
    if isinstance(slots, JSONPairs):
        slots[index] = [slots[index][0], value]
    else:
        slots[index] = value


def _tweak(slots: list[Any], index: int, rng: Random) -> None:
    """Replace the value by a similar one."""
    value = slots[index][1] if isinstance(slots, JSONPairs) else slots[index]
    if isinstance(value, bool):
        _set_value(slots, index, not value)
    elif isinstance(value, int | float):
        candidates = (
            value + 1,
            value - 1,
            -value,
            value * 2,
            value / 3,
            value * 1e30,
            float(value),
            str(value),
        )
        _set_value(slots, index, rng.choice(candidates))
    elif isinstance(value, str) and not isinstance(value, RawJSON):
        cut = rng.randrange(len(value) + 1)
        longer = value[:cut] + rng.choice(ODD_TEXTS) + value[cut:]
        _set_value(slots, index, rng.choice((value[:cut], longer, value.upper(), value * 40, [value], "")))
    elif isinstance(value, list) and value:
        rng.choice((value.reverse, value.clear, lambda: value.extend(value[:1] * rng.choice((1, 9, 3000)))))()


def _delete(slots: list[Any], index: int, rng: Random) -> None:
    if slots and isinstance(slots, JSONPairs):
        del slots[index]
    else:
        _set_value(slots, index, None)


def _duplicate(slots: list[Any], index: int, rng: Random) -> None:
    if isinstance(slots, JSONPairs):
        slots.insert(
            rng.randrange(len(slots) + 1), [slots[index][0], rng.choice((slots[index][1], odd_value(rng)))]
        )
    else:
        _set_value(slots, index, [slots[index]] * rng.choice((2, 50)))


def _rename(slots: list[Any], index: int, rng: Random) -> None:
    if isinstance(slots, JSONPairs):
        slots[index] = [
            rng.choice((rng.choice(ODD_TEXTS), slots[index][0] + "x", rng.choice(slots)[0])),
            slots[index][1],
        ]


def _nest(slots: list[Any], index: int, rng: Random) -> None:
    value = slots[index][1] if isinstance(slots, JSONPairs) else slots[index]
    _set_value(slots, index, rng.choice(([value], JSONPairs([["x", value]]), [[[value]]])))


def _copy_elsewhere(tree: list[Any]) -> Callable[[list[Any], int, Random], None]:
    def copy(slots: list[Any], index: int, rng: Random) -> None:
        """Also write the value, as it is now, to another node."""
        value = RawJSON(to_json(slots[index][1] if isinstance(slots, JSONPairs) else slots[index]))
        target_slots, target_index = _pick_slot(tree, rng)
        _set_value(target_slots, target_index, value)

    return copy


def _odd_number(rng: Random) -> Any:
    integer = rng.choice(EXTREME_NUMBERS) * rng.choice((1, 1, -1))
    special = ("1e400", "-1e400", "NaN", "Infinity", "-Infinity", "-0.0", "1e-400", "5e-324", "9" * 5000)
    return rng.choice((integer, integer, float(integer), 0.1, 1.5, -0.5, RawJSON(rng.choice(special))))


def _odd_text(rng: Random) -> Any:
    lone_surrogates = ('"\\ud800"', '"\\udfff x"', '"\\u0000"', '"a\\ud83d"')
    return rng.choice((rng.choice(ODD_TEXTS), RawJSON(rng.choice(lone_surrogates))))


def _odd_container(rng: Random) -> Any:
    return rng.choice(
        (
            None,
            True,
            False,
            [],
            JSONPairs(),
            [None],
            JSONPairs([["", None]]),
            [[]],
            RawJSON(""),
            RawJSON("nul"),
        )
    )


def _deep_nesting(rng: Random) -> Any:
    depth = rng.choice(DEPTHS)
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"type":', "}]")))
    return RawJSON(opening * depth + "1" + closing * depth)
