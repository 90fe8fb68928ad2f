"""CPU paged KV cache, and attention over it.

Keys and values are stored in blocks of `block_size` tokens; a branch's block table lists its blocks in order,
and branches with a common prefix share blocks. A block is also the tile of attention: one matmul with its
keys and one with its values, summed pairwise over the blocks. Decode reads all used blocks in place, see
`kernels.cpu.decode_attention`, so a cache without gaps in its used blocks is fast;
`engine.scheduling.block_manager` allocates low block ids first. Prompts use the same matmuls and sums in
chunks, so a result depends neither on other requests nor on how the prompt is split.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..attention_metadata import RaggedBatch, SequenceChunk
from ..attention_params import CAUSAL, AttentionParams
from ..common.profiling import in_stage
from ..reference.rms_norm import rms_norm
from ..reference.rotary import QKNorm, RotaryCosSin, apply_rotary
from ..reference.softcap import softcap_
from .block_pool import MIN_SINGLE_ROWS, KVBlockPool, pad_head_dim
from .decode_attention import DecodeAttention, pairwise_sum
from .prefill_attention import PrefillBatch, PrefillChunkBatch
from .shared_blocks import BlockSharing


@dataclass
class _MaskCache:
    """Masks of a step for one window size: the bias of each decode matmul, and the prompts in chunks.

    prefills: (prefill batch, for each of its chunk batches the rows of qkv that hold its queries).
    """

    decode_bias: list[Tensor]
    prefills: list[tuple[PrefillBatch, list[Tensor]]]


@dataclass
class _CPUAttentionMetadata:
    """Attention metadata shared by all layers of a step: slots, decode rows, prefill chunks and masks.

    slot_mapping [num_tokens · 2 · kv_heads]: rows of a layer's blocks, viewed as [rows, width].
    decode_block_tables: block tables of the decode rows; decode_rows, decode_seq_lens [rows]: their batch
    rows, and their sequence lengths with the new token. prefills: (first batch row, chunk). num_padding: rows
    of the batch beyond its tokens. mask_cache: masks by window size.
    """

    slot_mapping: Tensor
    num_tokens: int
    num_padding: int
    decode_block_tables: list[list[int]] = field(default_factory=list)
    decode_rows: list[int] = field(default_factory=list)
    decode_seq_lens: list[int] = field(default_factory=list)
    prefills: list[tuple[int, SequenceChunk]] = field(default_factory=list)
    mask_cache: dict[int | None, _MaskCache] = field(default_factory=dict)


class CPUPagedKVCache(KVBlockPool):
    """CPU paged KV cache: call `prepare` once per step, then `forward` once per layer."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert device.type == "cpu", f"CPUPagedKVCache needs a CPU device, got {device}"
        super().__init__(num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype)
        self._metadata: _CPUAttentionMetadata | None = None
        self._decode_attention: DecodeAttention | None = None
        self._decode_key: object = None

    @staticmethod
    def block_bytes(
        num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes of one block, over all layers."""
        return num_layers * 2 * num_kv_heads * block_size * pad_head_dim(head_dim) * dtype.itemsize

    @in_stage("layout")
    def prepare(self, batch: RaggedBatch) -> None:
        """Plan a step: compute its slots, and split the batch into decode rows and prefill chunks."""
        num_tokens, num_rows, row = len(batch.block_ids), len(batch.positions), 0
        metadata = _CPUAttentionMetadata(self._slot_mapping(batch), num_tokens, num_rows - num_tokens)
        for chunk in batch.chunks:
            if chunk.num_new == 1:
                metadata.decode_rows.append(row)
                metadata.decode_block_tables.append(
                    chunk.block_table[: chunk.num_computed // self.block_size + 1]
                )
                metadata.decode_seq_lens.append(chunk.num_computed + 1)
            else:
                metadata.prefills.append((row, chunk))
            row += chunk.num_new
        self._metadata = metadata

    @in_stage("attention")
    def forward(
        self,
        layer: int,
        qkv: Tensor,
        rotary: RotaryCosSin,
        norm: QKNorm | None = None,
        params: AttentionParams = CAUSAL,
    ) -> Tensor:
        """Apply RoPE, write keys and values to the cache, and return softmax(q kᵀ) v over each branch's
        context, [rows, heads · head_dim] float32.

        qkv [batch rows, heads + 2 · kv_heads, head_dim]: queries, keys, values; may be overwritten. norm: QK
        norm, applied before RoPE. RoPE also scales queries by its `scale`: a scale in the matmul would be
        rounded differently in different code paths.
        """
        qkv, padding = self.apply_rope(qkv, rotary, norm), self.padded_head_dim - self.head_dim
        if not padding:
            return self._forward(layer, qkv, params).flatten(1)
        return self._forward(layer, pad(qkv, (0, padding)), params)[..., :-padding].flatten(1)

    @in_stage("rope")
    def apply_rope(self, qkv: Tensor, rotary: RotaryCosSin, norm: QKNorm | None) -> Tensor:
        """QK norm and RoPE of all heads, float32. Leaving out the values would cost one more operation."""
        if norm is not None:
            qkv[:, : -self.num_kv_heads] = rms_norm(qkv[:, : -self.num_kv_heads], norm.weight, norm.eps)
        return apply_rotary(qkv, *rotary.per_head)

    def _forward(self, layer: int, qkv: Tensor, params: AttentionParams) -> Tensor:
        metadata = self._metadata
        assert metadata is not None, "call prepare before forward"
        num_heads, window = qkv.shape[1] - 2 * self.num_kv_heads, params.window
        self.write(layer, metadata.slot_mapping, qkv[: metadata.num_tokens, num_heads:])
        if window not in metadata.mask_cache:
            metadata.mask_cache[window] = self._build_masks(metadata, num_heads, window)
        masks, qkv_rows = metadata.mask_cache[window], qkv.view(-1, self.padded_head_dim)
        if not metadata.prefills:
            assert self._decode_attention is not None
            return self._decode_attention.forward(layer, qkv_rows, masks.decode_bias, params.softcap)
        out = qkv.new_zeros(len(qkv), num_heads, self.padded_head_dim)
        if metadata.decode_rows:
            assert self._decode_attention is not None
            decode_out = self._decode_attention.forward(layer, qkv_rows, masks.decode_bias, params.softcap)
            out[metadata.decode_rows] = decode_out[: len(metadata.decode_rows)]
        for prefill, query_rows in masks.prefills:
            kv = self._gather_kv(layer, prefill.block_ids)
            for chunks, rows in zip(prefill.chunk_batches, query_rows, strict=True):
                queries = qkv_rows.index_select(0, rows)
                out.index_copy_(
                    0,
                    chunks.out_rows,
                    self._prefill(queries, chunks, kv, num_heads // self.num_kv_heads, params.softcap),
                )
            del kv  # before the next is gathered, to limit peak memory
        return out

    def _prefill(
        self,
        queries: Tensor,
        chunks: PrefillChunkBatch,
        kv: Tensor,
        group_size: int,
        softcap: float | None,
    ) -> Tensor:
        """queries [chunks · kv_heads · padded query rows, width], kv [2, chunks · kv_heads, num_blocks,
        block_size, width] → [tokens of the chunks without padding, heads, width]."""
        chunk_len, num_kv_heads, num_blocks = chunks.chunk_len, self.num_kv_heads, chunks.num_blocks
        queries = queries.view(kv.shape[1], -1, self.padded_head_dim)
        keys, values = kv[:, :, chunks.first_block : chunks.first_block + num_blocks].unbind(0)
        scores = torch.bmm(queries, keys.flatten(1, 2).transpose(1, 2))
        if softcap is not None:
            softcap_(scores, softcap)
        masked_scores = scores[:, : chunk_len * group_size, chunks.first_key :].unflatten(
            1, (chunk_len, group_size)
        )
        masked_scores.unflatten(0, (-1, num_kv_heads)).add_(chunks.mask_bias)
        torch.softmax(scores, -1, out=scores)
        probs = scores.unflatten(2, (num_blocks, -1)).transpose(1, 2)
        out = _sum_probs_v(probs, values, chunks.pad_blocks)[:, : chunk_len * group_size]
        out_by_token = out.unflatten(1, (chunk_len, group_size)).unflatten(0, (-1, num_kv_heads))
        valid_out: Tensor = (
            out_by_token.transpose(1, 2).flatten(0, 1).flatten(1, 2).index_select(0, chunks.valid_rows)
        )
        return valid_out

    def _gather_kv(self, layer: int, block_ids: Tensor) -> Tensor:
        """block_ids [n, num_blocks] of a layer → float32 [2, n · kv_heads, num_blocks, block_size, width]."""
        kv = (
            self.blocks[layer]
            .index_select(1, block_ids.flatten())
            .unflatten(1, block_ids.shape)
            .transpose(2, 3)
        )
        return torch.empty(kv.shape).copy_(kv).flatten(1, 2)

    def _build_masks(self, metadata: _CPUAttentionMetadata, num_heads: int, window: int | None) -> _MaskCache:
        bias = (
            self._get_decode_attention(metadata, num_heads).build_bias(
                torch.tensor(metadata.decode_seq_lens), window
            )
            if metadata.decode_rows
            else []
        )
        prefills = PrefillBatch.split_prompts(metadata.prefills, self.block_size, num_heads, window)
        query_rows = [
            [self._query_rows(chunks, num_heads // self.num_kv_heads) for chunks in prefill.chunk_batches]
            for prefill in prefills
        ]
        return _MaskCache(bias, list(zip(prefills, query_rows, strict=True)))

    def _get_decode_attention(self, metadata: _CPUAttentionMetadata, num_heads: int) -> DecodeAttention:
        """Decode attention of the step's rows, reused from the previous step if their blocks are the same."""
        key = (metadata.decode_block_tables, metadata.decode_rows, metadata.num_padding, num_heads)
        if self._decode_attention is None or self._decode_key != key:
            sharing, token_rows = (
                BlockSharing.from_block_tables(metadata.decode_block_tables),
                torch.tensor(metadata.decode_rows),
            )
            self._decode_attention, self._decode_key = (
                DecodeAttention(self, sharing, token_rows, metadata.num_padding, num_heads),
                key,
            )
        return self._decode_attention

    def _query_rows(self, chunks: PrefillChunkBatch, group_size: int) -> Tensor:
        """Rows of qkv that hold the chunks' queries, [chunks · kv_heads · padded query rows].

        The last query is repeated up to a row count at which the bits of a matmul are reproducible.
        """
        token_rows, num_rows = chunks.token_rows.view(-1, chunks.chunk_len), chunks.chunk_len * group_size
        q_row = torch.arange(self.padded_gemm_rows(num_rows, MIN_SINGLE_ROWS)).clamp(max=num_rows - 1)
        head = torch.arange(self.num_kv_heads)[:, None] * group_size + q_row % group_size
        heads_per_token = self.num_kv_heads * (group_size + 2)
        return (token_rows[:, None, q_row // group_size] * heads_per_token + head).flatten()

    def _slot_mapping(self, batch: RaggedBatch) -> Tensor:
        num_blocks, num_kv_heads = self.blocks.shape[2], self.num_kv_heads
        side = torch.arange(2).view(1, 2, 1) * num_blocks
        head = torch.arange(num_kv_heads).view(1, 1, num_kv_heads)
        row = (side + batch.block_ids.view(-1, 1, 1)) * num_kv_heads + head
        return (row * self.block_size + batch.block_offsets.view(-1, 1, 1)).flatten()


def _sum_probs_v(probs: Tensor, values: Tensor, pad_blocks: int) -> Tensor:
    """Σ over blocks of probs · values, after `pad_blocks` blocks of zeros, [matrices, rows, width].

    probs [matrices, num_blocks, rows, block_size]; values [matrices, num_blocks, block_size, width]. Loops
    over the smaller of the first two dimensions, so that each batched matmul is large.
    """
    dim = 0 if probs.shape[1] < len(probs) else 1
    if dim == 0:
        probs, values = probs.transpose(0, 1), values.transpose(0, 1)
    shape = [*probs.shape[:3], values.shape[3]]
    shape[dim] += pad_blocks
    partials = values.new_empty(shape)
    padding, products = partials.split([pad_blocks, shape[dim] - pad_blocks], dim)
    padding.zero_()
    for p, v, out in zip(probs, values, products, strict=True):
        torch.bmm(p, v, out=out)
    return pairwise_sum(partials.transpose(0, dim))
