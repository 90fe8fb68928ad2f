"""Incremental detokenizers for byte-level, `tokenizers` and SentencePiece vocabularies."""

from __future__ import annotations

import codecs
from functools import cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Detokenizer(Protocol):
    """Decode tokens incrementally.

    The joined results of `step` and `flush` are exactly `decode` of all ids. Returned text is final, so text
    that a later token could change is buffered.
    """

    def step(self, ids: Sequence[int]) -> str:
        """Add the next tokens and return the text that became final."""

    def flush(self) -> str:
        """Return the buffered text, with invalid UTF-8 as U+FFFD. Call once, at the end."""

    @property
    def pending(self) -> str:
        """Text that `flush` would return, or "" if it ends in an incomplete character."""


class ByteLevelDetokenizer:
    """Each token is a byte string of the UTF-8 text. Buffers at most one incomplete character.

    `ids_to_tokens` returns vocabulary entries in GPT-2's byte alphabet.
    """

    def __init__(self, ids_to_tokens: Callable[[Sequence[int]], list[str]]) -> None:
        self._ids_to_tokens = ids_to_tokens
        self._utf8_decoder = codecs.getincrementaldecoder("utf-8")("replace")

    pending = ""

    def step(self, ids: Sequence[int]) -> str:
        return self._utf8_decoder.decode(b"".join(map(byte_level_bytes, self._ids_to_tokens(ids))))

    def flush(self) -> str:
        return self._utf8_decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For decoders where a token's text depends only on whether it is first, and on its run of byte tokens.

    A run of byte tokens is buffered until it ends, because one invalid byte turns all of it into U+FFFD. Each
    token is decoded once. `decode_tokens` is the decoder. `anchor` is a token that decodes to itself: in
    front of other tokens, it makes them not the first, and ends a run. An empty `anchor` means that the
    decoder rewrites across tokens (CTC, end-of-word suffixes); then no text is final before the end.
    """

    def __init__(
        self,
        ids_to_tokens: Callable[[Sequence[int]], list[str]],
        decode_tokens: Callable[[list[str]], str],
        is_incomplete: Callable[[str], bool],
        anchor: str,
    ) -> None:
        self._ids_to_tokens = ids_to_tokens
        self._decode_tokens = decode_tokens
        self._is_incomplete = is_incomplete
        self._anchor = anchor
        self._pending_tokens: list[str] = []
        self._at_start = True

    @property
    def pending(self) -> str:
        text = self._decode(self._pending_tokens)
        return "" if "\ufffd" in text else text

    def step(self, ids: Sequence[int]) -> str:
        num_pending = len(self._pending_tokens)
        self._pending_tokens += self._ids_to_tokens(ids)
        for end in range(len(self._pending_tokens), num_pending, -1):
            if not self._is_incomplete(self._pending_tokens[end - 1]):
                return self._emit(end)
        return ""

    def flush(self) -> str:
        text, self._pending_tokens = self._decode(self._pending_tokens), []
        return text

    def _emit(self, end: int) -> str:
        text = self._decode(self._pending_tokens[:end])
        if self._at_start and not text:
            return ""  # the next token may start with a space that is stripped
        self._at_start = False
        del self._pending_tokens[:end]
        return text

    def _decode(self, tokens: list[str]) -> str:
        if not tokens:
            return ""
        if self._at_start:
            return self._decode_tokens(tokens)
        return self._decode_tokens([self._anchor, *tokens])[len(self._anchor) :]


class SentencePieceDetokenizer:
    """SentencePiece: a token is a text or one byte. Buffers at most one incomplete character.

    `piece_byte` returns the byte of an id, or None for a text. `piece_text(id, at_start)` returns that text
    and whether the next token is still at the start. Each byte of invalid UTF-8 becomes one U+FFFD.
    """

    def __init__(
        self, piece_text: Callable[[int, bool], tuple[str, bool]], piece_byte: Callable[[int], bytes | None]
    ) -> None:
        self._piece_text = piece_text
        self._piece_byte = piece_byte
        self._byte_run = b""
        self._at_start = True

    pending = ""

    def step(self, ids: Sequence[int]) -> str:
        return "".join(map(self._step_one, ids))

    def flush(self) -> str:
        return self._decode_byte_run(final=True)

    def _step_one(self, token_id: int) -> str:
        byte = self._piece_byte(token_id)
        if byte is not None:
            self._byte_run += byte
            self._at_start = False
            return self._decode_byte_run()
        prefix = self._decode_byte_run(final=True)
        text, self._at_start = self._piece_text(token_id, self._at_start)
        return prefix + text

    def _decode_byte_run(self, final: bool = False) -> str:
        text = ""
        while self._byte_run:
            try:
                text, self._byte_run = text + self._byte_run.decode(), b""
            except UnicodeDecodeError as error:
                text += self._byte_run[: error.start].decode()
                self._byte_run = self._byte_run[error.start :]
                if error.reason == "unexpected end of data" and not final:
                    return text
                text, self._byte_run = text + "\ufffd", self._byte_run[1:]
        return text


@cache
def _byte_decoder() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 maps to itself, the other 68 bytes to U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def byte_level_bytes(token: str) -> bytes:
    """The bytes of a vocabulary entry in GPT-2's byte alphabet; an added token is plain text."""
    decoder = _byte_decoder()
    try:
        return bytes([decoder[char] for char in token])
    except KeyError:
        return token.encode()
