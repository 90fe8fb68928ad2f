"""Seeded damage to bytes, to JSON, and to files whose fields are known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

EXTREMES = [0, 1, 2, 3, 7, 127, 255, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**60]
EXTREMES += [2**63 - 1, 2**63, 2**64 - 1]
TEXTS = ["", " ", "\0", "x" * 5000, "é\u0301", "\U0010ffff", "\ufffd", "<s>", "<|im_end|>", "▁", "<0x00>"]
TEXTS += ["../outside", "/etc/passwd", "..", ".", "a/b", "auto", "nan", "-1", "0x10", "{", "{{ x }}", "%s%n"]
DEPTHS = [1, 40, 130, 900, 960, 985, 995, 20_000, 100_000]


LARGEST = 1 << 20
"""Bytes of a damaged text: what doubles often enough is cut."""


class Raw(str):
    """A piece of JSON, or of what looks like it, as it is to stand."""


class Pairs(list[list[Any]]):
    """A JSON object as keys and values, so that a key may stand there twice."""


def damaged(data: bytes, rng: Random) -> bytes:
    """Bytes flipped, cut, put in, repeated, or overwritten with a large number."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        rng.choice((_flip, _flip, _cut, _insert, _repeat, _number))(found, rng)
    return bytes(found)


def json_damaged(data: bytes, rng: Random) -> bytes:
    """A JSON text with values of another kind or size, keys twice, gone or misnamed, things too deep."""
    tree: list[Any] = [json.loads(data, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))]
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _alter(tree, rng)
    text = written(tree[0]) if tree else ""
    last = rng.random()
    if last < 0.02:
        return text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32-be")), "surrogatepass")
    found = text.encode("utf-8", "surrogatepass")[:LARGEST]
    return damaged(found, rng) if last < 0.06 else found


def written(tree: Any) -> str:
    """The JSON of a tree."""
    if isinstance(tree, Raw):
        return tree
    if isinstance(tree, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{written(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(written, tree)) + "]"
    return json.dumps(tree)


def odd(rng: Random) -> Any:
    """A value that is seldom meant."""
    return rng.choice((_odd_number, _odd_number, _odd_text, _odd_plain, _odd_deep))(rng)


@dataclass(frozen=True)
class Field:
    """A stretch of a file: a number of so many bytes ("<I", "<Q", …), or "" for bytes."""

    form: str
    data: bytes


def fields_damaged(fields: Sequence[Field], rng: Random) -> bytes:
    """A file put together again of its fields, of which some have other values, are gone or there twice."""
    found = list(fields)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(found))
        chance = rng.random()
        if chance < 0.1:
            del found[at]
        elif chance < 0.2:
            found.insert(at, rng.choice(found))
        elif found[at].form:
            size = len(found[at].data)
            near = int.from_bytes(found[at].data, "little") + rng.choice((-1, 1, 8, -8))
            value = rng.choice((near, rng.choice(EXTREMES), rng.randrange(14)))
            found[at] = Field(found[at].form, (value % 256**size).to_bytes(size, "little"))
        else:
            found[at] = Field("", damaged(found[at].data, rng))
    return b"".join(field.data for field in found)


def _flip(data: bytearray, rng: Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _cut(data: bytearray, rng: Random) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : rng.choice((len(data), start + rng.randrange(1, 40)))]


def _insert(data: bytearray, rng: Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(
        (rng.randbytes(rng.randrange(1, 9)), b'"', b"}", b"[" * 2000, b"\0" * 64, b"\xff")
    )


def _repeat(data: bytearray, rng: Random) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = data[start : start + rng.randrange(1, 200)]


def _number(data: bytearray, rng: Random) -> None:
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 8))
    data[at : at + size] = (rng.choice(EXTREMES) % 256**size).to_bytes(size, "little")


def _alter(tree: list[Any], rng: Random) -> None:
    """One change at a place that a walk from the root comes to."""
    if not tree:
        return
    slots, at = _walk(tree, rng)
    rng.choice((_replace, _replace, _tweak, _tweak, _delete, _double, _rename, _nest, _swapped(tree)))(
        slots, at, rng
    )


