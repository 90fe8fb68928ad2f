"""Output state of an answer: text, finish reason, trace and log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...kernels.common.profiling import in_stage
from ..outputs import TokenLogprobs, Trace
from .stop_strings import StopStringMatcher

if TYPE_CHECKING:
    from ...models.tokenizer.tokenizer import Tokenizer
    from ..outputs import SampledToken
    from ..sampling_params import SamplingParams


class OutputState:
    """Text and trace of one answer; `finish_reason` is None until it ends."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, trace: bool) -> None:
        eos_ids = () if sampling.ignore_eos else tokenizer.eos_token_ids
        # the text of a special token may never be part of the answer's text: it stops as a token
        self._stop_texts = {
            token_id: text
            for text in sampling.stop
            if (token_id := tokenizer.added_token_id(text)) is not None
        }
        self.stop_token_ids = frozenset((*eos_ids, *sampling.stop_token_ids, *self._stop_texts))
        self.text = ""
        self.trace = Trace() if trace else None
        self.logprobs: list[TokenLogprobs] | None = None if sampling.logprobs is None else []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.fulfilment: list[float | None] = []
        self._sampling = sampling
        self._num_tokens = 0
        self._detokenizer = tokenizer.detokenizer(sampling.skip_special_tokens)
        self._stop_matcher = StopStringMatcher(sampling.stop, sampling.include_stop_str_in_output)

    @in_stage("text")
    def append(self, sampled: SampledToken, max_new_tokens: int) -> str:
        """Add a token and return the text that it makes final; set `finish_reason` at the last token."""
        self._num_tokens += 1
        self.fulfilment = sampled.fulfilment
        self._record_token(sampled)
        if sampled.token_id in self.stop_token_ids:
            new_text, self.finish_reason = self._flush(), "stop"
            if self._sampling.include_stop_str_in_output:
                new_text += self._stop_texts.get(sampled.token_id, "")
        else:
            new_text, stopped = self._match_stops(self._detokenizer.step([sampled.token_id]))
            if stopped:
                self.finish_reason = "stop"
            elif self._num_tokens >= max_new_tokens or self._has_pending_stop():
                self.finish_reason = "length"
                new_text += self._flush()
        self.text += new_text
        return new_text

    def end(self, finish_reason: str, error: str) -> str:
        """End the answer early and return its pending text."""
        try:
            new_text = self._flush()
        except Exception:  # the answer may end because detokenizing failed
            new_text = ""
        self.finish_reason, self.error = finish_reason, error
        self.text += new_text
        return new_text

    def _record_token(self, sampled: SampledToken) -> None:
        if self.trace is not None:
            self.trace.weights.append(sampled.weights)
            self.trace.rewards.append(sampled.rewards)
            self.trace.fulfilment.append(sampled.fulfilment)
            self.trace.strength.append(sampled.strength)
            self.trace.kl.append(sampled.kl)
            self.trace.branch_logprobs.append(sampled.branch_logprobs)
        if self.logprobs is not None:
            top_logprobs = dict(sampled.top_logprobs[: self._sampling.logprobs])
            self.logprobs.append(TokenLogprobs(sampled.token_id, sampled.logprob, top_logprobs))

    def _match_stops(self, text: str) -> tuple[str, bool]:
        """Search for stop strings, unless the answer is shorter than min_tokens."""
        if self._num_tokens < self._sampling.min_tokens:
            return text, False
        return self._stop_matcher.step(text)

    def _has_pending_stop(self) -> bool:
        """Whether the pending text completes a stop string, so that no more tokens are needed."""
        check_stops = self._sampling.stop and self._num_tokens >= self._sampling.min_tokens
        return bool(check_stops) and self._stop_matcher.would_match(self._detokenizer.pending)

    def _flush(self) -> str:
        """Return the pending text: an incomplete character or an unmatched prefix of a stop string."""
        new_text, _ = self._match_stops(self._detokenizer.flush())
        new_text += self._stop_matcher.flush()
        if self._stop_matcher.matched:
            self.finish_reason = "stop"
        return new_text
