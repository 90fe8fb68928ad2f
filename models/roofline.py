"""What a step of a decoder moves and computes at least, part by part, from its sizes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..kernels.specs import roofline as work
from ..kernels.specs.roofline import Work
from .llama import EMBEDDING, shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .config import ModelConfig

PRODUCTS = ("qkv", "output", "mlp", "head")
"""Stages with a product of activations by weights."""
SCORES = 4
"""Bytes of a logit as the steering step reads it."""


@dataclass(frozen=True)
class Part:
    """An operation of a step: how often it is done, and what one takes. stage: where it belongs."""

    stage: str
    count: float
    work: Work

    @property
    def bytes(self) -> float:
        return self.count * self.work.bytes

    @property
    def flops(self) -> float:
        return self.count * self.work.flops

    def seconds(self, bandwidth: float, products: float) -> float:
        """By the roofline of each operation."""
        return self.count * self.work.seconds(bandwidth, products)


@dataclass(frozen=True)
class Run:
    """Branches that are alike: each has `new` tokens in the step, the last of its `context`."""

    branches: float
    context: float
    new: float = 1

    @property
    def tokens(self) -> float:
        return self.branches * self.new


def decoding(config: ModelConfig, rows: float, context: float, itemsize: int, shares: int = 1) -> list[Part]:
    """A step in which `rows` branches decode a token each, with `context` tokens in the mean."""
    return parts(config, [Run(rows, context)], rows, itemsize, shares)


def parts(
    config: ModelConfig,
    runs: Sequence[Run],
    rows: float,
    itemsize: int,
    shares: int = 1,
    passes: int = 1,
) -> list[Part]:
    """The operations of a step on one of `shares` devices, each of which has its share of heads, of the
    feed-forward and of the vocabulary.

    rows: branches whose next token is chosen. passes: in so many forwards the runs are cut, as equal as can
    be; each reads all weights. What devices tell each other is not in it.
    """
    hidden, width, layers = config.hidden_size, config.head_dim, config.num_layers
    heads, kv_heads = config.num_heads / shares, config.num_kv_heads / shares
    inner, vocab = config.intermediate_size / shares, config.vocab_size / shares
    tokens, each = sum(run.tokens for run in runs), layers * passes
    cut = tokens / passes
    return [
        Part("embed", passes, work.embedding(cut, hidden, itemsize)),
        Part("norm", 2 * each + passes, work.norm(cut, hidden, itemsize)),
        Part("qkv", each, work.product(cut, hidden, (heads + 2 * kv_heads) * width, itemsize)),
        Part("rope", each, work.rope_write(cut, heads, kv_heads, width, itemsize)),
        *(
            Part("attention", count, _attention(run, heads, kv_heads, width, itemsize, window))
            for run in runs
            for window, count in _counted(config.windows).items()
        ),
        Part("output", each, work.product(cut, heads * width, hidden, itemsize, added=True)),
        Part("mlp", each, work.product(cut, hidden, 2 * inner, itemsize)),
        Part("mlp", each, work.swiglu(cut, inner, itemsize)),
        Part("mlp", each, work.product(cut, inner, hidden, itemsize, added=True)),
        Part("head", 1, work.product(rows, hidden, vocab, itemsize)),
        Part("steer", 1, work.steer(rows, config.vocab_size, SCORES)),
    ]


def weight_bytes(config: ModelConfig, itemsize: int) -> float:
    """What a step must read of the weights: each once.

    Of an embedding that is not the head as well only some rows are read, which do not count.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes(config).items()}
    numbers = sum(sizes.values()) - (0 if config.tie_word_embeddings else sizes[EMBEDDING])
    return numbers * itemsize


def kv_bytes(config: ModelConfig, rows: float, tokens: float, itemsize: int) -> float:
    """The keys and values that a step of `rows` branches reads, each with `tokens` tokens before it."""
    seen = sum(tokens if window is None else min(tokens, window) for window in config.windows)
    return rows * seen * config.kv_size / config.num_layers * itemsize


def workspace_bytes(config: ModelConfig, tokens: float, rows: float, itemsize: int, shares: int = 1) -> float:
    """About what the largest step keeps beside weights and cache: `tokens` in it, `rows` that choose.

    The larger of a layer's two moments (queries, keys and values, beside the queries turned and what they
    find; the feed-forward's inner numbers), float32 turns, and each row's logits in the model's type, in
    float32, mixed, steered and filtered.
    """
    hidden, width = config.hidden_size, config.head_dim
    heads = (3 * config.num_heads + 2 * config.num_kv_heads) * width / shares * itemsize
    inner = 3 * config.intermediate_size / shares * itemsize
    of_token = 2 * hidden * itemsize + 2 * width * 4 + max(heads, inner)
    return tokens * of_token + rows * config.vocab_size * (itemsize + 16)


def _attention(
    run: Run, heads: float, kv_heads: float, width: int, itemsize: int, window: int | None
) -> Work:
    return work.attention(run.branches, run.context, run.new, heads, kv_heads, width, itemsize, window)


def _counted(windows: Sequence[int | None]) -> dict[int | None, int]:
    """How many layers have each window."""
    return {window: windows.count(window) for window in dict.fromkeys(windows)}
