"""Token ids to text while they arrive, in the three ways that vocabularies spell text."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Detokenizer(Protocol):
    """The text of an answer while its tokens arrive.

    What `step` and `flush` return, joined, is `decode` of all ids, exactly. What was returned never changes,
    so text is held back while a token to come could still alter it.
    """

    def step(self, ids: Sequence[int]) -> str:
        """Takes the next tokens, returns the text that has become final."""

    def flush(self) -> str:
        """The text still held back, to be called once; bytes that are no character become U+FFFD."""

    @property
    def pending(self) -> str:
        """What `flush` would return; "" while that would not be whole characters."""


class ByteLevelDetokenizer:
    """Every token stands for bytes, and the text is their UTF-8. At most a broken character is held.

    `tokens` turns ids into vocabulary entries, spelled in GPT-2's alphabet of bytes.
    """

    def __init__(self, ids_to_tokens: Callable[[Sequence[int]], list[str]]) -> None:
        self._ids_to_tokens = ids_to_tokens
        self._byte_decoder = _build_byte_decoder()
        self._utf8_decoder = codecs.getincrementaldecoder("utf-8")("replace")

    pending = ""

    def step(self, ids: Sequence[int]) -> str:
        return self._utf8_decoder.decode(b"".join(map(self._token_to_bytes, self._ids_to_tokens(ids))))

    def flush(self) -> str:
        return self._utf8_decoder.decode(b"", final=True)

    def _token_to_bytes(self, token: str) -> bytes:
        try:
            return bytes([self._byte_decoder[char] for char in token])
        except KeyError:  # an added token is written as it reads
            return token.encode()


class WindowDetokenizer:
    """A decoder in which a token's text depends only on being the first and on the byte run it is in.

    A run of byte tokens is held until it ends, for one bad byte turns all of it into U+FFFD. Each token is
    decoded once. `join` is the decoder; `anchor` is a token that reads as itself: put before others it makes
    them not the first, and ends a run. Where there is none, the decoder rewrites across tokens (CTC,
    end-of-word suffixes); then nothing is final before the end.
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
            return ""  # a space to be stripped from the front may be still to come
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
    """SentencePiece: a token is a text or one byte. At most a broken character is held.

    `byte` tells the byte of an id, None where it stands for a text; `text` that text and whether the next is
    still the first, given whether it is. Of bytes that are no UTF-8 each becomes a U+FFFD.
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


def _build_byte_decoder() -> dict[str, int]:
    """GPT-2's alphabet of bytes: printable Latin-1 stands for itself, the 68 others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
