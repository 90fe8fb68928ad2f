"""The pages of the KV cache: who holds which, and all-or-nothing reservation for a group."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .group import Branch, Group


class KVBlocks:
    """A pool of `total` pages of `block_size` tokens, counted by reference.

    A group reserves when it is admitted what its longest answer can need, so that it never has to stop.
    """

    def __init__(self, total: int, block_size: int) -> None:
        self.total, self.block_size = total, block_size
        self._free = list(range(total - 1, -1, -1))
        self._holders: Counter[int] = Counter()

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def needed(self, group: Group) -> int:
        """The pages that `reserve` would take for the group."""
        return sum(self._length(group, b) - self._shareable(group, b) for b in group.branches)

    def reserve(self, group: Group) -> bool:
        """Gives every branch its page table, sharing whole pages of the common head; or changes nothing."""
        if self.needed(group) > self.free:
            return False
        lead = group.branches[0]
        for branch in group.branches:
            shared = self._shareable(group, branch)
            own = [self._free.pop() for _ in range(self._length(group, branch) - shared)]
            branch.pages = lead.pages[:shared] + own
            branch.shared = branch.computed = shared * self.block_size
            self._holders.update(branch.pages)
        return True

    def release(self, group: Group) -> None:
        """Gives the group's pages back; those that nobody else holds become free."""
        for branch in group.branches:
            for page in branch.pages:
                self._holders[page] -= 1
                if not self._holders[page]:
                    del self._holders[page]
                    self._free.append(page)
            branch.pages = []

    def _length(self, group: Group, branch: Branch) -> int:
        """Pages of the whole branch; the last token of an answer is never computed."""
        return -(-(len(branch.prompt_token_ids) + group.limit - 1) // self.block_size)

    def _shareable(self, group: Group, branch: Branch) -> int:
        """Whole pages of the head in common with the first branch, leaving each a token to compute."""
        lead = group.branches[0]
        if branch is lead:
            return 0
        common = 0
        for ours, theirs in zip(branch.prompt_token_ids[:-1], lead.prompt_token_ids[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        return common // self.block_size
