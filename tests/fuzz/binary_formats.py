"""Mutators for GGUF, safetensors and protobuf that change single fields and leave the rest parsable."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from trimtab.models.gguf.reader import ARRAY, BOOL, NUMPY_DTYPES, STRING

from .mutators import BinaryField, damage_bytes, damage_fields, damage_json

if TYPE_CHECKING:
    from random import Random

WIRE_LENGTH, WIRE_BYTES = 2, 2
"""Protobuf wire type LEN: length-delimited bytes."""


def damage_gguf(data: bytes, rng: Random) -> bytes:
    """Change metadata, tensor infos or offsets; sometimes arbitrary bytes."""
    return damage_bytes(data, rng) if rng.random() < 0.15 else damage_fields(gguf_fields(data), rng)


def gguf_fields(data: bytes) -> list[BinaryField]:
    """The fields of a GGUF file; all tensor data is one field."""
    reader = _FieldReader(data, 4)
    reader.number("<I")
    tensors, keys = reader.number("<Q"), reader.number("<Q")
    for _ in range(keys):
        reader.string()
        _skip_value(reader, reader.number("<I"))
    for _ in range(tensors):
        reader.string()
        for _ in range(reader.number("<I")):
            reader.number("<Q")
        reader.number("<I")
        reader.number("<Q")
    return [BinaryField("", data[:4]), *reader.fields, BinaryField("", data[reader.offset :])]


def damage_safetensors(data: bytes, rng: Random) -> bytes:
    """Change the JSON header; its length is mostly correct."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.25:
        return damage_fields(
            [
                BinaryField("<Q", data[:8]),
                BinaryField("", data[8 : 8 + size]),
                BinaryField("", data[8 + size :]),
            ],
            rng,
        )
    header = damage_json(data[8 : 8 + size], rng)
    tensor_data = data[8 + size :] if rng.random() < 0.8 else damage_bytes(data[8 + size :], rng)
    return struct.pack("<Q", len(header)) + header + tensor_data


def damage_protobuf(data: bytes, rng: Random) -> bytes:
    """Delete, duplicate or change fields of a message; lengths are mostly correct."""
    if rng.random() < 0.2:
        return damage_bytes(data, rng)
    fields = _split_fields(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        index = rng.choice((rng.randrange(len(fields)), len(fields) - 1 - rng.randrange(min(4, len(fields)))))
        chance = rng.random()
        if chance < 0.15 and len(fields) > 1:
            del fields[index]
        elif chance < 0.3:
            fields.insert(index, rng.choice(fields))
        else:
            head, body = fields[index]
            new_body = body
            if head[0] & 7 == WIRE_BYTES and body and rng.random() < 0.6:
                new_body = _damage_nested(body, rng)
            elif body:
                new_body = damage_bytes(body, rng)
            fields[index] = (head, new_body)
    return b"".join(_encode_field(head, body) for head, body in fields)


def _damage_nested(body: bytes, rng: Random) -> bytes:
    try:
        fields = _split_fields(body)
    except (ValueError, IndexError):
        return damage_bytes(body, rng)
    index = rng.randrange(len(fields))
    head, value = fields[index]
    fields[index] = (head, damage_bytes(value, rng) if value else value)
    if rng.random() < 0.2:
        del fields[index]
    return b"".join(_encode_field(head, value) for head, value in fields)


def _encode_field(head: bytes, body: bytes) -> bytes:
    return head + _encode_varint(len(body)) + body if head[0] & 7 == WIRE_BYTES else head + body


def _split_fields(data: bytes) -> list[tuple[bytes, bytes]]:
    """Key and value of every field; bytes without the length prefix. Raises ValueError if not a message."""
    fields, offset = [], 0
    while offset < len(data):
        start = offset
        offset = _varint_end(data, offset)
        head, kind = data[start:offset], data[start] & 7
        if kind == WIRE_BYTES:
            end = _varint_end(data, offset)
            size = _read_varint(data[offset:end])
            offset = end
        else:
            size = {0: _varint_end(data, offset) - offset if kind == 0 else 0, 1: 8, 5: 4}.get(kind, -1)
        if size < 0 or offset + size > len(data):
            raise ValueError("no message")
        fields.append((head, data[offset : offset + size]))
        offset += size
    if not fields:
        raise ValueError("no message")
    return fields


def _varint_end(data: bytes, offset: int) -> int:
    while data[offset] >= 0x80:
        offset += 1
    return offset + 1


def _read_varint(varint: bytes) -> int:
    return sum((byte & 0x7F) << 7 * index for index, byte in enumerate(varint))


def _encode_varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def _skip_value(reader: _FieldReader, kind: int) -> None:
    if kind == STRING:
        reader.string()
    elif kind == BOOL:
        reader.bytes(1)
    elif kind == ARRAY:
        item_kind, count = reader.number("<I"), reader.number("<Q")
        if item_kind in (STRING, BOOL):
            for _ in range(count):
                _skip_value(reader, item_kind)
        else:
            reader.bytes(count * int(NUMPY_DTYPES[item_kind][2:]))
    else:
        reader.number({1: "<B", 2: "<H", 4: "<I", 8: "<Q"}[int(NUMPY_DTYPES[kind][2:])])


class _FieldReader:
    """Reads a valid file and records what it reads as fields."""

    def __init__(self, data: bytes, offset: int) -> None:
        self._data, self.offset = data, offset
        self.fields: list[BinaryField] = []

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.bytes(struct.calcsize(form), form))[0])

    def string(self) -> None:
        self.bytes(self.number("<Q"))

    def bytes(self, count: int, form: str = "") -> bytes:
        self.fields.append(BinaryField(form, self._data[self.offset : self.offset + count]))
        self.offset += count
        return self.fields[-1].data
