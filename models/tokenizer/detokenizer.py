"""Token ids to text while they arrive, in the three ways that vocabularies spell text."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Detokenizer(Protocol):
    """The text of an answer while its tokens arrive.

    What `push` and `finish` return, joined, is `decode` of all ids, exactly. What was returned never changes,
    so text is held back while a token to come could still alter it.
    """

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next tokens, returns the text that has become final."""

    def finish(self) -> str:
        """The text still held back, to be called once; bytes that are no character become U+FFFD."""

    @property
    def held(self) -> str:
        """What `finish` would return; "" while that would not be whole characters."""


class ByteLevel:
    """Every token stands for bytes, and the text is their UTF-8. At most a broken character is held.

    `tokens` turns ids into vocabulary entries, spelled in GPT-2's alphabet of bytes.
    """

    def __init__(self, tokens: Callable[[Sequence[int]], list[str]]) -> None:
        self._tokens = tokens
        self._byte = _byte_of_character()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    held = ""

    def push(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(b"".join(map(self._bytes, self._tokens(ids))))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token: str) -> bytes:
        try:
            return bytes([self._byte[character] for character in token])
        except KeyError:  # an added token is written as it reads
            return token.encode()


class Window:
    """A decoder in which a token's text depends only on being the first and on the byte run it is in.

    A run of byte tokens is held until it ends, for one bad byte turns all of it into U+FFFD. Each token is
    decoded once. `join` is the decoder; `anchor` is a token that reads as itself: put before others it makes
    them not the first, and ends a run. Where there is none, the decoder rewrites across tokens (CTC,
    end-of-word suffixes); then nothing is final before the end.
    """

    def __init__(
        self,
        tokens: Callable[[Sequence[int]], list[str]],
        join: Callable[[list[str]], str],
        is_held: Callable[[str], bool],
        anchor: str,
    ) -> None:
        self._tokens = tokens
        self._join = join
        self._is_held = is_held
        self._anchor = anchor
        self._pending: list[str] = []
        self._first = True

    @property
    def held(self) -> str:
        text = self._text(self._pending)
        return "" if "\ufffd" in text else text

    def push(self, ids: Sequence[int]) -> str:
        old = len(self._pending)
        self._pending += self._tokens(ids)
        for cut in range(len(self._pending), old, -1):
            if not self._is_held(self._pending[cut - 1]):
                return self._release(cut)
        return ""

    def finish(self) -> str:
        text, self._pending = self._text(self._pending), []
        return text

    def _release(self, cut: int) -> str:
        text = self._text(self._pending[:cut])
        if self._first and not text:
            return ""  # a space to be stripped from the front may be still to come
        self._first = False
        del self._pending[:cut]
        return text

    def _text(self, tokens: list[str]) -> str:
        if not tokens:
            return ""
        if self._first:
            return self._join(tokens)
        return self._join([self._anchor, *tokens])[len(self._anchor) :]


class Pieces:
    """SentencePiece: a token is a text or one byte. At most a broken character is held.

    `byte` tells the byte of an id, None where it stands for a text; `text` that text and whether the next is
    still the first, given whether it is. Of bytes that are no UTF-8 each becomes a U+FFFD.
    """

    def __init__(
        self, text: Callable[[int, bool], tuple[str, bool]], byte: Callable[[int], bytes | None]
    ) -> None:
        self._text = text
        self._byte = byte
        self._run = b""
        self._first = True

    held = ""

    def push(self, ids: Sequence[int]) -> str:
        return "".join(map(self._next, ids))

    def finish(self) -> str:
        return self._characters(final=True)

    def _next(self, index: int) -> str:
        byte = self._byte(index)
        if byte is not None:
            self._run += byte
            self._first = False
            return self._characters()
        before = self._characters(final=True)
        text, self._first = self._text(index, self._first)
        return before + text

    def _characters(self, final: bool = False) -> str:
        text = ""
        while self._run:
            try:
                text, self._run = text + self._run.decode(), b""
            except UnicodeDecodeError as error:
                text += self._run[: error.start].decode()
                self._run = self._run[error.start :]
                if error.reason == "unexpected end of data" and not final:
                    return text
                text, self._run = text + "\ufffd", self._run[1:]
        return text


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet of bytes: printable Latin-1 stands for itself, the 68 others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
