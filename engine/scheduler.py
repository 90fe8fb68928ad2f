"""What the next step computes: every branch catches up with its tokens, whole groups at a time.

There is no prefill or decode phase. A branch has tokens that are not computed yet: many when it starts, one
when it decodes. A step gives each as many as the budget allows; a group whose branches have all caught up
chooses its next token.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .blocks import KVBlocks
    from .group import Branch, Group


@dataclass
class Plan:
    """One step: groups that start, tokens to compute of each branch, groups that then choose a token."""

    admitted: list[Group] = field(default_factory=list)
    shares: list[tuple[Group, Branch, int]] = field(default_factory=list)
    ready: list[Group] = field(default_factory=list)


class Scheduler:
    """First come, first served, within `max_rows` branches and `max_tokens` tokens a step."""

    def __init__(self, blocks: KVBlocks, max_rows: int, max_tokens: int) -> None:
        self.blocks, self.max_rows, self.max_tokens = blocks, max_rows, max_tokens
        self.waiting: deque[Group] = deque()
        self.running: list[Group] = []

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def add(self, group: Group) -> None:
        """Puts the group at the end of the queue."""
        self.waiting.append(group)

    def remove(self, group: Group) -> None:
        """Takes the group out, wherever it is, and frees what it holds."""
        if group in self.running:
            self.running.remove(group)
            self.blocks.release(group)
        elif group in self.waiting:
            self.waiting.remove(group)

    def plan(self) -> Plan:
        """Admits what fits, and shares the step's tokens out: first to groups that decode, then in order."""
        plan, budget = Plan(), self.max_tokens
        while self.waiting and self._admit(self.waiting[0]):
            plan.admitted.append(self.waiting.popleft())
            self.running.append(plan.admitted[-1])
        for group in sorted(self.running, key=lambda group: not group.tokens):
            shares = self._catch_up(group, budget)
            budget -= sum(shares)
            plan.shares += [(group, b, n) for b, n in zip(group.branches, shares, strict=True) if n]
            if all(group.waiting(b) == n for b, n in zip(group.branches, shares, strict=True)):
                plan.ready.append(group)
        return plan

    def _catch_up(self, group: Group, budget: int) -> list[int]:
        """Tokens for each branch. One waits while the head that it shares is not computed by the first.

        The last token of every branch is computed in the same step, the one that chooses from all of them.
        """
        lead, shares = group.branches[0], list[int]()
        kept_back = 1 if sum(map(group.waiting, group.branches)) > budget else 0
        for branch in group.branches:
            head_computed = lead.computed + shares[0] if shares else branch.shared
            count = min(group.waiting(branch) - kept_back, budget) if head_computed >= branch.shared else 0
            shares.append(count)
            budget -= count
        return shares

    def _admit(self, group: Group) -> bool:
        taken = {branch.slot for running in self.running for branch in running.branches}
        free = [slot for slot in range(self.max_rows) if slot not in taken]
        if len(free) < len(group.branches) or not self.blocks.reserve(group):
            return False
        for branch, slot in zip(group.branches, free, strict=False):
            branch.slot = slot
        rows = {running.row for running in self.running}
        group.row = next(row for row in range(self.max_rows) if row not in rows)
        group.admitted = time.perf_counter()
        return True
