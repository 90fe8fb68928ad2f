"""Minimal protobuf parser for messages that the sentencepiece library has validated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

VARINT, I64, LEN, I32 = 0, 1, 2, 5
"""Wire types. Fixed-width numbers are returned as bytes."""


def parse_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field. If a field occurs twice, the last counts, unless it is repeated.

    Raises ValueError when the message is invalid.
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
            raise ValueError(f"unknown wire type {wire_type}")
        if position + size > len(message):
            raise ValueError("field exceeds the message")
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
    raise ValueError("truncated varint")
