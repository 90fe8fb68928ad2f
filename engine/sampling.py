"""How a token is chosen from the steered distribution, and when an answer ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..kernels.errors import InputError
from .options import option

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """Per-request sampling, with the field's names (vLLM, transformers).

    Applied to the steered scores in this order: bans and logit_bias, penalties, temperature, top_k,
    top_p, min_p, then the arg max (temperature 0) or a draw. A threshold keeps all tokens that tie at it.
    Repetition looks at the base branch's prompt and the answer, presence and frequency at the answer.
    """

    n: int = option(1, "how many answers to draw")
    max_tokens: int = option(256, "longest answer, in tokens")
    min_tokens: int = option(0, "no end of answer before this many tokens")
    temperature: float = option(0.0, "0 is greedy; 1 draws from the steered distribution as it is")
    top_k: int = option(0, "keep the k likeliest tokens; 0 keeps all")
    top_p: float = option(1.0, "keep the smallest set of tokens with this probability mass")
    min_p: float = option(0.0, "keep tokens at least this likely relative to the likeliest")
    seed: int | None = option(None, "seed of the random draws; none picks one and reports it")
    stop: tuple[str, ...] = option((), "end the answer before this text (may be given several times)")
    stop_token_ids: tuple[int, ...] = option(
        (), "end the answer at this token id (may be given several times)"
    )
    ignore_eos: bool = option(False, "do not end at the model's end-of-text tokens")
    logprobs: int | None = option(
        None, f"report this many likeliest tokens at each place, up to {MAX_LOGPROBS}"
    )
    logit_bias: dict[int, float] = option(
        dict, "add to a token's score, as ID=BIAS (may be given several times)"
    )
    repetition_penalty: float = option(1.0, "> 1 makes tokens of the prompt and the answer less likely")
    presence_penalty: float = option(0.0, "> 0 makes tokens of the answer less likely, once")
    frequency_penalty: float = option(0.0, "> 0 makes tokens of the answer less likely, for every use")
    skip_special_tokens: bool = option(True, "leave special tokens out of the text")
    include_stop_str_in_output: bool = option(False, "keep the stop text at the end of the answer")

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, ok, right in self._rules():
            if not ok:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be {right}")

    def _rules(self) -> list[tuple[str, bool, str]]:
        def number(value: float, low: float, high: float = math.inf) -> bool:
            return math.isfinite(value) and low <= value <= high

        return [
            ("n", isinstance(self.n, int) and self.n >= 1, "a whole number ≥ 1"),
            ("max_tokens", isinstance(self.max_tokens, int) and self.max_tokens >= 1, "a whole number ≥ 1"),
            (
                "min_tokens",
                0 <= self.min_tokens <= self.max_tokens,
                f"from 0 to max_tokens ({self.max_tokens})",
            ),
            ("temperature", number(self.temperature, 0), "a finite number ≥ 0"),
            (
                "top_k",
                isinstance(self.top_k, int) and 0 <= self.top_k < 2**31,
                "a whole number ≥ 0, 0 for all tokens",
            ),
            ("top_p", number(self.top_p, 0, 1) and self.top_p > 0, "above 0 and at most 1"),
            ("min_p", number(self.min_p, 0, 1), "from 0 to 1"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "texts that are not empty"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
            (
                "logit_bias",
                all(math.isfinite(b) for b in self.logit_bias.values()),
                "finite numbers by token id",
            ),
            (
                "repetition_penalty",
                number(self.repetition_penalty, 0) and self.repetition_penalty > 0,
                "above 0",
            ),
            ("presence_penalty", number(self.presence_penalty, -2, 2), "from -2 to 2"),
            ("frequency_penalty", number(self.frequency_penalty, -2, 2), "from -2 to 2"),
        ]
