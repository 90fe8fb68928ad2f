"""Continuous-batching scheduler that admits, preempts and samples groups as a unit.

There are no separate prefill and decode steps. A branch has uncomputed tokens: many when it starts, one when
it decodes. A step computes as many of each branch as the budget allows; a group whose branches have all
caught up samples its next token. When blocks run out, the youngest group is preempted: its blocks are freed,
and it later recomputes its prompt and the answer so far.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..sequence.sequence import Branch, SequenceGroup
    from .block_manager import BlockManager


RESERVE_DIVISOR = 4
"""The oldest prefill leaves 1/4 of the step's token budget to younger groups."""


@dataclass
class SchedulerOutput:
    """One step: groups that start, number of tokens to compute per branch, groups that sample a token.

    blocks_to_swap, blocks_to_zero: pairs of blocks to swap and blocks to clear before the forward pass.
    prev_index: index of each group among the previous step's tokens, if those are not on the host yet.
    """

    new_groups: list[SequenceGroup] = field(default_factory=list)
    scheduled: list[tuple[SequenceGroup, Branch, int]] = field(default_factory=list)
    to_sample: list[SequenceGroup] = field(default_factory=list)
    blocks_to_swap: list[tuple[int, int]] = field(default_factory=list)
    blocks_to_zero: list[int] = field(default_factory=list)
    prev_index: dict[SequenceGroup, int] = field(default_factory=dict)


