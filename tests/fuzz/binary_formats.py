"""GGUF, safetensors and protobuf as their fields, so that damage leaves what is around it readable."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from trimtab.models.gguf.reader import ARRAY, BOOL, NUMBERS, STRING

from .mutators import Field, damaged, fields_damaged, json_damaged

if TYPE_CHECKING:
    from random import Random

LENGTH, BYTES = 2, 2
"""Kind of a protobuf field that holds bytes."""


def gguf_damaged(data: bytes, rng: Random) -> bytes:
    """Metadata, tensors and offsets with other values; now and then any byte."""
    return damaged(data, rng) if rng.random() < 0.15 else fields_damaged(gguf_fields(data), rng)


def gguf_fields(data: bytes) -> list[Field]:
    """The fields of a GGUF file; its tensors' data are one."""
    reader = _Reader(data, 4)
    reader.number("<I")
    tensors, keys = reader.number("<Q"), reader.number("<Q")
    for _ in range(keys):
        reader.string()
        _value(reader, reader.number("<I"))
    for _ in range(tensors):
        reader.string()
        for _ in range(reader.number("<I")):
            reader.number("<Q")
        reader.number("<I")
        reader.number("<Q")
    return [Field("", data[:4]), *reader.fields, Field("", data[reader.at :])]


def safetensors_damaged(data: bytes, rng: Random) -> bytes:
    """A header that says something else; its length is mostly right."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.25:
        return fields_damaged(
            [Field("<Q", data[:8]), Field("", data[8 : 8 + size]), Field("", data[8 + size :])], rng
        )
    header = json_damaged(data[8 : 8 + size], rng)
    rest = data[8 + size :] if rng.random() < 0.8 else damaged(data[8 + size :], rng)
    return struct.pack("<Q", len(header)) + header + rest


def protobuf_damaged(data: bytes, rng: Random) -> bytes:
    """A message with pieces gone, twice, or with other contents; lengths are mostly right."""
    if rng.random() < 0.2:
        return damaged(data, rng)
    parts = _parts(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.choice((rng.randrange(len(parts)), len(parts) - 1 - rng.randrange(min(4, len(parts)))))
        change = rng.random()
        if change < 0.15 and len(parts) > 1:
            del parts[at]
        elif change < 0.3:
            parts.insert(at, rng.choice(parts))
        else:
            head, body = parts[at]
            inner = body
            if head[0] & 7 == BYTES and body and rng.random() < 0.6:
                inner = _inner_damaged(body, rng)
            elif body:
                inner = damaged(body, rng)
            parts[at] = (head, inner)
    return b"".join(_joined(head, body) for head, body in parts)


def _inner_damaged(body: bytes, rng: Random) -> bytes:
    try:
        parts = _parts(body)
    except (ValueError, IndexError):
        return damaged(body, rng)
    at = rng.randrange(len(parts))
    head, value = parts[at]
    parts[at] = (head, damaged(value, rng) if value else value)
    if rng.random() < 0.2:
        del parts[at]
    return b"".join(_joined(head, value) for head, value in parts)


def _joined(head: bytes, body: bytes) -> bytes:
    return head + _varint(len(body)) + body if head[0] & 7 == BYTES else head + body


def _parts(data: bytes) -> list[tuple[bytes, bytes]]:
    """Key and value of every field; of bytes without their length. Raises ValueError for no message."""
    found, at = [], 0
    while at < len(data):
        start = at
        at = _after(data, at)
        head, kind = data[start:at], data[start] & 7
        if kind == BYTES:
            end = _after(data, at)
            size = _read(data[at:end])
            at = end
        else:
            size = {0: _after(data, at) - at if kind == 0 else 0, 1: 8, 5: 4}.get(kind, -1)
        if size < 0 or at + size > len(data):
            raise ValueError("no message")
        found.append((head, data[at : at + size]))
        at += size
    if not found:
        raise ValueError("no message")
    return found


def _after(data: bytes, at: int) -> int:
    while data[at] >= 0x80:
        at += 1
    return at + 1


def _read(varint: bytes) -> int:
    return sum((byte & 0x7F) << 7 * place for place, byte in enumerate(varint))


def _varint(number: int) -> bytes:
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def _value(reader: _Reader, kind: int) -> None:
    if kind == STRING:
        reader.string()
    elif kind == BOOL:
        reader.bytes(1)
    elif kind == ARRAY:
        inner, count = reader.number("<I"), reader.number("<Q")
        if inner in (STRING, BOOL):
            for _ in range(count):
                _value(reader, inner)
        else:
            reader.bytes(count * int(NUMBERS[inner][2:]))
    else:
        reader.number({1: "<B", 2: "<H", 4: "<I", 8: "<Q"}[int(NUMBERS[kind][2:])])


class _Reader:
    """Reads a sound file, and keeps what it has read as fields."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self.at = data, at
        self.fields: list[Field] = []

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.bytes(struct.calcsize(form), form))[0])

    def string(self) -> None:
        self.bytes(self.number("<Q"))

    def bytes(self, count: int, form: str = "") -> bytes:
        self.fields.append(Field(form, self._data[self.at : self.at + count]))
        self.at += count
        return self.fields[-1].data
