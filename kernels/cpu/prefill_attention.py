"""CPU chunked-prefill attention over a paged KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention_metadata import SequenceChunk
from ..reference.causal_mask import mask_bias

MAX_SCORES = 1 << 21
"""Maximum attention scores computed at once, so that scores and probabilities stay in the CPU's cache."""


@dataclass(frozen=True)
class PrefillChunk:
    """`num_tokens` tokens of prompt `prompt_index` from position `start` on; the first is the batch's `row`.

    block_ids: the blocks that it reads, from the prompt's block `first_block` on. pad_blocks: see
    `PrefillChunkBatch`.
    """

    prompt_index: int
    row: int
    start: int
    num_tokens: int
    first_block: int
    block_ids: list[int]

    @property
    def pad_blocks(self) -> int:
        return self.first_block % (1 << (len(self.block_ids) - 1).bit_length())


@dataclass(frozen=True)
class PrefillChunkBatch:
    """Prompt chunks that attend together, padded to the same number of tokens, with equally many blocks.

    token_rows [chunks · chunk_len]: batch rows of the tokens; the last of a chunk is repeated as padding.
    valid_rows: indices of the entries that are not padding; out_rows: their batch rows. first_block,
    num_blocks: the range of the gathered blocks that they read. pad_blocks: blocks of zeros before them, so
    that the pairwise sum pairs as if from block 0 on. mask_bias [chunks, 1, chunk_len, 1, keys]: 0 for a
    visible key, else MASK_VALUE, for the keys from `first_key` on; all earlier keys are visible.
    """

    chunk_len: int
    first_block: int
    num_blocks: int
    pad_blocks: int
    token_rows: Tensor
    valid_rows: Tensor
    out_rows: Tensor
    first_key: int
    mask_bias: Tensor

    @classmethod
    def from_chunks(
        cls, chunks: list[PrefillChunk], chunk_len: int, base_block: int, block_size: int, window: int | None
    ) -> PrefillChunkBatch:
        """Batch chunks of at most `chunk_len` tokens that read equally many blocks.

        base_block: index of the first gathered block.
        """
        num_blocks, num_tokens = (
            len(chunks[0].block_ids),
            torch.tensor([chunk.num_tokens for chunk in chunks])[:, None],
        )
        starts = torch.tensor([chunk.start - chunk.first_block * block_size for chunk in chunks])[:, None]
        first_key = 0 if window is not None else int(starts.min()) // block_size * block_size
        offsets = torch.arange(chunk_len)
        clamped_offsets = torch.minimum(offsets, num_tokens - 1)
        token_rows = (torch.tensor([chunk.row for chunk in chunks])[:, None] + clamped_offsets).flatten()
        valid_rows = (offsets < num_tokens).flatten().nonzero().flatten()
        key_pos = torch.arange(first_key, num_blocks * block_size)
        return cls(
            chunk_len=chunk_len,
            first_block=chunks[0].first_block - base_block,
            num_blocks=num_blocks,
            pad_blocks=chunks[0].pad_blocks,
            token_rows=token_rows,
            valid_rows=valid_rows,
            out_rows=token_rows[valid_rows],
            first_key=first_key,
            mask_bias=mask_bias(key_pos, (starts + clamped_offsets)[:, :, None], window)[:, None, :, None],
        )


@dataclass(frozen=True)
class PrefillBatch:
    """Chunk batches that attend in turn over the same gathered KV blocks, block_ids [n, num_blocks]."""

    block_ids: Tensor
    chunk_batches: list[PrefillChunkBatch]

    @classmethod
    def split_prompts(
        cls, prompts: list[tuple[int, SequenceChunk]], block_size: int, num_heads: int, window: int | None
    ) -> list[PrefillBatch]:
        """prompts: (first batch row, chunk). Short prompts attend together, a long one chunk by chunk."""
        batches, single_chunks = list[PrefillBatch](), dict[int, list[tuple[int, PrefillChunk]]]()
        for chunk_len, chunks in _batch_chunks(prompts, block_size, num_heads, window):
            if len(chunks) == 1:
                single_chunks.setdefault(chunks[0].prompt_index, []).append((chunk_len, chunks[0]))
            else:
                block_ids = torch.tensor([chunk.block_ids for chunk in chunks])
                batches.append(
                    cls(
                        block_ids,
                        [
                            PrefillChunkBatch.from_chunks(
                                chunks, chunk_len, chunks[0].first_block, block_size, window
                            )
                        ],
                    )
                )
        for prompt_index, sized_chunks in single_chunks.items():
            first_block = min(chunk.first_block for _, chunk in sized_chunks)
            end_block = max(chunk.first_block + len(chunk.block_ids) for _, chunk in sized_chunks)
            block_ids = torch.tensor([prompts[prompt_index][1].block_table[first_block:end_block]])
            chunk_batches = [
                PrefillChunkBatch.from_chunks([chunk], size, first_block, block_size, window)
                for size, chunk in sized_chunks
            ]
            batches.append(cls(block_ids, chunk_batches))
        return batches


def _batch_chunks(
    prompts: list[tuple[int, SequenceChunk]], block_size: int, num_heads: int, window: int | None
) -> Iterator[tuple[int, list[PrefillChunk]]]:
    """Yield (padded chunk length, chunks of about that length that read equally many blocks).

    A chunk ends at the next block boundary, so that few of its scores are of later, masked keys, or earlier,
    so that a batch's scores stay in the CPU's cache.
    """
    batches: dict[tuple[int, int, int], list[PrefillChunk]] = {}
    for prompt_index, (row, prompt) in enumerate(prompts):
        seq_len, num_done = prompt.num_computed + prompt.num_new, 0
        while num_done < prompt.num_new:
            start = prompt.num_computed + num_done
            max_chunk = max(1, MAX_SCORES // (num_heads * seq_len))
            num_tokens = min(max_chunk, prompt.num_new - num_done, block_size - start % block_size)
            first_block = 0 if window is None else max(0, start - window + 1) // block_size
            block_ids = prompt.block_table[first_block : (start + num_tokens - 1) // block_size + 1]
            chunk = PrefillChunk(prompt_index, row + num_done, start, num_tokens, first_block, block_ids)
            batches.setdefault(
                (len(block_ids), chunk.pad_blocks, min(max_chunk, round_up_chunk(num_tokens))), []
            ).append(chunk)
            num_done += num_tokens
    for (num_blocks, _, chunk_len), chunks in batches.items():
        max_batch = max(1, MAX_SCORES // (num_heads * chunk_len * num_blocks * block_size))
        for i in range(0, len(chunks), max_batch):
            yield chunk_len, chunks[i : i + max_batch]


def round_up_chunk(num_tokens: int) -> int:
    """Padded length of a chunk: lengths are a quarter apart, so that many chunks have the same."""
    step = max(16, 1 << max(0, (num_tokens - 1).bit_length() - 3))
    return -(-num_tokens // step) * step
