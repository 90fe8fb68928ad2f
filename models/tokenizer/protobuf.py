"""Just enough of protobuf's encoding to look into a message that its library has checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

VARINT, I64, LEN, I32 = 0, 1, 2, 5
"""Kinds of a field. Numbers of a fixed width come as their bytes."""


def parse_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field; of one that is there twice the last counts, or both when it repeats.

    Raises ValueError for what is no message.
    """
    position = 0
    while position < len(message):
        key, position = _read_varint(message, position)
        wire_type, size = key & 7, 0
        if wire_type == VARINT:
            value, position = _read_varint(message, position)
            yield key >> 3, value
            continue
        if wire_type == LEN:
            size, position = _read_varint(message, position)
        elif wire_type in (I64, I32):
            size = 8 if wire_type == I64 else 4
        else:
            raise ValueError(f"a field of kind {wire_type}")
        if position + size > len(message):
            raise ValueError("a field beyond the end")
        yield key >> 3, message[position : position + size]
        position += size


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message):
        byte = message[position]
        value |= (byte & 0x7F) << shift
        shift, position = shift + 7, position + 1
        if byte < 0x80:
            return value, position
    raise ValueError("a number without end")
