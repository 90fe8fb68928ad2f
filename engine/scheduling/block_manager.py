"""The blocks of the KV cache: owners, prefix cache, and all-or-nothing allocation for a group.

A full page is known by the hash of its tokens and of all before them, so that whoever begins with the same
tokens finds it: the branches of one request, the same prompt of another, the next turn of a conversation.
A page that nobody holds any more keeps what it holds until its room is needed, the least recently used first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ..sequence.sequence import Branch, SequenceGroup


class BlockManager:
    """A pool of `num_blocks` pages of `block_size` tokens, counted by reference.

    enable_caching: keep the pages of what has ended for whoever begins alike. Without it pages are shared
    only among branches that run at the same time.
    keep_dense: keep what is held at the beginning of the pool, which is read as it lies up to there on a CPU.
    blocks_to_zero: pages given out that must be cleared before their first use; whoever does so empties the
    list. num_cached_tokens: how many tokens branches did not have to compute, since their pages were known.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_caching: bool = True, keep_dense: bool = True
    ) -> None:
        self.num_blocks, self.block_size, self.enable_caching, self.keep_dense = (
            num_blocks,
            block_size,
            enable_caching,
            keep_dense,
        )
        self.blocks_to_zero: list[int] = []
        self.num_cached_tokens = 0
        self.reset([])

    def reset(self, groups: Iterable[SequenceGroup]) -> None:
        """Frees every page and knows none any more, in whatever state an interruption has left them.

        groups: all who may hold any; they stand at their beginning again.
        """
        for group in groups:
            for branch in group.branches:
                branch.block_table, branch.num_computed_tokens = [], 0
        self._free_heap = list(range(self.num_blocks))  # a heap: what is given out lies at the beginning
        self._lru: OrderedDict[int, None] = OrderedDict()  # held by nobody, but known by hash; oldest first
        self._ref_counts = [0] * self.num_blocks
        self._hash_of_block: dict[int, bytes] = {}
        self._block_of_hash: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """How many pages nobody holds."""
        return len(self._free_heap) + len(self._lru)

    def num_blocks_for(self, num_tokens: int) -> int:
        """How many pages hold so many tokens of a branch."""
        return -(-num_tokens // self.block_size)

    def blocks_needed(self, group: SequenceGroup) -> int:
        """Pages to begin with: those of all its tokens, shared ones counted once and held ones not at all."""
        return self._count_blocks(group, len(group.output_ids), self._is_referenced)

    def max_blocks(self, group: SequenceGroup) -> int:
        """Pages of its longest answer, shared ones counted once; an answer's last token is never computed."""
        return self._count_blocks(group, group.max_new_tokens - 1, lambda key: False)

    def _count_blocks(
        self, group: SequenceGroup, output_len: int, is_allocated: Callable[[bytes], bool]
    ) -> int:
        seen, count = set[bytes](), 0
        for branch in group.branches:
            num_tokens = len(branch.prompt_token_ids) + len(group.output_ids)
            final_len = len(branch.prompt_token_ids) + output_len
            shareable = self._block_hashes(group, branch, (num_tokens - 1) // self.block_size)
            new_hashes = [
                block_hash
                for block_hash in shareable
                if block_hash not in seen and not is_allocated(block_hash)
            ]
            seen.update(new_hashes)
            count += len(new_hashes) + self.num_blocks_for(final_len) - len(shareable)
        return count

    def take_cached(self, group: SequenceGroup, branch: Branch, pending_hashes: set[bytes]) -> bool:
        """Gives a branch that stands at the end of a page the known pages that come next.

        One token at least is left to compute. Returns False when the page after that is among
        `pending_hashes`: one that another branch is computing.
        """
        num_tokens = len(branch.prompt_token_ids) + len(group.output_ids)
        while (
            branch.num_computed_tokens
            == len(branch.block_table) * self.block_size
            < num_tokens - self.block_size
        ):
            block_hash = self._block_hashes(group, branch, len(branch.block_table) + 1)[-1]
            block = self._block_of_hash.get(block_hash)
            if block is None:
                return block_hash not in pending_hashes
            self._touch(block)
            branch.block_table.append(block)
            branch.num_computed_tokens += self.block_size
            self.num_cached_tokens += self.block_size
        return True

    def hashes_to_fill(self, group: SequenceGroup, branch: Branch, num_new: int) -> Iterable[bytes]:
        """The pages that the branch's next `num_new` tokens fill, but for its last token."""
        num_tokens = len(branch.prompt_token_ids) + len(group.output_ids)
        num_full = min(branch.num_computed_tokens + num_new, num_tokens - 1) // self.block_size
        return self._block_hashes(group, branch, num_full)[branch.num_computed_tokens // self.block_size :]

    def allocate(self, scheduled: Sequence[tuple[Branch, int]]) -> bool:
        """Gives each branch the pages for so many more tokens; or changes nothing."""
        num_missing = [
            self.num_blocks_for(b.num_computed_tokens + count) - len(b.block_table) for b, count in scheduled
        ]
        if sum(max(0, count) for count in num_missing) > self.num_free_blocks:
            return False
        for (branch, _), count in zip(scheduled, num_missing, strict=True):
            for _ in range(count):
                branch.block_table.append(self._pop_free())
        return True

    def cache_full_blocks(self, group: SequenceGroup, branch: Branch, num_new: int) -> None:
        """The branch's next `num_new` tokens have been computed: what they filled can be found from now
        on.
        """
        prev_full = branch.num_computed_tokens // self.block_size
        branch.num_computed_tokens += num_new
        num_full = branch.num_computed_tokens // self.block_size
        if num_full == prev_full:
            return
        for block_hash, block in zip(
            self._block_hashes(group, branch, num_full)[prev_full:],
            branch.block_table[prev_full:num_full],
            strict=True,
        ):
            if block_hash not in self._block_of_hash:
                self._block_of_hash[block_hash], self._hash_of_block[block] = block, block_hash

    def free(self, group: SequenceGroup) -> None:
        """Takes the group's pages back; it stands at its beginning again."""
        for branch in group.branches:
            for block in reversed(
                branch.block_table
            ):  # the ends of texts are forgotten before their beginnings
                self._ref_counts[block] -= 1
                if not self._ref_counts[block]:
                    self._free_block(block)
            branch.block_table, branch.num_computed_tokens = [], 0

    def evict(self, group: SequenceGroup) -> None:
        """The group's pages are not found by others any more.

        A token without numbers takes them from those before it too, where a masked weight of 0 meets NaN.
        """
        for branch in group.branches:
            for block in self._hash_of_block.keys() & set(branch.block_table):
                del self._block_of_hash[self._hash_of_block.pop(block)]

    def defragment(self, groups: Iterable[SequenceGroup]) -> list[tuple[int, int]]:
        """Moves the held pages to the beginning of the pool when they have become sparse.

        Returns the pairs of pages whose contents are to be exchanged; the page tables are changed here.
        """
        if not self.keep_dense:
            return []
        branches = [branch for group in groups for branch in group.branches]
        used = sorted({block for branch in branches for block in branch.block_table})
        if not used or used[-1] + 1 <= max(2, len(used) + len(used) // 2):
            return []
        used_set = set(used)
        holes = [page for page in range(len(used)) if page not in used_set]
        pairs = list(zip(used[len(used) - len(holes) :], holes, strict=True))
        moves = dict(pairs)
        for branch in branches:
            branch.block_table = [moves.get(page, page) for page in branch.block_table]
        for pair in pairs:
            self._swap_blocks(*pair)
        heapify(self._free_heap)
        return pairs

    def _swap_blocks(self, used_block: int, free_block: int) -> None:
        """A held page and one that is free change places."""
        hashes = {
            free_block: self._hash_of_block.pop(used_block, None),
            used_block: self._hash_of_block.pop(free_block, None),
        }
        for block, block_hash in hashes.items():
            if block_hash is not None:
                self._hash_of_block[block], self._block_of_hash[block_hash] = block_hash, block
        self._ref_counts[free_block], self._ref_counts[used_block] = self._ref_counts[used_block], 0
        if free_block in self._lru:
            self._lru = OrderedDict((used_block if page == free_block else page, None) for page in self._lru)
        else:
            self._free_heap[self._free_heap.index(free_block)] = used_block

    def _block_hashes(self, group: SequenceGroup, branch: Branch, count: int) -> list[bytes]:
        """The hashes of the branch's first `count` pages, each of its tokens and of the hash before."""
        while len(branch.block_hashes) < count:
            start = len(branch.block_hashes) * self.block_size
            parent_hash = (
                branch.block_hashes[-1] if branch.block_hashes else group.rope_length.to_bytes(8, "little")
            )
            block_tokens = array("q", group.get_token_ids(branch, start, self.block_size))
            branch.block_hashes.append(blake2b(parent_hash + block_tokens.tobytes(), digest_size=16).digest())
        return branch.block_hashes[:count]

    def _is_referenced(self, block_hash: bytes) -> bool:
        block = self._block_of_hash.get(block_hash)
        return block is not None and self._ref_counts[block] > 0

    def _touch(self, block: int) -> None:
        self._lru.pop(block, None)
        self._ref_counts[block] += 1

    def _pop_free(self) -> int:
        if self._free_heap:
            block = heappop(self._free_heap)
        else:
            block, _ = self._lru.popitem(last=False)
            del self._block_of_hash[self._hash_of_block.pop(block)]
        self._ref_counts[block] = 1
        self.blocks_to_zero.append(block)
        return block

    def _free_block(self, block: int) -> None:
        if block in self._hash_of_block and self.enable_caching:
            self._lru[block] = None
            return
        if block in self._hash_of_block:
            del self._block_of_hash[self._hash_of_block.pop(block)]
        heappush(self._free_heap, block)
