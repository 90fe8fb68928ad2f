"""The specifications of what layers and steps launch, at the shapes of Llama 3.1 8B and the demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, device, dtype

from ..reference import matmul as matmul_reference
from ..reference import paged_attention as paged
from ..reference import rms_norm as norm
from ..reference import rotary
from ..reference import swiglu as swiglu_reference
from ..triton.attention import paged_attention
from ..triton.batch_invariant_attention import invariant_attention
from ..triton.batch_invariant_matmul import matmul
from ..triton.rms_norm import rms_norm
from ..triton.rotary import rope_write
from ..triton.swiglu import swiglu
from . import roofline
from .spec import Case, KernelSpec, weight_of

BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and the type that it is held in."""

    name: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    width: int
    block: int
    dtype: dtype

    @property
    def attention(self) -> tuple[int, int, int, int]:
        """Heads, those of keys and values, their width, and a number's bytes."""
        return self.heads, self.kv_heads, self.width, self.dtype.itemsize


LLAMA = Shape("Llama 3.1 8B", 4096, 14336, 32, 8, 128, 16, BF16)
DEMO = Shape("demo", 576, 1536, 9, 3, 64, 64, BF16)


def _random(generator: Generator, where: device, kind: dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(where, kind)


def _matmul(
    model: Shape, rows: int, inner: int, out: int, biased: bool = False, dtype: dtype | None = None
) -> Case:
    def make(where: device, generator: Generator) -> tuple[Any, ...]:
        x, bias = (_random(generator, where, model.dtype, *shape) for shape in ((rows, inner), (out,)))
        return x, weight_of(out, inner, where, model.dtype), bias if biased else None, dtype

    name = f"{model.name}, {rows} rows, {inner} to {out}{', biased' if biased else ''}"
    return Case(name, make, roofline.product(rows, inner, out, model.dtype.itemsize))


def _norm(model: Shape, rows: int) -> Case:
    def make(where: device, generator: Generator) -> tuple[Any, ...]:
        x = _random(generator, where, model.dtype, rows, model.hidden)
        return x, _random(generator, where, F32, model.hidden), torch.tensor([1e-5], device=where)

    return Case(f"{model.name}, {rows} rows", make, roofline.norm(rows, model.hidden, model.dtype.itemsize))


def _swiglu(model: Shape, rows: int) -> Case:
    def make(where: device, generator: Generator) -> tuple[Any, ...]:
        return (_random(generator, where, model.dtype, rows, 2 * model.inner),)

    return Case(f"{model.name}, {rows} rows", make, roofline.swiglu(rows, model.inner, model.dtype.itemsize))


def _cache(model: Shape, pages: int, where: device, generator: Generator) -> Tensor:
    return _random(generator, where, model.dtype, 2, pages, model.kv_heads, model.block, model.width)


def _rope(model: Shape, rows: int, normed: bool) -> Case:
    all_heads = model.heads + 2 * model.kv_heads

    def make(where: device, generator: Generator) -> tuple[Any, ...]:
        cos, sin = (_random(generator, where, F32, rows, model.width) for _ in range(2))
        weight = _random(generator, where, F32, model.heads + model.kv_heads, model.width)
        page = torch.arange(rows, device=where)
        return (
            _random(generator, where, model.dtype, rows, all_heads, model.width),
            rotary.Turns(cos, sin, model.heads, model.kv_heads, model.width**-0.5),
            rotary.HeadNorm(weight, torch.tensor([1e-6], device=where)) if normed else None,
            _cache(model, rows, where, generator),
            page,
            page % model.block,
        )

    moved = roofline.rope_write(rows, *model.attention)
    return Case(f"{model.name}, {rows} rows{', with norms' if normed else ''}", make, moved)


def _attention(model: Shape, branches: int, context: int, new: int, window: int | None = None) -> Case:
    """Each branch has `new` tokens at the end of its context."""
    size = 1 if new == 1 else 16
    pages = -(-context // model.block)

    def make(where: device, generator: Generator) -> tuple[Any, ...]:
        runs = [(branch * new, context - new, new, branch) for branch in range(branches)]
        tables = torch.arange(branches * pages, dtype=torch.int32, device=where).view(branches, pages)
        return (
            _random(generator, where, model.dtype, branches * new, model.heads, model.width),
            _cache(model, branches * pages, where, generator),
            tables,
            paged.Tiles.of(runs, size, where),
            window,
        )

    moved = roofline.attention(branches, context, new, *model.attention, window)
    what = f"{branches} decoding" if new == 1 else f"{branches} x {new} tokens"
    return Case(f"{model.name}, {what} at {context}{f', window {window}' if window else ''}", make, moved)


NORM = KernelSpec("rms_norm", norm.rms_norm, rms_norm, (_norm(LLAMA, 16), _norm(DEMO, 3)))
SWIGLU = KernelSpec("swiglu", swiglu_reference.swiglu, swiglu, (_swiglu(LLAMA, 16), _swiglu(DEMO, 3)))
ROPE = KernelSpec(
    "rope_write", rotary.rope_write, rope_write, (_rope(LLAMA, 16, True), _rope(DEMO, 3, False))
)
ATTENTION = KernelSpec(
    "paged_attention",
    paged.paged_attention,
    paged_attention,
    (
        _attention(LLAMA, 5, 2048, 1),
        _attention(LLAMA, 2, 1024, 512),
        _attention(LLAMA, 5, 8192, 1, window=4096),
        _attention(DEMO, 3, 512, 1),
        _attention(DEMO, 2, 128, 64),
    ),
)
INVARIANT_ATTENTION = KernelSpec(
    "invariant_attention", paged.paged_attention, invariant_attention, ATTENTION.cases
)
MATMUL = KernelSpec(
    "matmul",
    matmul_reference.matmul,
    matmul,
    (
        _matmul(LLAMA, 5, 4096, 6144, biased=True),
        _matmul(LLAMA, 5, 4096, 4096),
        _matmul(LLAMA, 80, 4096, 28672),
        _matmul(LLAMA, 512, 14336, 4096),
        _matmul(LLAMA, 5, 4096, 128_256, dtype=F32),
        _matmul(DEMO, 5, 576, 576),
    ),
)
LAYER_SPECS = (NORM, SWIGLU, ROPE, ATTENTION, INVARIANT_ATTENTION, MATMUL)
