"""Sequence groups: the branches of one answer, scheduled, finished and aborted as a unit."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...kernels.common.errors import short_repr
from ...kernels.common.profiling import in_stage
from ...kernels.steering.gains import MIN_RANGE
from ...kernels.steering.rewards import SUM
from ..outputs import Delta, Output, Timings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..outputs import BranchPrompt, SampledToken
    from ..request import Request
    from .output_processor import OutputState

MIN_TOKENS_TO_JUDGE = 16
"""Tokens of an answer from which on an objective without effect is noted."""


@dataclass(eq=False)
class Branch:
    """One prompt being decoded, with its block table; blocks of a common prefix are shared.

    The K and V of `num_computed_tokens` ≤ len(prompt) + len(answer) tokens are in the cache. block_hashes:
    hashes of its full blocks, as far as they have been computed.
    """

    index: int
    prompt_token_ids: list[int]
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    block_hashes: list[bytes] = field(default_factory=list)


@dataclass(eq=False)
class SequenceGroup:
    """One answer being decoded: the active branches, in lockstep, and the tokens appended to all of them.

    `max_new_tokens` is the limit from the context length and max_tokens. `state_row` is its row of the
    `SteeringState`, kept from admission to its end, also while preempted. `rope_length` is the length that a
    dynamic RoPE scales its keys by; groups share blocks only if it is equal.
    """

    request: Request
    prompts: list[BranchPrompt]
    branches: list[Branch]
    output_state: OutputState
    sample_index: int
    seed: int
    max_new_tokens: int
    rope_length: int = 0
    state_row: int = -1
    output_ids: list[int] = field(default_factory=list)
    arrival_time: float = field(default_factory=time.perf_counter)
    scheduled_time: float = 0.0
    first_token_time: float = 0.0
    pending_deltas: deque[Delta] = field(default_factory=deque)

    def num_uncomputed(self, branch: Branch) -> int:
        """Number of the branch's tokens that are not computed yet."""
        return len(branch.prompt_token_ids) + len(self.output_ids) - branch.num_computed_tokens

    def get_token_ids(self, branch: Branch, start: int, count: int) -> list[int]:
        """`count` token ids from `start` of the branch's prompt followed by the answer."""
        prompt = branch.prompt_token_ids
        if start >= len(prompt):
            return self.output_ids[start - len(prompt) : start - len(prompt) + count]
        return (prompt[start : start + count] + self.output_ids[: max(0, start + count - len(prompt))])[
            :count
        ]

    @property
    def is_active(self) -> bool:
        """Whether it has been admitted and not removed since; a finished group is removed."""
        return self.state_row >= 0

    @property
    def uses_penalties(self) -> bool:
        """Whether the scores of the next token depend on the answer through penalties."""
        sampling = self.request.sampling
        penalties = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty - 1
        return any(penalties)

    @property
    def is_finished(self) -> bool:
        """Whether the answer has ended."""
        return self.output_state.finish_reason is not None

    @in_stage("append")
    def append(self, sampled: SampledToken, now: float) -> None:
        """Append a sampled token to the answer and all branches, and queue its delta."""
        self.first_token_time = self.first_token_time or now
        if sampled.failed:
            position = len(self.output_ids) + 1
            self.end(
                "error",
                f"the model gave no finite score to any allowed token at token {position} of the answer",
                now,
            )
            return
        self.output_ids.append(sampled.token_id)
        self._emit(self.output_state.append(sampled, self.max_new_tokens), len(self.output_ids) - 1, now)

    def end(self, reason: str, error: str, now: float) -> None:
        """End the answer early with reason "error" or "abort", and queue its last delta."""
        self._emit(self.output_state.end(reason, error), len(self.output_ids), now)

    def _emit(self, text: str, start: int, now: float) -> None:
        """Queue a delta of the new text and the tokens from `start` on."""
        trace, logprobs = self.output_state.trace, self.output_state.logprobs
        self.pending_deltas.append(
            Delta(
                index=self.sample_index,
                text=text,
                token_ids=self.output_ids[start:],
                trace=None if trace is None else trace.tail(start),
                logprobs=None if logprobs is None else logprobs[start:],
                output=self.make_output(now) if self.is_finished else None,
            )
        )

    def make_output(self, now: float) -> Output:
        """The output of the ended answer."""
        assert self.output_state.finish_reason is not None, "the answer has not ended"
        scheduled_time = self.scheduled_time or now
        first_token_time = self.first_token_time or now
        decode = now - first_token_time
        rate = (len(self.output_ids) - 1) / decode if decode > 0 else 0.0
        queue, prefill = scheduled_time - self.arrival_time, first_token_time - scheduled_time
        return Output(
            text=self.output_state.text,
            token_ids=list(self.output_ids),
            finish_reason=self.output_state.finish_reason,
            branches=self.prompts,
            trace=self.output_state.trace,
            logprobs=self.output_state.logprobs,
            timings=Timings(queue, prefill, decode, rate),
            seed=self.seed,
            error=self.output_state.error,
            fulfilment=list(self.output_state.fulfilment),
            notes=[*self.request.steering.notes(), *self._unknown_objectives()],
        )

    def _unknown_objectives(self) -> Iterator[str]:
        """A note for each objective whose prompt hardly changes the model's predictions."""
        num_tokens, method = len(self.output_ids), self.request.steering
        is_measured = self.request.trace or method.cached_coefficients.max_gain
        if num_tokens < MIN_TOKENS_TO_JUDGE or not is_measured:
            return
        texts, weights = method.branch_objectives(), method.weights()
        for text, weight, value in zip(texts, weights, self.output_state.fulfilment, strict=True):
            if weight > 0 and value is None and method.cached_coefficients.accumulate == SUM:
                yield (
                    f"the model hardly reacts to objective {short_repr(text)}: its prompt changed the "
                    f"predictions by less than {MIN_RANGE:g} nat in {num_tokens} tokens"
                )
