"""The engine for programs that wait for their answers: requests in, answers out, all in one batch."""

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
    """Decodes requests on one model. One thread at a time may call it; `AsyncEngine` serves many.

    progress(done, total) is told of the bytes as the model is fetched and loaded.
    Raises InputError when the model cannot be loaded as configured, RunError when memory is short.
    """

    @overload
    def generate(self, requests: Request) -> Output: ...

    @overload
    def generate(self, requests: Sequence[Request]) -> list[Output]: ...

    def generate(self, requests: Request | Sequence[Request]) -> Output | list[Output]:
        """Answers one request, or a list of them decoded together, in their order.

        A single request that is wrong raises InputError. A list never raises for one item: its output then
        has finish_reason "error" and says why.
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
        """Answers one request piece by piece; each of its n answers ends with a Delta that has `output`.

        Leaving the loop early aborts the request. Streams may be read in turn: all decode in one batch.
        Raises InputError when the request is wrong.
        """
        return self._iter_deltas(self._core.create_groups(request))

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each position: [len(token_ids), vocab] float32.

        Raises InputError when there are no ids, too many, or one that the model does not have, and RunError
        when the model is broken and gives no number.
        """
        return self._core.score(token_ids)

    def close(self) -> None:
        """Ends the processes that hold other parts of the model, after which nothing is decoded.

        May be called again; the end of the program does it too, and that of the last reference to the engine.
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
        """A step; one that fails or is interrupted ends all that ran in it, whoever asked for that."""
        try:
            self._core.step()
        except BaseException as error:
            self._core.fail_step(error)
            raise

    def _run_to_completion(self, group_lists: list[list[SequenceGroup]]) -> list[Output]:
        """Runs all groups to their end; one output for each member, which holds its samples."""
        all_groups = [group for groups in group_lists for group in groups]
        outputs = {group: delta.output for group, delta in self._run(all_groups) if delta.output}
        return [merge_outputs([outputs[group] for group in groups]) for groups in group_lists]

    def _run(self, groups: list[SequenceGroup]) -> Generator[tuple[SequenceGroup, Delta], None, None]:
        """Steps until these groups have ended, yielding their deltas; they leave the engine in any case."""
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
    """A request's answer that holds all its samples, itself the first."""
    return replace(outputs[0], outputs=outputs)


def _error_output(reason: str) -> Output:
    timings = Timings(queue=0.0, prefill=0.0, decode=0.0, tokens_per_second=0.0)
    return merge_outputs([Output("", [], "error", [], None, None, timings, seed=0, error=reason)])
