"""Attention over the paged KV cache equals dense attention of each branch, whatever the batch."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad
from trimtab.kernels.attention_metadata import RaggedBatch, SequenceChunk
from trimtab.kernels.attention_params import CAUSAL, AttentionParams
from trimtab.kernels.cpu import block_pool
from trimtab.kernels.cpu.paged_kv_cache import CPUPagedKVCache
from trimtab.kernels.reference.rotary import RotaryCosSin

from ...helpers.invariance_marks import batch_invariant_cpu

property_settings = settings(deadline=None, derandomize=True, max_examples=8)
LAYERS = 2
SHAPES = [(9, 3, 64), (4, 4, 9), (7, 1, 41), (2, 2, 8)]
"""(num_heads, num_kv_heads, head_dim)."""


@dataclass
class Branch:
    """One branch and its inputs per layer: q, k, v [tokens, heads, head_dim]."""

    seed: int
    block_table: list[int] = field(default_factory=list)
    num_shared: int = 0
    qkv: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    num_computed: int = 0
    is_nan: bool = False


class CacheHarness:
    """A cache whose blocks are NaN until written, and the branches that use it."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.sizes = (heads, kv_heads, kv_heads)
        self.head_dim = head_dim
        num_blocks = 100 + 9000 // block_size
        self.cache = CPUPagedKVCache(
            LAYERS, num_blocks, block_size, kv_heads, head_dim, dtype, torch.device("cpu")
        )
        self.cache.blocks.fill_(torch.nan)
        self.free = list(range(num_blocks))
        random.Random(0).shuffle(self.free)

    def add_branch(
        self,
        seed: int,
        num_tokens: int,
        prefix_of: Branch | None = None,
        num_shared: int = 0,
        is_nan: bool = False,
    ) -> Branch:
        """Add a branch of up to `num_tokens` tokens; the first `num_shared`, in full blocks, are shared with
        `prefix_of`.
        """
        branch = Branch(seed, num_shared=num_shared, num_computed=num_shared, is_nan=is_nan)
        generator = torch.Generator().manual_seed(seed)
        for layer in range(LAYERS):
            q, k, v = (torch.randn(num_tokens, n, self.head_dim, generator=generator) for n in self.sizes)
            k, v = (tensor.to(self.cache.blocks.dtype).float() for tensor in (k, v))
            if prefix_of is not None:
                k[:num_shared], v[:num_shared] = (part[:num_shared] for part in prefix_of.qkv[layer][1:])
            branch.qkv.append((2 * q, k * torch.nan if is_nan else k, v * torch.nan if is_nan else v))
        size = self.cache.block_size
        branch.block_table = prefix_of.block_table[: num_shared // size] if prefix_of is not None else []
        new_blocks = [self.free.pop() for _ in range(-(-num_tokens // size) - num_shared // size)]
        self.cache.zero_blocks(new_blocks)
        branch.block_table += new_blocks
        return branch

    def identity_rotary(self, rows: int) -> RotaryCosSin:
        """No rotation; queries are scaled."""
        cos = torch.ones(rows, self.head_dim)
        return RotaryCosSin(cos, torch.zeros_like(cos), *self.sizes[:2], self.head_dim**-0.5)

    def free_branch(self, branch: Branch) -> None:
        """Free the branch's unshared blocks without zeroing them."""
        self.free += branch.block_table[branch.num_shared // self.cache.block_size :]

    def step(self, *chunks: tuple[Branch, int], params: AttentionParams = CAUSAL) -> list[list[Tensor]]:
        """Compute the next tokens of each branch; [branch][layer] → [count, heads, head_dim]."""
        sequence_chunks = [SequenceChunk(b.num_computed, count, b.block_table) for b, count in chunks]
        padding = sum(count for _, count in chunks) % 3
        self.cache.prepare(RaggedBatch.from_chunks(sequence_chunks, self.cache.block_size, padding))
        outputs: list[list[Tensor]] = [[] for _ in chunks]
        for layer in range(LAYERS):
            q, k, v = (
                torch.cat([b.qkv[layer][i][b.num_computed : b.num_computed + count] for b, count in chunks])
                for i in range(3)
            )
            qkv = pad(torch.cat((q, k, v), 1), (0, 0, 0, 0, 0, padding), value=torch.nan)
            out = self.cache.forward(layer, qkv, self.identity_rotary(len(qkv)), params=params)
            assert out.shape == (len(q) + padding, self.sizes[0] * self.head_dim)
            parts = out[: len(q)].unflatten(1, (self.sizes[0], -1)).split([count for _, count in chunks])
            for layers, part in zip(outputs, parts, strict=True):
                layers.append(part.clone())
        for branch, count in chunks:
            branch.num_computed += count
        return outputs


def dense_attention(
    branch: Branch, layer: int, start: int, count: int, dtype: torch.dtype, params: AttentionParams = CAUSAL
) -> Tensor:
    """Causal or sliding-window attention of `count` tokens from `start` on, by definition."""
    q, k, v = (tensor.to(dtype) for tensor in branch.qkv[layer])
    q, k, v = q[start : start + count], k[: start + count], v[: start + count]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    if params.softcap is not None:
        scores = params.softcap * torch.tanh(scores / params.softcap)
    hidden = torch.ones(count, start + count, dtype=torch.bool).triu(start + 1)
    if params.window is not None:
        hidden |= torch.ones(count, start + count, dtype=torch.bool).tril(start - params.window)
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def assert_dense(branch: Branch, outputs: list[Tensor], count: int, params: AttentionParams = CAUSAL) -> None:
    """The last `count` tokens' errors against float64 are at most twice those of float32, plus 1e-5."""
    for layer, got in enumerate(outputs):
        exact = dense_attention(branch, layer, branch.num_computed - count, count, torch.float64, params)
        rough = dense_attention(branch, layer, branch.num_computed - count, count, torch.float32, params)
        allowed = 2 * (rough.double() - exact).abs().max() + 1e-5
        assert float((got.double() - exact).abs().max()) <= float(allowed)  # false for NaN


@property_settings
@given(
    shape=st.sampled_from(SHAPES),
    block_size=st.sampled_from((16, 48, 64)),
    params=st.builds(
        AttentionParams, st.sampled_from((None, 1, 20, 100)), st.sampled_from((None, 0.8, 30.0))
    ),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 2**32),
)
def test_any_sequence_of_steps_equals_dense_attention(
    shape: tuple[int, int, int], block_size: int, params: AttentionParams, dtype: torch.dtype, seed: int
) -> None:
    """Chunked prefill, decode, shared prefixes, windows, dtypes, and stale blocks full of NaN."""
    harness, rng = CacheHarness(*shape, block_size, dtype), random.Random(seed)
    running: dict[int, Branch] = {}
    for step in range(30):
        chunks = []
        for slot in rng.sample(range(5), 5):
            branch = running.get(slot)
            if branch is not None and (branch.num_computed >= len(branch.qkv[0][0]) or rng.random() < 0.02):
                if branch.is_nan:
                    harness.free_branch(branch)
                del running[slot]
                branch = None
            if branch is None and rng.random() < 0.3:
                others = [b for b in running.values() if not b.is_nan and b.num_computed]
                like = rng.choice(others) if others and rng.random() < 0.6 else None
                num_full_blocks = like.num_computed // block_size if like else 0
                shared = block_size * rng.randint(0, num_full_blocks)
                tokens = shared + rng.randint(1, 200)
                ill = like is None and rng.random() < 0.3
                branch = running[slot] = harness.add_branch(100 * step + slot, tokens, like, shared, ill)
            if branch is not None and rng.random() < 0.85:
                remaining = len(branch.qkv[0][0]) - branch.num_computed
                count = 1 if branch.num_computed and rng.random() < 0.7 else rng.randint(1, 140)
                chunks.append((branch, min(count, remaining)))
        if chunks:
            outputs = harness.step(*chunks, params=params)
            for (branch, count), layers in zip(chunks, outputs, strict=True):
                if not branch.is_nan:
                    assert_dense(branch, layers, count, params)


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_across_a_block_boundary_equals_dense_attention(shape: tuple[int, int, int]) -> None:
    harness = CacheHarness(*shape, block_size=64)
    branches = [harness.add_branch(seed, 140) for seed in range(3)]
    harness.step(*((branch, 64 - 3 - branch.seed) for branch in branches))
    for _ in range(8):
        for branch, outputs in zip(branches, harness.step(*((b, 1) for b in branches)), strict=True):
            assert_dense(branch, outputs, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_first_step_of_one_token_attends_to_the_shared_prefix(shape: tuple[int, int, int]) -> None:
    harness = CacheHarness(*shape)
    first = harness.add_branch(0, 161)
    harness.step((first, 160))
    second = harness.add_branch(1, 145, first, 144)
    assert_dense(second, harness.step((second, 1))[0], 1)
    third = harness.add_branch(2, 1)
    for branch, outputs in zip((third, first), harness.step((third, 1), (first, 1)), strict=True):
        assert_dense(branch, outputs, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_stale_blocks_full_of_nan_do_not_leak(shape: tuple[int, int, int]) -> None:
    harness = CacheHarness(*shape)
    ill = harness.add_branch(0, 400, is_nan=True)
    well = harness.add_branch(1, 140)
    harness.step((ill, 399), (well, 120))
    assert_dense(well, harness.step((ill, 1), (well, 1))[1], 1)
    harness.free_branch(ill)
    after = harness.add_branch(2, 140)
    assert set(after.block_table) & set(ill.block_table), "the new branch reuses no block of the freed one"
    assert_dense(after, harness.step((after, 120), (well, 1))[0], 120)
    for _ in range(15):
        for branch, outputs in zip((after, well), harness.step((after, 1), (well, 1)), strict=True):
            assert_dense(branch, outputs, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_may_be_swapped(shape: tuple[int, int, int]) -> None:
    harness = CacheHarness(*shape)
    branch = harness.add_branch(0, 60)
    harness.step((branch, 50))
    free = harness.free.pop()
    harness.cache.swap_blocks([(branch.block_table[1], free), (branch.block_table[3], branch.block_table[0])])
    branch.block_table = [branch.block_table[3], free, branch.block_table[2], branch.block_table[0]]
    assert_dense(branch, harness.step((branch, 1))[0], 1)
    assert_dense(branch, harness.step((branch, 5))[0], 5)


def run_chunks(
    branch: Branch,
    chunk_sizes: list[int],
    harness: CacheHarness,
    *others: Branch,
    params: AttentionParams = CAUSAL,
) -> list[Tensor]:
    """A branch's outputs by layer, computed in chunks, batched with others that decode one token each."""
    steps = [
        harness.step((branch, n), *((other, 1) for other in others), params=params)[0] for n in chunk_sizes
    ]
    return [torch.cat([outputs[layer] for outputs in steps]) for layer in range(LAYERS)]


@pytest.mark.parametrize(
    ("block_size", "dtype"), [(16, torch.float32), (64, torch.float32), (32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("params", [CAUSAL, AttentionParams(40), AttentionParams(softcap=1.5)], ids=str)
@batch_invariant_cpu
def test_a_token_has_the_same_bits_for_any_prefill_chunks(
    shape: tuple[int, int, int], block_size: int, dtype: torch.dtype, params: AttentionParams
) -> None:
    length = 128 + 12
    splits = ([length], [1] * length, [2, 3, 128 - 9, 1, 1, length - 128 + 2], [length - 1, 1])
    results = []
    for chunk_sizes in splits:
        harness = CacheHarness(*shape, block_size, dtype)
        results.append(run_chunks(harness.add_branch(7, length), chunk_sizes, harness, params=params))
    for chunk_sizes, layers in zip(splits, results, strict=True):
        for got, expected in zip(layers, results[0], strict=True):
            assert torch.equal(got, expected), chunk_sizes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("others", [1, 2, 3, 11])
@batch_invariant_cpu
def test_a_token_has_the_same_bits_whoever_shares_its_prefix(
    shape: tuple[int, int, int], others: int
) -> None:
    def run_beside(sharing: int) -> list[Tensor]:
        harness = CacheHarness(*shape)
        branch = harness.add_branch(9, 110)
        before = run_chunks(branch, [100], harness)
        beside = [harness.add_branch(at, 96 + at + 9, branch, 16 * (at % 7)) for at in range(sharing)]
        for other in beside:
            harness.step((other, len(other.qkv[0][0]) - 9 - other.num_computed))
        after = run_chunks(branch, [1, 1, 3, 1], harness, *beside)
        return [torch.cat(parts) for parts in zip(before, after, strict=True)]

    for shared, alone in zip(run_beside(others), run_beside(0), strict=True):
        assert torch.equal(shared, alone)


def decode_outputs(
    shape: tuple[int, int, int], dtype: torch.dtype, length: int, others: list[int], first: bool
) -> Tensor:
    """Decode outputs of one branch batched with others of these lengths, before or after them."""
    harness, steps = CacheHarness(*shape, dtype=dtype), 6
    harness.free.sort(reverse=first)
    branch = harness.add_branch(99, length + steps)
    neighbours = [harness.add_branch(at, long + steps) for at, long in enumerate(others)]
    harness.step((branch, length), *zip(neighbours, others, strict=True))
    group = [branch, *neighbours] if first else [*neighbours, branch]
    outputs = [harness.step(*((b, 1) for b in group))[group.index(branch)] for _ in range(steps)]
    return torch.stack([torch.stack(layers) for layers in outputs])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [5, 125, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@batch_invariant_cpu
def test_a_decoded_token_has_the_same_bits_whatever_its_neighbours(
    shape: tuple[int, int, int], length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_pool, "BUFFER_NUMEL", 1 << 14)  # several matmuls per step
    alone = decode_outputs(shape, dtype, length, [], True)
    for others in ([7], [400], [40, 128, 300, 3], [10 + 31 * at for at in range(1, 12)]):
        for first in (True, False):
            assert torch.equal(decode_outputs(shape, dtype, length, others, first), alone), (others, first)


@pytest.mark.parametrize("shape", SHAPES)
@batch_invariant_cpu
def test_a_decoded_token_has_the_same_bits_while_a_neighbour_is_prefilled(
    shape: tuple[int, int, int],
) -> None:
    def last(neighbour: bool) -> list[Tensor]:
        harness = CacheHarness(*shape)
        branch, other = harness.add_branch(0, 131), harness.add_branch(1, 200)
        harness.step((branch, 126))
        for _ in range(4):
            harness.step((branch, 1), *(((other, 50),) if neighbour else ()))
        return harness.step((branch, 1))[0]

    for with_one, without in zip(last(True), last(False), strict=True):
        assert torch.equal(with_one, without)
