"""Simulated KV cache that stores token ids, to check the scheduler's steps without a model."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from trimtab.engine.scheduling.block_manager import BlockManager
from trimtab.engine.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from trimtab.engine.scheduling.scheduler import SchedulerOutput
    from trimtab.engine.sequence.sequence import Branch, SequenceGroup


class SimulatedKVCache:
    """Blocks of token ids, None where zeroed and not yet rewritten. `num_computed`: tokens computed."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, block_manager = scheduler, scheduler.block_manager
        self.blocks: list[list[int | None]] = [
            [-1] * block_manager.block_size for _ in range(block_manager.num_blocks)
        ]
        self.num_computed = 0

    def step(self) -> SchedulerOutput:
        """Schedule a step and execute it, checking the invariants before and after."""
        scheduler = self.scheduler
        scheduler_output = scheduler.schedule()
        check_blocks(scheduler.block_manager, scheduler.running)
        for src, dst in scheduler_output.blocks_to_swap:
            self.blocks[src], self.blocks[dst] = self.blocks[dst], self.blocks[src]
        for block in scheduler_output.blocks_to_zero:
            self.blocks[block] = [None] * scheduler.block_manager.block_size
        assert sum(count for _, _, count in scheduler_output.scheduled) <= scheduler.max_num_batched_tokens
        assert sum(len(group.branches) for group in scheduler.running) <= scheduler.max_num_seqs
        assert len({id(branch) for _, branch, _ in scheduler_output.scheduled}) == len(
            scheduler_output.scheduled
        )
        writes = Counter[tuple[int, int]]()
        for group, branch, count in scheduler_output.scheduled:
            assert count > 0
            assert any(group is running for running in scheduler.running)
            for position in range(branch.num_computed_tokens, branch.num_computed_tokens + count):
                self._write(group, branch, position, writes)
        assert not writes or max(writes.values()) == 1, "two branches write the same slot"
        for group, branch, count in scheduler_output.scheduled:
            self._check_visible(group, branch, branch.num_computed_tokens + count)
            self.num_computed += count
        scheduler.mark_computed(scheduler_output)
        for group in scheduler.running:
            caught_up = all(group.num_uncomputed(branch) == 0 for branch in group.branches)
            assert caught_up == any(group is ready for ready in scheduler_output.to_sample)
            if any(group is ready for ready in scheduler_output.to_sample):
                scheduled = {id(branch) for one, branch, _ in scheduler_output.scheduled if one is group}
                assert scheduled == {id(branch) for branch in group.branches}, (
                    "all branches of a group sample in the same step"
                )
        check_blocks(scheduler.block_manager, scheduler.running)
        return scheduler_output

    def _write(
        self, group: SequenceGroup, branch: Branch, position: int, writes: Counter[tuple[int, int]]
    ) -> None:
        block, offset = branch.block_table[position // len(self.blocks[0])], position % len(self.blocks[0])
        assert self.scheduler.block_manager._ref_counts[block] == 1, "a shared block is written"
        assert self.blocks[block][offset] is None, "a token is overwritten"
        self.blocks[block][offset] = group.get_token_ids(branch, position, 1)[0]
        writes[block, offset] += 1

    def _check_visible(self, group: SequenceGroup, branch: Branch, end: int) -> None:
        visible = [token for block in branch.block_table for token in self.blocks[block]]
        assert visible[:end] == group.get_token_ids(branch, 0, end), (
            "the branch sees tokens of another branch"
        )
        last_blocks = branch.block_table[(end - 1) // len(self.blocks[0]) :]
        uncomputed = visible[end : end + len(last_blocks) * len(self.blocks[0])]
        assert all(token is None for token in uncomputed), "uncomputed slots are not zeroed"


def check_blocks(block_manager: BlockManager, running: list[SequenceGroup]) -> None:
    """Check that every block is in use, cached or free, and ref counts and hashes are consistent."""
    block_tables = [branch.block_table for group in running for branch in group.branches]
    ref_counts = Counter(block for block_table in block_tables for block in block_table)
    assert [ref_counts[block] for block in range(block_manager.num_blocks)] == block_manager._ref_counts
    assert sorted([*block_manager._free_heap, *block_manager._lru, *ref_counts]) == list(
        range(block_manager.num_blocks)
    )
    assert block_manager.num_free_blocks == block_manager.num_blocks - len(ref_counts)
    assert {block: key for key, block in block_manager._block_of_hash.items()} == block_manager._hash_of_block
    assert all(block in block_manager._hash_of_block for block in block_manager._lru)
    assert not any(block in block_manager._hash_of_block for block in block_manager._free_heap)
    for table in block_tables:
        assert len(set(table)) == len(table)
    for group in running:
        for branch in group.branches:
            assert branch.num_computed_tokens <= len(branch.block_table) * block_manager.block_size
            assert branch.num_computed_tokens <= len(branch.prompt_token_ids) + len(group.output_ids)
