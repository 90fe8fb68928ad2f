"""An answer as it grows: its text, when it ends, and the trace of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..outputs import TokenLogprobs, Trace
from .stop_strings import StopStrings

if TYPE_CHECKING:
    from ...models.tokenizer.tokenizer import Tokenizer
    from ..outputs import Pick
    from ..sampling_params import SamplingParams


class Answer:
    """One answer's text and trace; `finish_reason` is None until it ends."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams, trace: bool) -> None:
        ends = () if sampling.ignore_eos else tokenizer.eos_token_ids
        self.stop_ids = frozenset((*ends, *sampling.stop_token_ids))
        self.text = ""
        self.trace = Trace() if trace else None
        self.logprobs: list[TokenLogprobs] | None = None if sampling.logprobs is None else []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self._sampling = sampling
        self._count = 0
        self._detokenizer = tokenizer.detokenizer(sampling.skip_special_tokens)
        self._stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output)

    def append(self, pick: Pick, limit: int) -> str:
        """Takes a token and returns the text that is final by it; sets `finish_reason` at the last."""
        self._count += 1
        self._record(pick)
        if pick.token in self.stop_ids:
            new, self.finish_reason = self._close(), "stop"
        else:
            new, stopped = self._push(self._detokenizer.push([pick.token]))
            if stopped:
                self.finish_reason = "stop"
            elif self._count >= limit or self._holds_stop():
                self.finish_reason = "length"
                new += self._close()
        self.text += new
        return new

    def end(self, finish_reason: str, error: str) -> str:
        """Ends the answer before its time and returns the text that was held back."""
        try:
            new = self._close()
        except Exception:  # it ends because of that very text, perhaps
            new = ""
        self.finish_reason, self.error = finish_reason, error
        self.text += new
        return new

    def _record(self, pick: Pick) -> None:
        if self.trace is not None:
            self.trace.weights.append(pick.weights)
            self.trace.rewards.append(pick.rewards)
            self.trace.strength.append(pick.strength)
            self.trace.kl.append(pick.kl)
            self.trace.branch_logprobs.append(pick.branch_logprobs)
        if self.logprobs is not None:
            likeliest = dict(pick.top[: self._sampling.logprobs])
            self.logprobs.append(TokenLogprobs(pick.token, pick.logprob, likeliest))

    def _push(self, text: str) -> tuple[str, bool]:
        """Looks for stop strings, unless the answer is still shorter than min_tokens."""
        if self._count < self._sampling.min_tokens:
            return text, False
        return self._stops.push(text)

    def _holds_stop(self) -> bool:
        """Whether a stop string is complete in text that is held back, so that it need not be waited for."""
        may_stop = self._sampling.stop and self._count >= self._sampling.min_tokens
        return bool(may_stop) and self._stops.ended_by(self._detokenizer.held)

    def _close(self) -> str:
        """What was held back: half a character, or the beginning of a stop string that never came."""
        new, _ = self._push(self._detokenizer.finish())
        new += self._stops.finish()
        if self._stops.hit:
            self.finish_reason = "stop"
        return new
