"""The protobuf parser reads every wire type and refuses invalid messages."""

from __future__ import annotations

import pytest
from trimtab.models.tokenizer.protobuf import parse_fields


def test_every_kind_of_field_is_read() -> None:
    message = b"\x08\x96\x01" + b"\x12\x03abc" + b"\x1d\x00\x00\x80?" + b"\x21" + b"\x01" * 8 + b"\x12\x00"
    assert list(parse_fields(message)) == [
        (1, 150),
        (2, b"abc"),
        (3, b"\x00\x00\x80?"),
        (4, b"\x01" * 8),
        (2, b""),
    ]
    assert list(parse_fields(b"\xf8\x07\x01")) == [(127, 1)]


@pytest.mark.parametrize("message", [b"\x08", b"\x08\xff", b"\x12\x05ab", b"\x1d\x00", b"\x0b", b"\x80" * 9])
def test_an_invalid_message_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError, match=r"^(field exceeds the message|truncated varint|unknown wire type)"):
        list(parse_fields(message))
