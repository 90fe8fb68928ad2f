"""Sampling parameters: how a token is drawn from the steered distribution and when an answer ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..kernels.common.errors import InputError, short_repr
from .utils.fields import config_field, validate_rules, validate_types

MAX_N = 128
MAX_LOGPROBS = 20
NO_TOKEN_LIMIT = 2**62
"""From this value of max_tokens on, an answer is limited by the context length and the KV cache alone."""
MAX_TEMPERATURE = 1000.0
MAX_PENALTY = 1000.0
MAX_BIAS = 1e30
"""Scores are float32: larger values would overflow, and a banned token could be chosen."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a request, named as in vLLM and transformers.

    Applied to the steered scores in this order: bans and logit_bias, penalties, temperature, top_k,
    top_p, min_p, then the argmax (temperature 0) or a draw. A threshold keeps all tokens that tie at it.
    The repetition penalty counts the base branch's prompt and the answer, presence and frequency the answer.
    """

    n: int = config_field(1, f"number of answers to draw, up to {MAX_N}")
    max_tokens: int = config_field(256, "maximum tokens of an answer")
    min_tokens: int = config_field(0, "minimum tokens of an answer")
    temperature: float = config_field(0.0, "0 is greedy; 1 draws from the steered distribution as it is")
    top_k: int = config_field(0, "keep the k likeliest tokens; 0 keeps all")
    top_p: float = config_field(1.0, "keep the smallest set of tokens with this probability mass")
    min_p: float = config_field(0.0, "keep tokens at least this likely relative to the likeliest")
    seed: int | None = config_field(None, "seed of the random draws; none draws a seed and reports it")
    stop: tuple[str, ...] = config_field((), "end the answer before this text (may be given several times)")
    stop_token_ids: tuple[int, ...] = config_field(
        (), "end the answer at this token id (may be given several times)"
    )
    ignore_eos: bool = config_field(False, "do not end at the model's end-of-text tokens")
    logprobs: int | None = config_field(
        None, f"report this many likeliest tokens per position, up to {MAX_LOGPROBS}"
    )
    logit_bias: dict[int, float] = config_field(
        dict, "add to a token's score, as ID=BIAS (may be given several times)"
    )
    repetition_penalty: float = config_field(1.0, "> 1 makes tokens of the prompt and the answer less likely")
    presence_penalty: float = config_field(0.0, "> 0 makes tokens of the answer less likely, once")
    frequency_penalty: float = config_field(0.0, "> 0 makes tokens of the answer less likely, per occurrence")
    skip_special_tokens: bool = config_field(True, "leave special tokens out of the text")
    include_stop_str_in_output: bool = config_field(False, "keep the stop text at the end of the answer")

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        validate_types(self)
        validate_rules(self, *self._rules())

    def _rules(self) -> list[tuple[str, bool, str]]:
        """The allowed range of each field. Comparisons with NaN are false, so NaN breaks every rule."""
        return [
            ("n", 1 <= self.n <= MAX_N, f"an integer from 1 to {MAX_N}"),
            ("max_tokens", self.max_tokens >= 1, "an integer ≥ 1"),
            (
                "min_tokens",
                0 <= self.min_tokens <= self.max_tokens,
                f"from 0 to max_tokens ({self.max_tokens})",
            ),
            (
                "temperature",
                0 <= self.temperature <= MAX_TEMPERATURE,
                f"a finite number ≥ 0 and at most {MAX_TEMPERATURE:g}",
            ),
            ("top_k", 0 <= self.top_k < 2**31, "an integer ≥ 0, 0 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "a 64-bit integer"),
            ("stop", all(self.stop), "texts that are not empty"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
            (
                "logit_bias",
                all(abs(bias) <= MAX_BIAS for bias in self.logit_bias.values()),
                f"finite numbers by token id, from {-MAX_BIAS:g} to {MAX_BIAS:g}",
            ),
            (
                "repetition_penalty",
                1 / MAX_PENALTY <= self.repetition_penalty <= MAX_PENALTY,
                f"from {1 / MAX_PENALTY:g} to {MAX_PENALTY:g}",
            ),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
        ]


def from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams from JSON, where keys are strings: convert those of logit_bias to token ids.

    Raises InputError for a key that is not an integer.
    """
    bias = values.get("logit_bias")
    if not isinstance(bias, Mapping):
        return dict(values)
    return {**values, "logit_bias": {_token_id(key): value for key, value in bias.items()}}


def _token_id(key: str) -> int:
    if key.isascii() and key.isdigit() and str(int(key[:20])) == key:
        return int(key)
    raise InputError(f"logit_bias has the key {short_repr(key)}; keys must be token ids", "logit_bias")