class Scheduler:
    """First come, first served, within `max_num_seqs` branches and `max_num_batched_tokens` tokens per step.

    `running` and `waiting` are in the order of arrival. preemptions: number of preempted groups;
    prompt_tokens: total prompt tokens of all branches that started.
    """

    def __init__(self, block_manager: BlockManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.block_manager, self.max_num_seqs, self.max_num_batched_tokens = (
            block_manager,
            max_num_seqs,
            max_num_batched_tokens,
        )
        self.waiting: deque[SequenceGroup] = deque()
        self.running: list[SequenceGroup] = []
        self.preemptions = self.prompt_tokens = 0
        self._used_rows: set[int] = set()

    @property
    def idle(self) -> bool:
        """Whether no group waits or runs."""
        return not self.waiting and not self.running

    def add(self, group: SequenceGroup) -> None:
        """Append the group to the waiting queue."""
        self.waiting.append(group)

    def remove(self, group: SequenceGroup) -> None:
        """Remove the group from the queues and free its blocks and state row."""
        if group in self.running:
            self.running.remove(group)
            self.block_manager.free(group)
        if group in self.waiting:
            self.waiting.remove(group)
        self._used_rows.discard(group.state_row)
        group.state_row = -1

    def pop_failed(self) -> list[SequenceGroup]:
        """Remove and return the running groups after a failed step; if none runs, the first waiting one."""
        failed, self.running = self.running or list(self.waiting)[:1], []
        self.waiting = deque(group for group in self.waiting if group not in failed)
        for group in failed:
            group.state_row = -1  # the row may be reassigned before the group's reader calls remove()
        self._used_rows = {group.state_row for group in self.waiting if group.state_row >= 0}
        self.block_manager.reset([*failed, *self.waiting])
        return failed

    def schedule(self) -> SchedulerOutput:
        """Admit groups that fit and divide the token budget: decoding groups first, then by arrival."""
        scheduler_output = SchedulerOutput(blocks_to_swap=self.block_manager.defragment(self.running))
        while self.waiting and self._can_admit(self.waiting[0]):
            group = self.waiting[0]
            self.running.append(group)  # before popleft(): an interrupt must not lose the group
            self.waiting.popleft()
            if group.state_row < 0:
                self._assign_row(group)
                self.prompt_tokens += sum(len(branch.prompt_token_ids) for branch in group.branches)
                scheduler_output.new_groups.append(group)
        num_scheduled: dict[SequenceGroup, list[int]] = {}
        budget, pending_hashes = self.max_num_batched_tokens, set[bytes]()
        prefills = [group for group in self.running if _is_prefill(group)]
        # the oldest prefill leaves tokens to younger groups: a short prompt need not wait for a long one
        oldest_prefill = prefills[0] if len(prefills) > 1 else None
        for group in sorted(self.running, key=_is_prefill):
            if group not in self.running:
                continue
            num_reserved = (
                min(self.max_num_batched_tokens // RESERVE_DIVISOR, budget - 1)
                if group is oldest_prefill and budget
                else 0
            )
            num_new = self._num_new_tokens(group, budget - num_reserved, pending_hashes)
            if not any(num_new) or not self._allocate_or_preempt(group, num_new, num_scheduled):
                continue
            num_scheduled[group] = num_new
            budget -= sum(num_new)
            for branch, count in zip(group.branches, num_new, strict=True):
                pending_hashes.update(self.block_manager.hashes_to_fill(group, branch, count))
        for group, num_new in num_scheduled.items():
            scheduler_output.scheduled += [
                (group, b, n) for b, n in zip(group.branches, num_new, strict=True) if n
            ]
            if all(group.num_uncomputed(b) == n for b, n in zip(group.branches, num_new, strict=True)):
                scheduler_output.to_sample.append(group)
        scheduler_output.blocks_to_zero, self.block_manager.blocks_to_zero = (
            self.block_manager.blocks_to_zero,
            [],
        )
        return scheduler_output

    def schedule_ahead(self, scheduler_output: SchedulerOutput) -> SchedulerOutput | None:
        """Schedule the step after this one, whose tokens are marked computed but not sampled yet.

        None if the next step is not plain decoding of the same groups: a prefill runs, a waiting group may be
        admitted, blocks are too few, or a group's penalties depend on the unknown tokens.
        """
        prev_index = {
            group: index for index, group in enumerate(scheduler_output.to_sample) if group.is_active
        }
        continuing = [group for group in prev_index if len(group.output_ids) + 1 < group.max_new_tokens]
        if (
            not continuing
            or len(prev_index) < len(self.running)
            or any(group.uses_penalties for group in continuing)
        ):
            return None
        if self.waiting and (len(continuing) < len(prev_index) or self._can_admit(self.waiting[0])):
            return None
        if not self.block_manager.allocate(
            [(branch, 1) for group in continuing for branch in group.branches]
        ):
            return None
        scheduled = [(group, branch, 1) for group in continuing for branch in group.branches]
        blocks_to_zero, self.block_manager.blocks_to_zero = self.block_manager.blocks_to_zero, []
        return SchedulerOutput(
            scheduled=scheduled, to_sample=continuing, blocks_to_zero=blocks_to_zero, prev_index=prev_index
        )

    def mark_computed(self, scheduler_output: SchedulerOutput) -> None:
        """Count the step's tokens as computed: any later step runs after it."""
        for group, branch, count in scheduler_output.scheduled:
            if group.is_active:
                self.block_manager.cache_full_blocks(group, branch, count)

    def _num_new_tokens(self, group: SequenceGroup, budget: int, pending_hashes: set[bytes]) -> list[int]:
        """Number of tokens per branch; 0 while another branch computes a block that this one can share.

        The last tokens of all branches are computed in the same step, which samples from all of them.
        """
        group_hashes, num_new = set(pending_hashes), list[int]()
        for branch in group.branches:
            can_run = self.block_manager.take_cached(group, branch, group_hashes)
            num_new.append(min(group.num_uncomputed(branch), budget - sum(num_new)) if can_run else 0)
            group_hashes.update(self.block_manager.hashes_to_fill(group, branch, num_new[-1]))
        num_uncomputed = [group.num_uncomputed(branch) for branch in group.branches]
        if num_new == num_uncomputed:
            return num_new
        return [min(count, remaining - 1) for count, remaining in zip(num_new, num_uncomputed, strict=True)]

    def _allocate_or_preempt(
        self, group: SequenceGroup, num_new: list[int], num_scheduled: dict[SequenceGroup, list[int]]
    ) -> bool:
        """Allocate the blocks of these tokens, preempting younger groups or, last, the group itself."""
        while not self.block_manager.allocate(list(zip(group.branches, num_new, strict=True))):
            youngest = self.running[-1]
            self.waiting.appendleft(youngest)
            self.running.pop()
            self.block_manager.free(youngest)
            num_scheduled.pop(youngest, None)
            self.preemptions += 1
            if youngest is group:
                return False
        return True

    def _can_admit(self, group: SequenceGroup) -> bool:
        """Whether the group's branches fit max_num_seqs, and its tokens plus one block per branch fit."""
        num_seqs = sum(len(running.branches) for running in self.running)
        if num_seqs + len(group.branches) > self.max_num_seqs:
            return False
        num_reserved_blocks = sum(
            self.block_manager.blocks_needed(running) for running in self.running if _is_prefill(running)
        )
        num_needed = num_reserved_blocks + self.block_manager.blocks_needed(group) + len(group.branches)
        return not self.running or num_needed <= self.block_manager.num_free_blocks

    def _assign_row(self, group: SequenceGroup) -> None:
        group.state_row = next(row for row in range(len(self._used_rows) + 1) if row not in self._used_rows)
        self._used_rows.add(group.state_row)
        group.scheduled_time = time.perf_counter()


def _is_prefill(group: SequenceGroup) -> bool:
    """Whether the group has a prompt to compute, or its answer to recompute after preemption."""
    return any(group.num_uncomputed(branch) > 1 for branch in group.branches)
