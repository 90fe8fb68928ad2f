"""Synchronous engine: decode requests in one batch and return their outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, overload

from ..kernels.common.errors import InputError
from .base_engine import BaseEngine
from .outputs import Delta, Output, Timings
from .request import Request

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    import torch

    from .sequence.sequence import SequenceGroup


class Engine(BaseEngine):
    """Decode requests on one model. One thread at a time may call it; `AsyncEngine` serves many.

    progress(done, total) is called with byte counts while the model is downloaded and loaded.
    Raises InputError when the model cannot be loaded as configured, RunError when memory is short.
    """

    @overload
    def generate(self, requests: Request) -> Output: ...

    @overload
    def generate(self, requests: Sequence[Request]) -> list[Output]: ...

    def generate(self, requests: Request | Sequence[Request]) -> Output | list[Output]:
        """Answer one request, or a list of them decoded in one batch; outputs keep the order of the list.

        A single invalid request raises InputError. An invalid item of a list does not raise: its output has
        finish_reason "error" and the reason in `error`.
        """
        if isinstance(requests, Request | str) or not isinstance(requests, Iterable):
            return self._run_to_completion([self._core.create_groups(requests)])[0]
        members: list[list[SequenceGroup] | Output] = []
        for request in requests:
            try:
                members.append(self._core.create_groups(request))
            except InputError as error:
                members.append(_error_output(str(error)))
        answers = iter(self._run_to_completion([member for member in members if isinstance(member, list)]))
        return [member if isinstance(member, Output) else next(answers) for member in members]

    def stream(self, request: Request) -> Iterator[Delta]:
        """Stream the deltas of one request; the last Delta of each of its n answers has `output`.

        Leaving the loop early aborts the request. Streams may be read alternately: all decode in one batch.
        Raises InputError when the request is invalid.
        """
        return self._iter_deltas(self._core.create_groups(request))

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each position: [len(token_ids), vocab] float32.

        Raises InputError when the ids are empty, too many or outside the vocabulary, and RunError when the
        model returns NaN.
        """
        return self._core.score(token_ids)

    def close(self) -> None:
        """End the worker processes; nothing is decoded after.

        Idempotent. Also called at interpreter exit and when the engine is garbage-collected.
        """
        self._core.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _iter_deltas(self, groups: list[SequenceGroup]) -> Iterator[Delta]:
        with closing(self._run(groups)) as run:
            for _, delta in run:
                yield delta

    def _step(self) -> None:
        """Run a step. If it fails or is interrupted, all groups that ran in it end, of any caller."""
        try:
            self._core.step()
        except BaseException as error:
            self._core.fail_step(error)
            raise

    def _run_to_completion(self, group_lists: list[list[SequenceGroup]]) -> list[Output]:
        """Run all groups to their end; return one output per list of groups, with its samples merged."""
        all_groups = [group for groups in group_lists for group in groups]
        outputs = {group: delta.output for group, delta in self._run(all_groups) if delta.output}
        return [merge_outputs([outputs[group] for group in groups]) for groups in group_lists]

    def _run(self, groups: list[SequenceGroup]) -> Generator[tuple[SequenceGroup, Delta], None, None]:
        """Step until these groups have ended, yielding their deltas; always remove them at the end."""
        core = self._core
        try:
            for group in groups:
                core.scheduler.add(group)
            unfinished = list(groups)
            while unfinished:
                if not any(group.pending_deltas for group in unfinished):
                    self._step()
                for group in unfinished:
                    while group.pending_deltas:
                        yield group, group.pending_deltas.popleft()
                unfinished = [group for group in unfinished if not group.is_finished or group.pending_deltas]
        finally:
            for group in groups:
                core.scheduler.remove(group)


def merge_outputs(outputs: list[Output]) -> Output:
    """A request's first output with all its samples in `outputs`, itself included."""
    return replace(outputs[0], outputs=outputs)


def _error_output(reason: str) -> Output:
    timings = Timings(queue=0.0, prefill=0.0, decode=0.0, tokens_per_second=0.0)
    return merge_outputs([Output("", [], "error", [], None, None, timings, seed=0, error=reason)])
