"""What is kept of a request while it is served: for the metrics, and for its one line in the log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from dataclasses import fields
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from .errors import ApiError, api_error, stopped
from .protocol import IGNORED, NEUTRAL, SAMPLING, ChatBody, CompletionBody
from .responses import branch_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..outputs import BranchPrompt, Delta, Output
    from .metrics import Metrics
    from .requests import Asked

LOG = logging.getLogger("trimtab.server")
NAMES = frozenset({*IGNORED, *NEUTRAL, *(f.name for f in (*fields(ChatBody), *fields(CompletionBody)))})
"""Of fields: what else stands in a body may be anybody's words, and is not logged."""


class Record:
    """One request, from its arrival to `end`, which is called once however it ends."""

    def __init__(self, id: str, path: str, client: str, metrics: Metrics, prompts: bool) -> None:
        self.id = id
        self.outputs: dict[int, Output] = {}
        self._n = 1
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self._line: dict[str, Any] = {"time": now, "id": id, "path": path, "client": client}
        self._metrics, self._prompts, self._start = metrics, prompts, time.perf_counter()
        self._last: dict[int, float] = {}
        self._first: float | None = None
        self._tokens = 0

    def asked(self, asked: Asked, values: dict[str, Any]) -> None:
        """What the client wants has been understood."""
        request = asked.requests[0]
        self._n = request.sampling.n
        branches = 1 + len(request.steering.branches())
        self._line |= {
            "method": request.steering.name,
            "branches": branches,
            "answers": asked.answers,
            "stream": asked.stream,
        }
        if self._prompts:
            self._line["body"] = values
        for _ in range(asked.answers):
            self._metrics.branches.observe(branches)

    def saw(self, index: int, delta: Delta) -> None:
        """A piece of answer `index` has come."""
        now = time.perf_counter()
        if delta.token_ids:
            self._tokens += len(delta.token_ids)
            if index in self._last:
                self._metrics.between.observe(now - self._last[index])
            else:
                self._metrics.first_token.observe(now - self._start)
                self._first = self._first or now
            self._last[index] = now
        if delta.output is not None:
            self.outputs[index] = delta.output
            self._metrics.successes.labels(delta.output.finish_reason).inc()
            self._metrics.queue.observe(delta.output.timings.queue)

    @property
    def prompts(self) -> list[Sequence[BranchPrompt]]:
        """The branches of each request of which an answer has ended."""
        return [output.branches for index, output in sorted(self.outputs.items()) if index % self._n == 0]

    @property
    def tokens(self) -> int:
        """Of all answers, so far."""
        return self._tokens

    def failure(self, error: BaseException) -> ApiError:
        """What is told of an error; the log says where a defect is."""
        failure = stopped() if isinstance(error, asyncio.CancelledError) else api_error(error)
        if failure.status == 500 and not isinstance(error, ApiError):
            LOG.error("request %s failed", self.id, exc_info=error)
        return failure

    def end(self, failure: ApiError | None = None) -> None:
        """The response has been sent, or is this failure, or nobody waits for it any more (499).

        A client's own mistake is logged by the field that it is in: the sentence may quote the prompt.
        """
        status = 200 if failure is None else failure.status
        seconds = time.perf_counter() - self._start
        outputs = [self.outputs[index] for index in sorted(self.outputs)]
        self._metrics.generation_tokens.inc(self._tokens)
        if outputs:
            lengths = branch_tokens(self.prompts)
            self._metrics.prompt_tokens.inc(lengths[0])
            self._metrics.branch_tokens.inc(sum(lengths[1:]))
            self._line |= {
                "prompt_tokens": lengths,
                "finish_reason": [output.finish_reason for output in outputs],
                "queue": round(outputs[0].timings.queue, 4),
            }
        if status == 200:
            self._metrics.whole.observe(seconds)
        else:
            self._metrics.refusals.labels(str(status)).inc()
        self._line |= {"status": status, "tokens": self._tokens, "seconds": round(seconds, 4)}
        if self._first is not None:
            self._line["first_token"] = round(self._first - self._start, 4)
        if failure is not None:
            param = re.split(r"[.\[]", failure.param or "")[0]
            if param in NAMES or param in SAMPLING:
                self._line["param"] = param
            if status >= 500 or self._prompts:
                self._line["error"] = failure.message
        if self._prompts and outputs:
            self._line["answer"] = [output.text for output in outputs]
        LOG.info(json.dumps(self._line, default=str))
