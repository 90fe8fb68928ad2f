"""The pages of the KV cache: who holds which, what they hold, and all-or-nothing reservation for a group.

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

    from ..sequence.sequence import Branch, Group


class KVBlocks:
    """A pool of `total` pages of `block_size` tokens, counted by reference.

    caching: keep the pages of what has ended for whoever begins alike. Without it pages are shared only
    among branches that run at the same time.
    dense: keep what is held at the beginning of the pool, which is read as it lies up to there on a CPU.
    fresh: pages given out that must be cleared before their first use; whoever does so empties the list.
    found: how many tokens branches did not have to compute, since their pages were known.
    """

    def __init__(self, total: int, block_size: int, caching: bool = True, dense: bool = True) -> None:
        self.total, self.block_size, self.caching, self.dense = total, block_size, caching, dense
        self.fresh: list[int] = []
        self.found = 0
        self.forget([])

    def forget(self, groups: Iterable[Group]) -> None:
        """Frees every page and knows none any more, in whatever state an interruption has left them.

        groups: all who may hold any; they stand at their beginning again.
        """
        for group in groups:
            for branch in group.branches:
                branch.pages, branch.computed = [], 0
        self._empty = list(range(self.total))  # a heap: what is given out lies at the beginning
        self._kept: OrderedDict[int, None] = OrderedDict()  # held by nobody, but known by hash; oldest first
        self._holders = [0] * self.total
        self._hash: dict[int, bytes] = {}
        self._page: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """How many pages nobody holds."""
        return len(self._empty) + len(self._kept)

    def pages_for(self, tokens: int) -> int:
        """How many pages hold so many tokens of a branch."""
        return -(-tokens // self.block_size)

    def needed(self, group: Group) -> int:
        """Pages to begin with: those of all its tokens, shared ones counted once and held ones not at all."""
        return self._count(group, len(group.tokens), self._is_held)

    def most(self, group: Group) -> int:
        """Pages of its longest answer, shared ones counted once; an answer's last token is never computed."""
        return self._count(group, group.limit - 1, lambda key: False)

    def _count(self, group: Group, answer: int, is_there: Callable[[bytes], bool]) -> int:
        known, count = set[bytes](), 0
        for branch in group.branches:
            there = len(branch.prompt_token_ids) + len(group.tokens)
            size = len(branch.prompt_token_ids) + answer
            shareable = self._chain(group, branch, (there - 1) // self.block_size)
            new = [key for key in shareable if key not in known and not is_there(key)]
            known.update(new)
            count += len(new) + self.pages_for(size) - len(shareable)
        return count

    def match(self, group: Group, branch: Branch, claimed: set[bytes]) -> bool:
        """Gives a branch that stands at the end of a page the known pages that come next.

        One token at least is left to compute. Returns False when the page after that is among `claimed`: one
        that another branch is computing.
        """
        size = len(branch.prompt_token_ids) + len(group.tokens)
        while branch.computed == len(branch.pages) * self.block_size < size - self.block_size:
            key = self._chain(group, branch, len(branch.pages) + 1)[-1]
            page = self._page.get(key)
            if page is None:
                return key not in claimed
            self._hold(page)
            branch.pages.append(page)
            branch.computed += self.block_size
            self.found += self.block_size
        return True

    def claims(self, group: Group, branch: Branch, count: int) -> Iterable[bytes]:
        """The pages that the branch's next `count` tokens fill, but for its last token."""
        size = len(branch.prompt_token_ids) + len(group.tokens)
        filled = min(branch.computed + count, size - 1) // self.block_size
        return self._chain(group, branch, filled)[branch.computed // self.block_size :]

    def reserve(self, shares: Sequence[tuple[Branch, int]]) -> bool:
        """Gives each branch the pages for so many more tokens; or changes nothing."""
        missing = [self.pages_for(b.computed + count) - len(b.pages) for b, count in shares]
        if sum(max(0, count) for count in missing) > self.free:
            return False
        for (branch, _), count in zip(shares, missing, strict=True):
            for _ in range(count):
                branch.pages.append(self._take())
        return True

    def commit(self, group: Group, branch: Branch, count: int) -> None:
        """The branch's next `count` tokens have been computed: what they filled can be found from now on."""
        first = branch.computed // self.block_size
        branch.computed += count
        full = branch.computed // self.block_size
        if full == first:
            return
        for key, page in zip(self._chain(group, branch, full)[first:], branch.pages[first:full], strict=True):
            if key not in self._page:
                self._page[key], self._hash[page] = page, key

    def release(self, group: Group) -> None:
        """Takes the group's pages back; it stands at its beginning again."""
        for branch in group.branches:
            for page in reversed(branch.pages):  # the ends of texts are forgotten before their beginnings
                self._holders[page] -= 1
                if not self._holders[page]:
                    self._let_go(page)
            branch.pages, branch.computed = [], 0

    def unlearn(self, group: Group) -> None:
        """The group's pages are not found by others any more.

        A token without numbers takes them from those before it too, where a masked weight of 0 meets NaN.
        """
        for branch in group.branches:
            for page in self._hash.keys() & set(branch.pages):
                del self._page[self._hash.pop(page)]

    def compact(self, groups: Iterable[Group]) -> list[tuple[int, int]]:
        """Moves the held pages to the beginning of the pool when they have become sparse.

        Returns the pairs of pages whose contents are to be exchanged; the page tables are changed here.
        """
        if not self.dense:
            return []
        branches = [branch for group in groups for branch in group.branches]
        held = sorted({page for branch in branches for page in branch.pages})
        if not held or held[-1] + 1 <= max(2, len(held) + len(held) // 2):
            return []
        here = set(held)
        holes = [page for page in range(len(held)) if page not in here]
        pairs = list(zip(held[len(held) - len(holes) :], holes, strict=True))
        new = dict(pairs)
        for branch in branches:
            branch.pages = [new.get(page, page) for page in branch.pages]
        for pair in pairs:
            self._exchange(*pair)
        heapify(self._empty)
        return pairs

    def _exchange(self, held: int, free: int) -> None:
        """A held page and one that is free change places."""
        keys = {free: self._hash.pop(held, None), held: self._hash.pop(free, None)}
        for page, key in keys.items():
            if key is not None:
                self._hash[page], self._page[key] = key, page
        self._holders[free], self._holders[held] = self._holders[held], 0
        if free in self._kept:
            self._kept = OrderedDict((held if page == free else page, None) for page in self._kept)
        else:
            self._empty[self._empty.index(free)] = held

    def _chain(self, group: Group, branch: Branch, count: int) -> list[bytes]:
        """The hashes of the branch's first `count` pages, each of its tokens and of the hash before."""
        while len(branch.hashes) < count:
            start = len(branch.hashes) * self.block_size
            before = branch.hashes[-1] if branch.hashes else group.turned_by.to_bytes(8, "little")
            tokens = array("q", group.token_ids(branch, start, self.block_size))
            branch.hashes.append(blake2b(before + tokens.tobytes(), digest_size=16).digest())
        return branch.hashes[:count]

    def _is_held(self, key: bytes) -> bool:
        page = self._page.get(key)
        return page is not None and self._holders[page] > 0

    def _hold(self, page: int) -> None:
        self._kept.pop(page, None)
        self._holders[page] += 1

    def _take(self) -> int:
        if self._empty:
            page = heappop(self._empty)
        else:
            page, _ = self._kept.popitem(last=False)
            del self._page[self._hash.pop(page)]
        self._holders[page] = 1
        self.fresh.append(page)
        return page

    def _let_go(self, page: int) -> None:
        if page in self._hash and self.caching:
            self._kept[page] = None
            return
        if page in self._hash:
            del self._page[self._hash.pop(page)]
        heappush(self._empty, page)
