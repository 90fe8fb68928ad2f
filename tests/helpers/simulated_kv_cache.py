"""A KV cache that holds the tokens themselves: it carries out plans, and knows whether they may be done."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from trimtab.engine.scheduling.block_manager import KVBlocks
from trimtab.engine.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from trimtab.engine.scheduling.scheduler import Plan
    from trimtab.engine.sequence.sequence import Branch, Group


class PagedTokens:
    """Pages of tokens, None where nothing was written since they were cleared; `computed` counts tokens."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, blocks = scheduler, scheduler.blocks
        self.pages: list[list[int | None]] = [[-1] * blocks.block_size for _ in range(blocks.total)]
        self.computed = 0

    def step(self) -> Plan:
        """Plans and does it, checking everything that must hold before and after."""
        scheduler = self.scheduler
        plan = scheduler.plan()
        check_pages(scheduler.blocks, scheduler.running)
        for one, other in plan.swaps:
            self.pages[one], self.pages[other] = self.pages[other], self.pages[one]
        for page in plan.fresh:
            self.pages[page] = [None] * scheduler.blocks.block_size
        assert sum(count for _, _, count in plan.shares) <= scheduler.max_tokens
        assert sum(len(group.branches) for group in scheduler.running) <= scheduler.max_rows
        assert len({id(branch) for _, branch, _ in plan.shares}) == len(plan.shares)
        written = Counter[tuple[int, int]]()
        for group, branch, count in plan.shares:
            assert count > 0
            assert any(group is running for running in scheduler.running)
            for at in range(branch.computed, branch.computed + count):
                self._write(group, branch, at, written)
        assert not written or max(written.values()) == 1, "two branches write the same place"
        for group, branch, count in plan.shares:
            self._check_seen(group, branch, branch.computed + count)
            self.computed += count
        scheduler.commit(plan)
        for group in scheduler.running:
            caught_up = all(group.waiting(branch) == 0 for branch in group.branches)
            assert caught_up == any(group is ready for ready in plan.ready)
            if any(group is ready for ready in plan.ready):
                done = {id(branch) for one, branch, _ in plan.shares if one is group}
                assert done == {id(branch) for branch in group.branches}, "all choose from the same step"
        check_pages(scheduler.blocks, scheduler.running)
        return plan

    def _write(self, group: Group, branch: Branch, at: int, written: Counter[tuple[int, int]]) -> None:
        page, offset = branch.pages[at // len(self.pages[0])], at % len(self.pages[0])
        assert self.scheduler.blocks._holders[page] == 1, "a shared page is written"
        assert self.pages[page][offset] is None, "a token is written where another stands"
        self.pages[page][offset] = group.token_ids(branch, at, 1)[0]
        written[page, offset] += 1

    def _check_seen(self, group: Group, branch: Branch, end: int) -> None:
        seen = [token for page in branch.pages for token in self.pages[page]]
        assert seen[:end] == group.token_ids(branch, 0, end), "the branch sees tokens that are not its own"
        own = branch.pages[(end - 1) // len(self.pages[0]) :]
        rest = seen[end : end + len(own) * len(self.pages[0])]
        assert all(token is None for token in rest), "what is not computed yet is not clear"


def check_pages(blocks: KVBlocks, running: list[Group]) -> None:
    """Every page is held, kept or empty, counts are those of the page tables, hashes know their pages."""
    tables = [branch.pages for group in running for branch in group.branches]
    holders = Counter(page for table in tables for page in table)
    assert [holders[page] for page in range(blocks.total)] == blocks._holders
    assert sorted([*blocks._empty, *blocks._kept, *holders]) == list(range(blocks.total))
    assert blocks.free == blocks.total - len(holders)
    assert {page: key for key, page in blocks._page.items()} == blocks._hash
    assert all(page in blocks._hash for page in blocks._kept)
    assert not any(page in blocks._hash for page in blocks._empty)
    for table in tables:
        assert len(set(table)) == len(table)
    for group in running:
        for branch in group.branches:
            assert branch.computed <= len(branch.pages) * blocks.block_size
            assert branch.computed <= len(branch.prompt_token_ids) + len(group.tokens)
