"""Dummy weights and tokenizer, for running a model without a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

import torch

from ...kernels.common.errors import InputError
from ..tokenizer.detokenizer import WindowDetokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from ..tokenizer.backend import AddedTokenMatch, TextPosition
    from ..tokenizer.detokenizer import Detokenizer

INIT_STD = 0.02
"""Standard deviation of the weights, as in the initialisation of Llama models."""


class DummyWeights:
    """A `WeightSource` of random tensors: norm weights are 1, all others are normal with mean 0.

    `get_tensor` generates a tensor on `device` in `dtype`; it depends only on seed and name.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        self.shapes = dict(shapes)
        self._dtype, self._device, self._seed = dtype, device, seed

    def validate(
        self, expected: Mapping[str, tuple[int, ...]], ignored: frozenset[str] = frozenset()
    ) -> None:
        """Do nothing: the shapes come from the config."""

    def get_tensor(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """The named tensor, or slices of it with the same values as in the full tensor."""
        tensor = self._create_tensor(name)
        return tensor if slices is None else tensor[slices].clone()

    def _create_tensor(self, name: str) -> Tensor:
        tensor = torch.empty(self.shapes[name], dtype=self._dtype, device=self._device)
        if name.endswith("norm.weight"):
            return tensor.fill_(1)
        seed = crc32(f"{self._seed} {name}".encode())
        return tensor.normal_(0, INIT_STD, generator=torch.Generator(self._device).manual_seed(seed))


class DummyTokenizer:
    """A `TokenizerBackend` that spells ids as numbers: [12, 407] is "12 407". No token is special or EOS."""

    kind = "ids"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.added_tokens: dict[str, int] = {}
        self.special_tokens: dict[str, str] = {}
        self.unk_ids: set[int] = set()
        self.bos_eos_ids: tuple[list[int], list[int]] = ([], [])

    def encode(self, text: str) -> list[int]:
        """Raises InputError for a word that is not an id."""
        words = text.split()
        ids = [self.token_to_id(word) for word in words]
        known = [token_id for token_id in ids if token_id is not None]
        if len(known) < len(ids):
            raise InputError(
                f"the text contains {words[ids.index(None)]!r}; this model has no tokenizer and accepts only "
                f"ids from 0 to {self.vocab_size - 1}"
            )
        return known

    def encode_with_matches(self, text: str) -> tuple[list[int], list[AddedTokenMatch]]:
        return self.encode(text), []

    def encode_plain(self, text: str, position: TextPosition) -> list[int]:
        return self.encode(text)

    def normalize(self, text: str) -> str:
        return text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        return WindowDetokenizer(
            lambda ids: list(map(str, ids)), " ".join, is_incomplete=lambda token: False, anchor="0"
        )

    def token_to_id(self, token: str) -> int | None:
        is_id = token.isdecimal() and token.isascii() and len(token) <= len(str(self.vocab_size))
        return int(token) if is_id and int(token) < self.vocab_size else None

    def id_to_token(self, token_id: int) -> str | None:
        return str(token_id) if 0 <= token_id < self.vocab_size else None

    def token_bytes(self, token_id: int) -> bytes | None:
        return None
