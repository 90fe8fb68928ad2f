"""Attention over the paged cache is dense attention over each branch's own tokens, whoever else is there."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad
from trimtab.kernels.attention_metadata import Batch, Segment
from trimtab.kernels.cpu import block_pool
from trimtab.kernels.cpu.paged_kv_cache import PagedKV
from trimtab.kernels.reference.rotary import Turns

from ...helpers.invariance_marks import steady

exactly = settings(deadline=None, derandomize=True, max_examples=8)
LAYERS = 2
SHAPES = [(9, 3, 64), (4, 4, 9), (7, 1, 41), (2, 2, 8)]
"""heads, heads of keys and values, head_dim."""


@dataclass
class Branch:
    """One branch and, per layer, what it was given: q, k, v [tokens, heads, head_dim]."""

    seed: int
    pages: list[int] = field(default_factory=list)
    shared: int = 0
    given: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    done: int = 0
    ill: bool = False


class World:
    """A cache whose pages are NaN until written, and the branches that use it."""

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
        pages = 100 + 9000 // block_size
        self.cache = PagedKV(LAYERS, pages, block_size, kv_heads, head_dim, dtype, torch.device("cpu"))
        self.cache.pages.fill_(torch.nan)
        self.free = list(range(pages))
        random.Random(0).shuffle(self.free)

    def enter(
        self,
        seed: int,
        tokens: int,
        like: Branch | None = None,
        shared: int = 0,
        ill: bool = False,
    ) -> Branch:
        """A branch of up to `tokens` tokens; the first `shared`, whole pages, are those of `like`."""
        branch = Branch(seed, shared=shared, done=shared, ill=ill)
        generator = torch.Generator().manual_seed(seed)
        for layer in range(LAYERS):
            q, k, v = (torch.randn(tokens, n, self.head_dim, generator=generator) for n in self.sizes)
            k, v = (part.to(self.cache.pages.dtype).float() for part in (k, v))
            if like is not None:
                k[:shared], v[:shared] = (part[:shared] for part in like.given[layer][1:])
            branch.given.append((2 * q, k * torch.nan if ill else k, v * torch.nan if ill else v))
        size = self.cache.block_size
        branch.pages = like.pages[: shared // size] if like is not None else []
        own = [self.free.pop() for _ in range(-(-tokens // size) - shared // size)]
        self.cache.clear(own)
        branch.pages += own
        return branch

    def unturned(self, rows: int) -> Turns:
        """Nothing is turned, and queries are scaled."""
        cos = torch.ones(rows, self.head_dim)
        return Turns(cos, torch.zeros_like(cos), *self.sizes[:2], self.head_dim**-0.5)

    def leave(self, branch: Branch) -> None:
        """Gives the branch's own pages back as they are."""
        self.free += branch.pages[branch.shared // self.cache.block_size :]

    def step(self, *shares: tuple[Branch, int], window: int | None = None) -> list[list[Tensor]]:
        """Computes the next tokens of each branch; [branch][layer] → [count, heads, head_dim]."""
        segments = [Segment(b.done, count, b.pages) for b, count in shares]
        padding = sum(count for _, count in shares) % 3
        self.cache.begin(Batch.of(segments, self.cache.block_size, padding))
        outputs: list[list[Tensor]] = [[] for _ in shares]
        for layer in range(LAYERS):
            q, k, v = (
                torch.cat([b.given[layer][i][b.done : b.done + count] for b, count in shares])
                for i in range(3)
            )
            qkv = pad(torch.cat((q, k, v), 1), (0, 0, 0, 0, 0, padding), value=torch.nan)
            out = self.cache.attend(layer, qkv, self.unturned(len(qkv)), window=window)
            assert out.shape == (len(q) + padding, self.sizes[0] * self.head_dim)
            parts = out[: len(q)].unflatten(1, (self.sizes[0], -1)).split([count for _, count in shares])
            for found, part in zip(outputs, parts, strict=True):
                found.append(part.clone())
        for branch, count in shares:
            branch.done += count
        return outputs


def dense(
    branch: Branch, layer: int, start: int, count: int, dtype: torch.dtype, window: int | None = None
) -> Tensor:
    """Causal attention of `count` tokens after `start` over all in their window, by its definition."""
    q, k, v = (part.to(dtype) for part in branch.given[layer])
    q, k, v = q[start : start + count], k[: start + count], v[: start + count]
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    hidden = torch.ones(count, start + count, dtype=torch.bool).triu(start + 1)
    if window is not None:
        hidden |= torch.ones(count, start + count, dtype=torch.bool).tril(start - window)
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def assert_dense(branch: Branch, outputs: list[Tensor], count: int, window: int | None = None) -> None:
    """The last `count` tokens' outputs are within twice float32's own error of float64, plus 1e-5."""
    for layer, got in enumerate(outputs):
        exact = dense(branch, layer, branch.done - count, count, torch.float64, window)
        rough = dense(branch, layer, branch.done - count, count, torch.float32, window)
        allowed = 2 * (rough.double() - exact).abs().max() + 1e-5
        assert float((got.double() - exact).abs().max()) <= float(allowed)  # not so where it is NaN


@exactly
@given(
    shape=st.sampled_from(SHAPES),
    block_size=st.sampled_from((16, 48, 64)),
    window=st.sampled_from((None, 1, 20, 100)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 2**32),
)
def test_any_course_of_steps_is_dense_attention(
    shape: tuple[int, int, int], block_size: int, window: int | None, dtype: torch.dtype, seed: int
) -> None:
    """Chunks, decoding, shared heads, windows, types, and pages left full of NaN."""
    world, choose = World(*shape, block_size, dtype), random.Random(seed)
    running: dict[int, Branch] = {}
    for step in range(30):
        shares = []
        for place in choose.sample(range(5), 5):
            branch = running.get(place)
            if branch is not None and (branch.done >= len(branch.given[0][0]) or choose.random() < 0.02):
                if branch.ill:
                    world.leave(branch)
                del running[place]
                branch = None
            if branch is None and choose.random() < 0.3:
                others = [b for b in running.values() if not b.ill and b.done]
                like = choose.choice(others) if others and choose.random() < 0.6 else None
                whole = like.done // block_size if like else 0
                shared = block_size * choose.randint(0, whole)
                tokens = shared + choose.randint(1, 200)
                ill = like is None and choose.random() < 0.3
                branch = running[place] = world.enter(100 * step + place, tokens, like, shared, ill)
            if branch is not None and choose.random() < 0.85:
                left = len(branch.given[0][0]) - branch.done
                count = 1 if branch.done and choose.random() < 0.7 else choose.randint(1, 140)
                shares.append((branch, min(count, left)))
        if shares:
            outputs = world.step(*shares, window=window)
            for (branch, count), found in zip(shares, outputs, strict=True):
                if not branch.ill:
                    assert_dense(branch, found, count, window)


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_across_the_border_of_a_page_is_dense_attention(shape: tuple[int, int, int]) -> None:
    world = World(*shape, block_size=64)
    branches = [world.enter(seed, 140) for seed in range(3)]
    world.step(*((branch, 64 - 3 - branch.seed) for branch in branches))
    for _ in range(8):
        for branch, outputs in zip(branches, world.step(*((b, 1) for b in branches)), strict=True):
            assert_dense(branch, outputs, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_first_step_of_one_token_sees_the_shared_head(shape: tuple[int, int, int]) -> None:
    world = World(*shape)
    first = world.enter(0, 161)
    world.step((first, 160))
    second = world.enter(1, 145, first, 144)
    assert_dense(second, world.step((second, 1))[0], 1)
    third = world.enter(2, 1)
    for branch, outputs in zip((third, first), world.step((third, 1), (first, 1)), strict=True):
        assert_dense(branch, outputs, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_pages_left_full_of_nan_do_not_leak(shape: tuple[int, int, int]) -> None:
    world = World(*shape)
    ill = world.enter(0, 400, ill=True)
    well = world.enter(1, 140)
    world.step((ill, 399), (well, 120))
    assert_dense(well, world.step((ill, 1), (well, 1))[1], 1)
    world.leave(ill)
    after = world.enter(2, 140)
    assert set(after.pages) & set(ill.pages), "the new branch has pages of the ill one"
    assert_dense(after, world.step((after, 120), (well, 1))[0], 120)
    for _ in range(15):
        for branch, outputs in zip((after, well), world.step((after, 1), (well, 1)), strict=True):
            assert_dense(branch, outputs, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_pages_may_be_exchanged(shape: tuple[int, int, int]) -> None:
    world = World(*shape)
    branch = world.enter(0, 60)
    world.step((branch, 50))
    free = world.free.pop()
    world.cache.swap([(branch.pages[1], free), (branch.pages[3], branch.pages[0])])
    branch.pages = [branch.pages[3], free, branch.pages[2], branch.pages[0]]
    assert_dense(branch, world.step((branch, 1))[0], 1)
    assert_dense(branch, world.step((branch, 5))[0], 5)


def whole(
    branch: Branch, course: list[int], world: World, *others: Branch, window: int | None = None
) -> list[Tensor]:
    """A branch's outputs, by layer, its tokens in pieces, beside others that take one token each."""
    steps = [world.step((branch, n), *((other, 1) for other in others), window=window)[0] for n in course]
    return [torch.cat([outputs[layer] for outputs in steps]) for layer in range(LAYERS)]


@pytest.mark.parametrize(
    ("block_size", "dtype"), [(16, torch.float32), (64, torch.float32), (32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 40])
@steady
def test_a_token_has_the_same_bits_however_the_prompt_is_cut(
    shape: tuple[int, int, int], block_size: int, dtype: torch.dtype, window: int | None
) -> None:
    length = 128 + 12
    cuts = ([length], [1] * length, [2, 3, 128 - 9, 1, 1, length - 128 + 2], [length - 1, 1])
    found = []
    for course in cuts:
        world = World(*shape, block_size, dtype)
        found.append(whole(world.enter(7, length), course, world, window=window))
    for course, layers in zip(cuts, found, strict=True):
        for got, expected in zip(layers, found[0], strict=True):
            assert torch.equal(got, expected), course


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("others", [1, 2, 3, 11])
@steady
def test_a_token_has_the_same_bits_whoever_shares_its_head(shape: tuple[int, int, int], others: int) -> None:
    def course(sharing: int) -> list[Tensor]:
        world = World(*shape)
        branch = world.enter(9, 110)
        before = whole(branch, [100], world)
        beside = [world.enter(at, 96 + at + 9, branch, 16 * (at % 7)) for at in range(sharing)]
        for other in beside:
            world.step((other, len(other.given[0][0]) - 9 - other.done))
        after = whole(branch, [1, 1, 3, 1], world, *beside)
        return [torch.cat(parts) for parts in zip(before, after, strict=True)]

    for shared, alone in zip(course(others), course(0), strict=True):
        assert torch.equal(shared, alone)


def decoded(
    shape: tuple[int, int, int], dtype: torch.dtype, length: int, others: list[int], first: bool
) -> Tensor:
    """The decoding steps of one branch beside others of these lengths, before or after them."""
    world, steps = World(*shape, dtype=dtype), 6
    world.free.sort(reverse=first)
    branch = world.enter(99, length + steps)
    beside = [world.enter(at, long + steps) for at, long in enumerate(others)]
    world.step((branch, length), *zip(beside, others, strict=True))
    group = [branch, *beside] if first else [*beside, branch]
    found = [world.step(*((b, 1) for b in group))[group.index(branch)] for _ in range(steps)]
    return torch.stack([torch.stack(layers) for layers in found])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [5, 125, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@steady
def test_a_decoded_token_has_the_same_bits_whatever_its_neighbours(
    shape: tuple[int, int, int], length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_pool, "BUFFER", 1 << 14)  # several buffers a step
    alone = decoded(shape, dtype, length, [], True)
    for others in ([7], [400], [40, 128, 300, 3], [10 + 31 * at for at in range(1, 12)]):
        for first in (True, False):
            assert torch.equal(decoded(shape, dtype, length, others, first), alone), (others, first)


@pytest.mark.parametrize("shape", SHAPES)
@steady
def test_a_decoded_token_has_the_same_bits_while_a_neighbour_is_prefilled(
    shape: tuple[int, int, int],
) -> None:
    def last(neighbour: bool) -> list[Tensor]:
        world = World(*shape)
        branch, other = world.enter(0, 131), world.enter(1, 200)
        world.step((branch, 126))
        for _ in range(4):
            world.step((branch, 1), *(((other, 50),) if neighbour else ()))
        return world.step((branch, 1))[0]

    for with_one, without in zip(last(True), last(False), strict=True):
        assert torch.equal(with_one, without)
