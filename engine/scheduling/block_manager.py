"""KV block manager: reference counts, prefix cache, and all-or-nothing allocation for a group.

A full block is indexed by the hash of its tokens and of all tokens before them, so that a common prefix is
shared: by the branches of a request, by requests with the same prompt, by the next turn of a conversation.
A free block stays cached until its memory is needed; the least recently used is evicted first.
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
    """A pool of `num_blocks` reference-counted blocks of `block_size` tokens.

    enable_caching: keep the blocks of finished requests for requests with the same prefix. Without it blocks
    are shared only among branches that run at the same time.
    keep_dense: keep used blocks at the beginning of the pool: CPU attention reads up to the last one.
    blocks_to_zero: allocated blocks to clear before their first use; the caller that clears them empties the
    list. num_cached_tokens: tokens that were not computed because their blocks were cached.
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
        """Free every block and empty the prefix cache, in whatever state an interruption has left them.

        groups: all groups that may own blocks; they restart from their first token.
        """
        for group in groups:
            for branch in group.branches:
                branch.block_table, branch.num_computed_tokens = [], 0
        self._free_heap = list(range(self.num_blocks))  # a heap: the lowest blocks are allocated first
        self._lru: OrderedDict[int, None] = OrderedDict()  # free but cached by hash; oldest first
        self._ref_counts = [0] * self.num_blocks
        self._hash_of_block: dict[int, bytes] = {}
        self._block_of_hash: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks without references, cached ones included."""
        return len(self._free_heap) + len(self._lru)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Number of blocks for `num_tokens` tokens of a branch."""
        return -(-num_tokens // self.block_size)

    def blocks_needed(self, group: SequenceGroup) -> int:
        """Blocks for its current tokens, shared ones counted once and referenced ones not at all."""
        return self._count_blocks(group, len(group.output_ids), self._is_referenced)

    def max_blocks(self, group: SequenceGroup) -> int:
        """Blocks for its longest answer, shared ones counted once; the last token is never computed."""
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
        """Append the cached blocks that come next to a branch that ends at a block boundary.

        At least one token is left to compute. Returns False when the following block is in `pending_hashes`:
        another branch is computing it.
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
        """Hashes of the blocks that the branch's next `num_new` tokens fill, its last token excluded."""
        num_tokens = len(branch.prompt_token_ids) + len(group.output_ids)
        num_full = min(branch.num_computed_tokens + num_new, num_tokens - 1) // self.block_size
        return self._block_hashes(group, branch, num_full)[branch.num_computed_tokens // self.block_size :]

    def allocate(self, scheduled: Sequence[tuple[Branch, int]]) -> bool:
        """Allocate blocks for each branch's new tokens; if too few are free, change nothing, return False."""
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
        """Mark the branch's next `num_new` tokens as computed and add the blocks they fill to the cache."""
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
        """Release the group's blocks; it restarts from its first token."""
        for branch in group.branches:
            for block in reversed(branch.block_table):  # the end of a text is evicted before its beginning
                self._ref_counts[block] -= 1
                if not self._ref_counts[block]:
                    self._free_block(block)
            branch.block_table, branch.num_computed_tokens = [], 0

    def evict(self, group: SequenceGroup) -> None:
        """Remove the group's blocks from the prefix cache.

        NaN in a later token's values spreads to earlier tokens: a masked weight of 0 times NaN is NaN.
        """
        for branch in group.branches:
            for block in self._hash_of_block.keys() & set(branch.block_table):
                del self._block_of_hash[self._hash_of_block.pop(block)]

    def defragment(self, groups: Iterable[SequenceGroup]) -> list[tuple[int, int]]:
        """Move the used blocks to the beginning of the pool when they have become sparse.

        Returns the pairs of blocks whose contents the caller must swap; block tables are updated here.
        """
        if not self.keep_dense:
            return []
        branches = [branch for group in groups for branch in group.branches]
        used = sorted({block for branch in branches for block in branch.block_table})
        if not used or used[-1] + 1 <= max(2, len(used) + len(used) // 2):
            return []
        used_set = set(used)
        holes = [block for block in range(len(used)) if block not in used_set]
        pairs = list(zip(used[len(used) - len(holes) :], holes, strict=True))
        moves = dict(pairs)
        for branch in branches:
            branch.block_table = [moves.get(block, block) for block in branch.block_table]
        for pair in pairs:
            self._swap_blocks(*pair)
        heapify(self._free_heap)
        return pairs

    def _swap_blocks(self, used_block: int, free_block: int) -> None:
        """Swap a used block with a free one."""
        hashes = {
            free_block: self._hash_of_block.pop(used_block, None),
            used_block: self._hash_of_block.pop(free_block, None),
        }
        for block, block_hash in hashes.items():
            if block_hash is not None:
                self._hash_of_block[block], self._block_of_hash[block_hash] = block_hash, block
        self._ref_counts[free_block], self._ref_counts[used_block] = self._ref_counts[used_block], 0
        if free_block in self._lru:
            self._lru = OrderedDict(
                (used_block if block == free_block else block, None) for block in self._lru
            )
        else:
            self._free_heap[self._free_heap.index(free_block)] = used_block

    def _block_hashes(self, group: SequenceGroup, branch: Branch, count: int) -> list[bytes]:
        """Hashes of the branch's first `count` blocks, each of its tokens and the previous hash."""
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
