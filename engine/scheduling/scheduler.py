"""Which tokens the next step computes: whole groups at a time.

There is no prefill or decode phase. A branch has tokens that are not computed yet: many when it starts, one
when it decodes. A step gives each as many as the budget allows; a group whose branches have all caught up
chooses its next token. When pages run out the youngest group gives its own back and starts again later, from
its prompt and the answer so far.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...kernels.common.profiling import in_stage

if TYPE_CHECKING:
    from ..sequence.sequence import Branch, SequenceGroup
    from .block_manager import BlockManager


RESERVE_DIVISOR = 4
"""The part of a step's tokens that the oldest prompt leaves to younger ones: a quarter."""


@dataclass
class SchedulerOutput:
    """One step: groups that start, tokens to compute of each branch, groups that then choose a token.

    blocks_to_swap: pairs of pages to exchange, and `blocks_to_zero`, pages to clear, before anything else.
    prev_index: where each group stands among those that the step before chose for, if that is not known yet.
    """

    new_groups: list[SequenceGroup] = field(default_factory=list)
    scheduled: list[tuple[SequenceGroup, Branch, int]] = field(default_factory=list)
    to_sample: list[SequenceGroup] = field(default_factory=list)
    blocks_to_swap: list[tuple[int, int]] = field(default_factory=list)
    blocks_to_zero: list[int] = field(default_factory=list)
    prev_index: dict[SequenceGroup, int] = field(default_factory=dict)


class Scheduler:
    """First come, first served, within `max_num_seqs` branches and `max_num_batched_tokens` tokens a step.

    `running` and `waiting` are in the order of arrival. preemptions: how often a group had to start again;
    prompt_tokens: of all branches that ever started.
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
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def add(self, group: SequenceGroup) -> None:
        """Puts the group at the end of the queue."""
        self.waiting.append(group)

    def remove(self, group: SequenceGroup) -> None:
        """Takes the group out, wherever it is, and frees what it holds."""
        if group in self.running:
            self.running.remove(group)
            self.block_manager.free(group)
        if group in self.waiting:
            self.waiting.remove(group)
        self._used_rows.discard(group.state_row)
        group.state_row = -1

    def pop_failed(self) -> list[SequenceGroup]:
        """Takes out and returns what runs, wherever a step was interrupted; else the first that waits."""
        failed, self.running = self.running or list(self.waiting)[:1], []
        self.waiting = deque(group for group in self.waiting if group not in failed)
        for group in failed:
            group.state_row = -1  # which may be another's before the group's reader leaves
        self._used_rows = {group.state_row for group in self.waiting if group.state_row >= 0}
        self.block_manager.reset([*failed, *self.waiting])
        return failed

    @in_stage("plan")
    def schedule(self) -> SchedulerOutput:
        """Admits what fits, and shares the step's tokens out: first to groups that decode, then in order."""
        scheduler_output = SchedulerOutput(blocks_to_swap=self.block_manager.defragment(self.running))
        while self.waiting and self._can_admit(self.waiting[0]):
            group = self.waiting[0]
            self.running.append(group)  # first, so that no interruption finds it nowhere
            self.waiting.popleft()
            if group.state_row < 0:
                self._assign_row(group)
                self.prompt_tokens += sum(len(branch.prompt_token_ids) for branch in group.branches)
                scheduler_output.new_groups.append(group)
        num_scheduled: dict[SequenceGroup, list[int]] = {}
        budget, pending_hashes = self.max_num_batched_tokens, set[bytes]()
        prefills = [group for group in self.running if _is_prefill(group)]
        # the oldest prompt leaves something to those behind it, so that a short one need not wait for its end
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

    @in_stage("plan")
    def schedule_ahead(self, scheduler_output: SchedulerOutput) -> SchedulerOutput | None:
        """The step after this one, which is committed, planned before anybody knows what it chooses.

        None where more than that goes on: a prompt, somebody who waits and might begin, too few pages, or a
        request whose scores depend on what it has said.
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

    @in_stage("plan")
    def mark_computed(self, scheduler_output: SchedulerOutput) -> None:
        """The plan's tokens have been computed, or will have been before anything that is planned after."""
        for group, branch, count in scheduler_output.scheduled:
            if group.is_active:
                self.block_manager.cache_full_blocks(group, branch, count)

    def _num_new_tokens(self, group: SequenceGroup, budget: int, pending_hashes: set[bytes]) -> list[int]:
        """Tokens for each branch. One waits while another computes a page that it can have from there.

        The last token of every branch is computed in the same step, the one that chooses from all of them.
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
        """Reserves the pages of these shares, preempting younger groups for them, or the group itself."""
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
        """Whether there is room for the group's branches, its tokens, and a page more for each."""
        num_seqs = sum(len(running.branches) for running in self.running)
        if num_seqs + len(group.branches) > self.max_num_seqs:
            return False
        num_promised = sum(
            self.block_manager.blocks_needed(running) for running in self.running if _is_prefill(running)
        )
        num_needed = num_promised + self.block_manager.blocks_needed(group) + len(group.branches)
        return not self.running or num_needed <= self.block_manager.num_free_blocks

    def _assign_row(self, group: SequenceGroup) -> None:
        group.state_row = next(row for row in range(len(self._used_rows) + 1) if row not in self._used_rows)
        self._used_rows.add(group.state_row)
        group.scheduled_time = time.perf_counter()


def _is_prefill(group: SequenceGroup) -> bool:
    """Whether the group has a prompt to compute, or its answer again."""
    return any(group.num_uncomputed(branch) > 1 for branch in group.branches)
