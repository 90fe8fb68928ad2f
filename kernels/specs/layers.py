"""Registrations of the layer kernels, at the shapes of Llama 3.1 8B and the demo model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, device, dtype

from ..attention_params import AttentionParams
from ..reference import paged_attention as paged
from ..reference import rotary
from ..reference.matmul import matmul
from ..reference.rms_norm import rms_norm
from ..reference.swiglu import swiglu
from . import roofline
from .spec import KernelCase, KernelSpec, random_weight

BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class ModelShape:
    """A model's dimensions, KV block size and dtype."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: dtype

    @property
    def attention_dims(self) -> tuple[int, int, int, int]:
        """(num_heads, num_kv_heads, head_dim, itemsize)."""
        return self.num_heads, self.num_kv_heads, self.head_dim, self.dtype.itemsize


LLAMA = ModelShape("Llama 3.1 8B", 4096, 14336, 32, 8, 128, 16, BF16)
DEMO = ModelShape("demo", 576, 1536, 9, 3, 64, 64, BF16)


def _random(generator: Generator, where: device, kind: dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(where, kind)


def _matmul_case(
    model: ModelShape,
    num_rows: int,
    in_features: int,
    out_features: int,
    has_bias: bool = False,
    dtype: dtype | None = None,
) -> KernelCase:
    def make(where: device, generator: Generator) -> tuple[Any, ...]:
        x, bias = (
            _random(generator, where, model.dtype, *shape)
            for shape in ((num_rows, in_features), (out_features,))
        )
        return (
            x,
            random_weight(out_features, in_features, where, model.dtype),
            bias if has_bias else None,
            dtype,
        )

    name = f"{model.name}, {num_rows} rows, {in_features} to {out_features}{', biased' if has_bias else ''}"
    return KernelCase(name, make, roofline.matmul(num_rows, in_features, out_features, model.dtype.itemsize))


def _norm_case(model: ModelShape, num_rows: int) -> KernelCase:
    def make(where: device, generator: Generator) -> tuple[Any, ...]:
        x = _random(generator, where, model.dtype, num_rows, model.hidden_size)
        return x, _random(generator, where, F32, model.hidden_size), torch.tensor([1e-5], device=where)

    return KernelCase(
        f"{model.name}, {num_rows} rows",
        make,
        roofline.norm(num_rows, model.hidden_size, model.dtype.itemsize),
    )


def _swiglu_case(model: ModelShape, num_rows: int) -> KernelCase:
    def make(where: device, generator: Generator) -> tuple[Any, ...]:
        return (_random(generator, where, model.dtype, num_rows, 2 * model.intermediate_size),)

    return KernelCase(
        f"{model.name}, {num_rows} rows",
        make,
        roofline.swiglu(num_rows, model.intermediate_size, model.dtype.itemsize),
    )


def _random_cache(model: ModelShape, num_blocks: int, where: device, generator: Generator) -> Tensor:
    return _random(
        generator, where, model.dtype, 2, num_blocks, model.num_kv_heads, model.block_size, model.head_dim
    )


def _rope_case(model: ModelShape, num_rows: int, has_norm: bool) -> KernelCase:
    num_qkv_heads = model.num_heads + 2 * model.num_kv_heads

    def make(where: device, generator: Generator) -> tuple[Any, ...]:
        cos, sin = (_random(generator, where, F32, num_rows, model.head_dim) for _ in range(2))
        norm_weight = _random(generator, where, F32, model.num_heads + model.num_kv_heads, model.head_dim)
        block_ids = torch.arange(num_rows, device=where)
        return (
            _random(generator, where, model.dtype, num_rows, num_qkv_heads, model.head_dim),
            rotary.RotaryCosSin(cos, sin, model.num_heads, model.num_kv_heads, model.head_dim**-0.5),
            rotary.QKNorm(norm_weight, torch.tensor([1e-6], device=where)) if has_norm else None,
            _random_cache(model, num_rows, where, generator),
            block_ids,
            block_ids % model.block_size,
        )

    cost = roofline.rope_and_write_kv(num_rows, *model.attention_dims)
    return KernelCase(f"{model.name}, {num_rows} rows{', with norms' if has_norm else ''}", make, cost)


def _attention_case(
    model: ModelShape, num_seqs: int, context_len: int, num_new: int, window: int | None = None
) -> KernelCase:
    """Each sequence has `num_new` query tokens at the end of its context."""
    tile_size = 1 if num_new == 1 else 16
    num_blocks = -(-context_len // model.block_size)

    def make(where: device, generator: Generator) -> tuple[Any, ...]:
        chunks = [(branch * num_new, context_len - num_new, num_new, branch) for branch in range(num_seqs)]
        block_tables = torch.arange(num_seqs * num_blocks, dtype=torch.int32, device=where).view(
            num_seqs, num_blocks
        )
        return (
            _random(generator, where, model.dtype, num_seqs * num_new, model.num_heads, model.head_dim),
            _random_cache(model, num_seqs * num_blocks, where, generator),
            block_tables,
            paged.QueryTiles.from_spans(chunks, tile_size, where),
            AttentionParams(window),
        )

    cost = roofline.attention(num_seqs, context_len, num_new, *model.attention_dims, window)
    description = f"{num_seqs} decoding" if num_new == 1 else f"{num_seqs} x {num_new} tokens"
    return KernelCase(
        f"{model.name}, {description} at {context_len}{f', window {window}' if window else ''}", make, cost
    )


RMS_NORM = KernelSpec(
    "rms_norm",
    rms_norm,
    "rms_norm.rms_norm",
    (_norm_case(LLAMA, 16), _norm_case(DEMO, 3)),
    is_layer_op=True,
)
SWIGLU = KernelSpec(
    "swiglu", swiglu, "swiglu.swiglu", (_swiglu_case(LLAMA, 16), _swiglu_case(DEMO, 3)), is_layer_op=True
)
ROPE = KernelSpec(
    "rope_write",
    rotary.rope_and_write_kv,
    "rotary.rope_and_write_kv",
    (_rope_case(LLAMA, 16, True), _rope_case(DEMO, 3, False)),
)
ATTENTION = KernelSpec(
    "paged_attention",
    paged.paged_attention,
    "attention.paged_attention",
    (
        _attention_case(LLAMA, 5, 2048, 1),
        _attention_case(LLAMA, 2, 1024, 512),
        _attention_case(LLAMA, 5, 8192, 1, window=4096),
        _attention_case(DEMO, 3, 512, 1),
        _attention_case(DEMO, 2, 128, 64),
    ),
)
INVARIANT_ATTENTION = KernelSpec(
    "invariant_attention",
    paged.paged_attention,
    "batch_invariant_attention.invariant_attention",
    ATTENTION.cases,
)
MATMUL = KernelSpec(
    "matmul",
    matmul,
    "batch_invariant_matmul.matmul",
    (
        _matmul_case(LLAMA, 5, 4096, 6144, has_bias=True),
        _matmul_case(LLAMA, 5, 4096, 4096),
        _matmul_case(LLAMA, 80, 4096, 28672),
        _matmul_case(LLAMA, 512, 14336, 4096),
        _matmul_case(LLAMA, 5, 4096, 128_256, dtype=F32),
        _matmul_case(DEMO, 5, 576, 576),
    ),
    atol=1e-4,  # the sums of tensor cores round toward zero
)
LAYER_SPECS = (RMS_NORM, SWIGLU, ROPE, ATTENTION, INVARIANT_ATTENTION, MATMUL)
LAYER_OPS = tuple(spec for spec in LAYER_SPECS if spec.is_layer_op)