def _walk(tree: list[Any], rng: Random) -> tuple[list[Any], int]:
    """A container and an index; of an object's pair the container is the pair, and the index 1."""
    slots, at = tree, 0
    while True:
        inner = slots[at]
        if not isinstance(inner, list) or not inner or rng.random() < 0.15:
            return slots, at
        chosen = rng.randrange(len(inner))
        if isinstance(inner, Pairs):
            if rng.random() < 0.15:
                return inner, chosen
            slots, at = inner[chosen], 1
        else:
            slots, at = inner, chosen


def _replace(slots: list[Any], at: int, rng: Random) -> None:
    _set(slots, at, odd(rng))


def _set(slots: list[Any], at: int, value: Any) -> None:
    if isinstance(slots, Pairs):
        slots[at] = [slots[at][0], value]
    else:
        slots[at] = value


def _tweak(slots: list[Any], at: int, rng: Random) -> None:
    """Nearly the same value."""
    value = slots[at][1] if isinstance(slots, Pairs) else slots[at]
    if isinstance(value, bool):
        _set(slots, at, not value)
    elif isinstance(value, int | float):
        near = (value + 1, value - 1, -value, value * 2, value / 3, value * 1e30, float(value), str(value))
        _set(slots, at, rng.choice(near))
    elif isinstance(value, str) and not isinstance(value, Raw):
        cut = rng.randrange(len(value) + 1)
        longer = value[:cut] + rng.choice(TEXTS) + value[cut:]
        _set(slots, at, rng.choice((value[:cut], longer, value.upper(), value * 40, [value], "")))
    elif isinstance(value, list) and value:
        rng.choice((value.reverse, value.clear, lambda: value.extend(value[:1] * rng.choice((1, 9, 3000)))))()


def _delete(slots: list[Any], at: int, rng: Random) -> None:
    if slots and isinstance(slots, Pairs):
        del slots[at]
    else:
        _set(slots, at, None)


def _double(slots: list[Any], at: int, rng: Random) -> None:
    if isinstance(slots, Pairs):
        slots.insert(rng.randrange(len(slots) + 1), [slots[at][0], rng.choice((slots[at][1], odd(rng)))])
    else:
        _set(slots, at, [slots[at]] * rng.choice((2, 50)))


def _rename(slots: list[Any], at: int, rng: Random) -> None:
    if isinstance(slots, Pairs):
        slots[at] = [rng.choice((rng.choice(TEXTS), slots[at][0] + "x", rng.choice(slots)[0])), slots[at][1]]


def _nest(slots: list[Any], at: int, rng: Random) -> None:
    value = slots[at][1] if isinstance(slots, Pairs) else slots[at]
    _set(slots, at, rng.choice(([value], Pairs([["x", value]]), [[[value]]])))


def _swapped(tree: list[Any]) -> Callable[[list[Any], int, Random], None]:
    def swap(slots: list[Any], at: int, rng: Random) -> None:
        """The value is also put elsewhere, as it stands now."""
        value = Raw(written(slots[at][1] if isinstance(slots, Pairs) else slots[at]))
        other, there = _walk(tree, rng)
        _set(other, there, value)

    return swap


def _odd_number(rng: Random) -> Any:
    whole = rng.choice(EXTREMES) * rng.choice((1, 1, -1))
    special = ("1e400", "-1e400", "NaN", "Infinity", "-Infinity", "-0.0", "1e-400", "5e-324", "9" * 5000)
    return rng.choice((whole, whole, float(whole), 0.1, 1.5, -0.5, Raw(rng.choice(special))))


def _odd_text(rng: Random) -> Any:
    halves = ('"\\ud800"', '"\\udfff x"', '"\\u0000"', '"a\\ud83d"')
    return rng.choice((rng.choice(TEXTS), Raw(rng.choice(halves))))


def _odd_plain(rng: Random) -> Any:
    return rng.choice(
        (None, True, False, [], Pairs(), [None], Pairs([["", None]]), [[]], Raw(""), Raw("nul"))
    )


def _odd_deep(rng: Random) -> Any:
    depth = rng.choice(DEPTHS)
    opened, closed = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"type":', "}]")))
    return Raw(opened * depth + "1" + closed * depth)
