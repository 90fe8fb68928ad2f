"""What the next step computes: every branch catches up with its tokens, whole groups at a time.

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

if TYPE_CHECKING:
    from ..sequence.sequence import Branch, Group
    from .block_manager import KVBlocks


KEPT = 4
"""The part of a step's tokens that the oldest prompt leaves to younger ones: a quarter."""


@dataclass
class Plan:
    """One step: groups that start, tokens to compute of each branch, groups that then choose a token.

    swaps: pairs of pages to exchange, and `fresh`, pages to clear, before anything else.
    follows: where each group stands among those that the step before chose for, if that is not known yet.
    """

    admitted: list[Group] = field(default_factory=list)
    shares: list[tuple[Group, Branch, int]] = field(default_factory=list)
    ready: list[Group] = field(default_factory=list)
    swaps: list[tuple[int, int]] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    follows: dict[Group, int] = field(default_factory=dict)


class Scheduler:
    """First come, first served, within `max_rows` branches and `max_tokens` tokens a step.

    `running` and `waiting` are in the order of arrival. preemptions: how often a group had to start again;
    prompt_tokens: of all branches that ever started.
    """

    def __init__(self, blocks: KVBlocks, max_rows: int, max_tokens: int) -> None:
        self.blocks, self.max_rows, self.max_tokens = blocks, max_rows, max_tokens
        self.waiting: deque[Group] = deque()
        self.running: list[Group] = []
        self.preemptions = self.prompt_tokens = 0
        self._rows: set[int] = set()

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
        if group in self.waiting:
            self.waiting.remove(group)
        self._rows.discard(group.row)
        group.row = -1

    def abandon(self) -> list[Group]:
        """Takes out and returns what runs, wherever a step was interrupted; else the first that waits."""
        lost, self.running = self.running or list(self.waiting)[:1], []
        self.waiting = deque(group for group in self.waiting if group not in lost)
        for group in lost:
            group.row = -1  # which may be another's before the group's reader leaves
        self._rows = {group.row for group in self.waiting if group.row >= 0}
        self.blocks.forget([*lost, *self.waiting])
        return lost

    def plan(self) -> Plan:
        """Admits what fits, and shares the step's tokens out: first to groups that decode, then in order."""
        plan = Plan(swaps=self.blocks.compact(self.running))
        while self.waiting and self._admit(self.waiting[0]):
            group = self.waiting[0]
            self.running.append(group)  # first, so that no interruption finds it nowhere
            self.waiting.popleft()
            if group.row < 0:
                self._give_row(group)
                self.prompt_tokens += sum(len(branch.prompt_token_ids) for branch in group.branches)
                plan.admitted.append(group)
        planned: dict[Group, list[int]] = {}
        budget, claimed = self.max_tokens, set[bytes]()
        starting = [group for group in self.running if _starting(group)]
        # the oldest prompt leaves something to those behind it, so that a short one need not wait for its end
        leaving = starting[0] if len(starting) > 1 else None
        for group in sorted(self.running, key=_starting):
            if group not in self.running:
                continue
            kept = min(self.max_tokens // KEPT, budget - 1) if group is leaving and budget else 0
            shares = self._catch_up(group, budget - kept, claimed)
            if not any(shares) or not self._make_room(group, shares, planned):
                continue
            planned[group] = shares
            budget -= sum(shares)
            for branch, count in zip(group.branches, shares, strict=True):
                claimed.update(self.blocks.claims(group, branch, count))
        for group, shares in planned.items():
            plan.shares += [(group, b, n) for b, n in zip(group.branches, shares, strict=True) if n]
            if all(group.waiting(b) == n for b, n in zip(group.branches, shares, strict=True)):
                plan.ready.append(group)
        plan.fresh, self.blocks.fresh = self.blocks.fresh, []
        return plan

    def ahead(self, plan: Plan) -> Plan | None:
        """The step after this one, which is committed, planned before anybody knows what it chooses.

        None where more than that goes on: a prompt, somebody who waits and might begin, too few pages, or a
        request whose scores depend on what it has said.
        """
        follows = {group: place for place, group in enumerate(plan.ready) if group.present}
        going = [group for group in follows if len(group.tokens) + 1 < group.limit]
        if not going or len(follows) < len(self.running) or any(group.looks_back for group in going):
            return None
        if self.waiting and (len(going) < len(follows) or self._admit(self.waiting[0])):
            return None
        if not self.blocks.reserve([(branch, 1) for group in going for branch in group.branches]):
            return None
        shares = [(group, branch, 1) for group in going for branch in group.branches]
        fresh, self.blocks.fresh = self.blocks.fresh, []
        return Plan(shares=shares, ready=going, fresh=fresh, follows=follows)

    def commit(self, plan: Plan) -> None:
        """The plan's tokens have been computed, or will have been before anything that is planned after."""
        for group, branch, count in plan.shares:
            if group.present:
                self.blocks.commit(group, branch, count)

    def _catch_up(self, group: Group, budget: int, claimed: set[bytes]) -> list[int]:
        """Tokens for each branch. One waits while another computes a page that it can have from there.

        The last token of every branch is computed in the same step, the one that chooses from all of them.
        """
        ours, shares = set(claimed), list[int]()
        for branch in group.branches:
            free = self.blocks.match(group, branch, ours)
            shares.append(min(group.waiting(branch), budget - sum(shares)) if free else 0)
            ours.update(self.blocks.claims(group, branch, shares[-1]))
        waiting = [group.waiting(branch) for branch in group.branches]
        if shares == waiting:
            return shares
        return [min(count, whole - 1) for count, whole in zip(shares, waiting, strict=True)]

    def _make_room(self, group: Group, shares: list[int], planned: dict[Group, list[int]]) -> bool:
        """Reserves the pages of these shares, preempting younger groups for them, or the group itself."""
        while not self.blocks.reserve(list(zip(group.branches, shares, strict=True))):
            youngest = self.running[-1]
            self.waiting.appendleft(youngest)
            self.running.pop()
            self.blocks.release(youngest)
            planned.pop(youngest, None)
            self.preemptions += 1
            if youngest is group:
                return False
        return True

    def _admit(self, group: Group) -> bool:
        """Whether there is room for the group's branches, its tokens, and a page more for each."""
        rows = sum(len(running.branches) for running in self.running)
        if rows + len(group.branches) > self.max_rows:
            return False
        promised = sum(self.blocks.needed(running) for running in self.running if _starting(running))
        needed = promised + self.blocks.needed(group) + len(group.branches)
        return not self.running or needed <= self.blocks.free

    def _give_row(self, group: Group) -> None:
        group.row = next(row for row in range(len(self._rows) + 1) if row not in self._rows)
        self._rows.add(group.row)
        group.admitted = time.perf_counter()


def _starting(group: Group) -> bool:
    """Whether the group has a prompt to compute, or its answer again."""
    return any(group.waiting(branch) > 1 for branch in group.branches)
