"""A model without a checkpoint: random weights in its shape, and texts made of ids."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

import torch

from ...kernels.common.errors import InputError
from ..tokenizer.detokenizer import Window

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ..tokenizer.backend import Found, Place
    from ..tokenizer.detokenizer import Detokenizer

SPREAD = 0.02
"""The standard deviation of a weight, as models of this family are initialised."""


class DummyWeights:
    """Reads like a `Checkpoint` of these shapes: norms are 1, all else is normal noise around 0.

    Each tensor is made when it is asked for, on `device` and in `dtype`, and depends on seed and name alone.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        self.shapes = dict(shapes)
        self._dtype, self._device, self._seed = dtype, device, seed

    def require(self, expected: Mapping[str, tuple[int, ...]], ignored: frozenset[str] = frozenset()) -> None:
        """Nothing can be missing: the shapes are those of the config."""

    def tensor(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor of this name, or a part of it: the same numbers as in the whole."""
        found = self._made(name)
        return found if part is None else found[part].clone()

    def _made(self, name: str) -> Tensor:
        empty = torch.empty(self.shapes[name], dtype=self._dtype, device=self._device)
        if name.endswith("norm.weight"):
            return empty.fill_(1)
        seed = crc32(f"{self._seed} {name}".encode())
        return empty.normal_(0, SPREAD, generator=torch.Generator(self._device).manual_seed(seed))


class IdVocabulary:
    """A `Vocabulary` without words: the text of [12, 407] is "12 407". No id is special or ends an answer."""

    kind = "ids"

    def __init__(self, size: int) -> None:
        self.size = size
        self.added: dict[str, int] = {}
        self.named: dict[str, str] = {}
        self.unknown: set[int] = set()
        self.ends: tuple[list[int], list[int]] = ([], [])

    def encode(self, text: str) -> list[int]:
        """Raises InputError for a word that is no id."""
        words = text.split()
        ids = [self.id_of(word) for word in words]
        found = [index for index in ids if index is not None]
        if len(found) < len(ids):
            raise InputError(
                f"the text holds {words[ids.index(None)]!r}; this model has no tokenizer, and reads only ids "
                f"from 0 to {self.size - 1}"
            )
        return found

    def read(self, text: str) -> tuple[list[int], list[Found]]:
        return self.encode(text), []

    def ordinary(self, text: str, place: Place) -> list[int]:
        return self.encode(text)

    def normalized(self, text: str) -> str:
        return text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        return Window(lambda ids: list(map(str, ids)), " ".join, is_held=lambda token: False, anchor="0")

    def id_of(self, token: str) -> int | None:
        is_id = token.isdecimal() and token.isascii() and len(token) <= len(str(self.size))
        return int(token) if is_id and int(token) < self.size else None

    def token_of(self, index: int) -> str | None:
        return str(index) if 0 <= index < self.size else None
