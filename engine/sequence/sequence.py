"""A request at work: the branch group that is admitted, stepped, finished and aborted as a whole."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..outputs import Delta, Output, Timings

if TYPE_CHECKING:
    from ..outputs import BranchPrompt, Pick
    from ..request import Request
    from .output_processor import Answer


@dataclass(eq=False)
class Branch:
    """One prompt being decoded, with its page table; pages of a common head are shared.

    `computed` tokens have their K and V in the cache, and computed ≤ len(prompt) + len(answer) always.
    hashes: what the full pages of its tokens are known by, as far as anybody asked.
    """

    index: int
    prompt_token_ids: list[int]
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    hashes: list[bytes] = field(default_factory=list)


@dataclass(eq=False)
class Group:
    """One answer being decoded: the branches that run, in lockstep, and the tokens appended to all of them.

    `limit` is the longest answer that fits the context and max_tokens. `row` is its row of the SteerTable,
    which it keeps from its admission to its end, also while it is preempted. `turned_by` is the length that a
    dynamic rope turns its keys by, so that groups share pages only where it is the same.
    """

    request: Request
    prompts: list[BranchPrompt]
    branches: list[Branch]
    answer: Answer
    sample: int
    seed: int
    limit: int
    turned_by: int = 0
    row: int = -1
    tokens: list[int] = field(default_factory=list)
    arrived: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0
    first_token: float = 0.0
    outbox: deque[Delta] = field(default_factory=deque)

    def waiting(self, branch: Branch) -> int:
        """How many of the branch's tokens are not computed yet; it has caught up when this is 0."""
        return len(branch.prompt_token_ids) + len(self.tokens) - branch.computed

    def token_ids(self, branch: Branch, start: int, count: int) -> list[int]:
        """`count` of the branch's token ids from `start` on, prompt and answer in one."""
        prompt = branch.prompt_token_ids
        if start >= len(prompt):
            return self.tokens[start - len(prompt) : start - len(prompt) + count]
        return (prompt[start : start + count] + self.tokens[: max(0, start + count - len(prompt))])[:count]

    @property
    def present(self) -> bool:
        """Whether it has been admitted and not been taken out since, which follows upon its end."""
        return self.row >= 0

    @property
    def looks_back(self) -> bool:
        """Whether which tokens it has chosen changes the scores of the next."""
        sampling = self.request.sampling
        penalties = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1
        return any(penalties)

    @property
    def ended(self) -> bool:
        """Whether the answer has its last token."""
        return self.answer.finish_reason is not None

    def append(self, pick: Pick, now: float) -> None:
        """Takes the token that a step chose: to every branch, to the answer, and to whoever reads it."""
        self.first_token = self.first_token or now
        if pick.failed:
            place = len(self.tokens) + 1
            self.end(
                "error",
                f"the model gave no finite score to any allowed token at token {place} of the answer",
                now,
            )
            return
        self.tokens.append(pick.token)
        self._tell(self.answer.append(pick, self.limit), len(self.tokens) - 1, now)

    def end(self, reason: str, error: str, now: float) -> None:
        """Ends the answer before its time, "error" or "abort": what it has so far is told."""
        self._tell(self.answer.end(reason, error), len(self.tokens), now)

    def _tell(self, text: str, start: int, now: float) -> None:
        """Text that is new, and the tokens from `start` on."""
        trace, logprobs = self.answer.trace, self.answer.logprobs
        self.outbox.append(
            Delta(
                index=self.sample,
                text=text,
                token_ids=self.tokens[start:],
                trace=None if trace is None else trace.since(start),
                logprobs=None if logprobs is None else logprobs[start:],
                output=self.output(now) if self.ended else None,
            )
        )

    def output(self, now: float) -> Output:
        """The answer, which has ended."""
        assert self.answer.finish_reason is not None, "the answer has not ended"
        admitted = self.admitted or now
        first = self.first_token or now
        decode = now - first
        rate = (len(self.tokens) - 1) / decode if decode > 0 else 0.0
        queue, prefill = admitted - self.arrived, first - admitted
        return Output(
            text=self.answer.text,
            token_ids=list(self.tokens),
            finish_reason=self.answer.finish_reason,
            branches=self.prompts,
            trace=self.answer.trace,
            logprobs=self.answer.logprobs,
            timings=Timings(queue, prefill, decode, rate),
            seed=self.seed,
            error=self.answer.error,
        )
