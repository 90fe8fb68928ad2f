"""Per-request record: updates the metrics and writes one log line at the end."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from .errors import ApiError, shutting_down, to_api_error
from .protocol import IGNORED_FIELDS, NOOP_VALUES, ChatCompletionRequest, CompletionRequest
from .responses import count_branch_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..outputs import BranchPrompt, Delta, Output
    from .metrics import Metrics
    from .requests import ParsedCall

LOG = logging.getLogger("trimtab.server")
LOGGED_FIELDS = frozenset(
    {*IGNORED_FIELDS, *NOOP_VALUES, *ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}
)
"""Field names that may be logged: any other key of a body may be user text and is not logged."""


class RequestLog:
    """Record of one HTTP request, from its arrival to `finish`, which is called exactly once."""

    def __init__(self, id: str, path: str, client: str, metrics: Metrics, log_prompts: bool) -> None:
        self.id = id
        self.outputs: dict[int, Output] = {}
        self._num_choices = 1
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self._entry: dict[str, Any] = {"time": now, "id": id, "path": path, "client": client}
        self._metrics, self._log_prompts, self._start_time = metrics, log_prompts, time.perf_counter()
        self._last_token_times: dict[int, float] = {}
        self._first_token_time: float | None = None
        self._num_tokens = 0

    def on_parsed(self, parsed: ParsedCall, values: dict[str, Any]) -> None:
        """Record the parsed request; `values` is its JSON body."""
        request = parsed.requests[0]
        self._num_choices = request.sampling.n
        num_branches = 1 + len(request.steering.branch_objectives())
        self._entry |= {
            "method": request.steering.name,
            "branches": num_branches,
            "answers": parsed.num_choices,
            "stream": parsed.stream,
        }
        if self._log_prompts:
            self._entry["body"] = values
        for _ in range(parsed.num_choices):
            self._metrics.branches.observe(num_branches)

    def on_delta(self, index: int, delta: Delta) -> None:
        """Record a delta of choice `index`."""
        now = time.perf_counter()
        if delta.token_ids:
            self._num_tokens += len(delta.token_ids)
            if index in self._last_token_times:
                self._metrics.inter_token_latency.observe(now - self._last_token_times[index])
            else:
                self._metrics.ttft.observe(now - self._start_time)
                self._first_token_time = self._first_token_time or now
            self._last_token_times[index] = now
        if delta.output is not None:
            self.outputs[index] = delta.output
            self._metrics.successes.labels(delta.output.finish_reason).inc()
            self._metrics.queue_time.observe(delta.output.timings.queue)

    @property
    def prompts(self) -> list[Sequence[BranchPrompt]]:
        """The branch prompts of each request that has a finished answer."""
        return [
            output.branches
            for index, output in sorted(self.outputs.items())
            if index % self._num_choices == 0
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens generated so far, over all choices."""
        return self._num_tokens

    def convert_error(self, error: BaseException) -> ApiError:
        """Convert an exception to an ApiError; log the traceback of an unexpected one."""
        failure = shutting_down() if isinstance(error, asyncio.CancelledError) else to_api_error(error)
        if failure.status == 500 and not isinstance(error, ApiError):
            LOG.error("request %s failed", self.id, exc_info=error)
        return failure

    def finish(self, failure: ApiError | None = None) -> None:
        """Update the metrics and write the log line. `failure` is None for success; 499 for a disconnect.

        A client error is logged by its field only, because the message may quote the prompt.
        """
        status = 200 if failure is None else failure.status
        seconds = time.perf_counter() - self._start_time
        outputs = [self.outputs[index] for index in sorted(self.outputs)]
        self._metrics.generation_tokens.inc(self._num_tokens)
        if outputs:
            prompt_lens = count_branch_tokens(self.prompts)
            self._metrics.prompt_tokens.inc(prompt_lens[0])
            self._metrics.branch_tokens.inc(sum(prompt_lens[1:]))
            self._entry |= {
                "prompt_tokens": prompt_lens,
                "finish_reason": [output.finish_reason for output in outputs],
                "queue": round(outputs[0].timings.queue, 4),
            }
        if status == 200:
            self._metrics.e2e_latency.observe(seconds)
        else:
            self._metrics.errors.labels(str(status)).inc()
        self._entry |= {"status": status, "tokens": self._num_tokens, "seconds": round(seconds, 4)}
        if self._first_token_time is not None:
            self._entry["first_token"] = round(self._first_token_time - self._start_time, 4)
        if failure is not None:
            param = re.split(r"[.\[]", failure.param or "")[0]
            if param in LOGGED_FIELDS:
                self._entry["param"] = param
            if status >= 500 or self._log_prompts:
                self._entry["error"] = failure.message
        if self._log_prompts and outputs:
            self._entry["answer"] = [output.text for output in outputs]
        LOG.info(json.dumps(self._entry, default=str))
