"""What clients send: the bodies of the two generating calls, read and held to what is supported.

Sampling is `SamplingParams`, field by field, so nothing about it is written twice. What is neither supported
nor neutral is refused by name: a client never gets another answer than it asked for without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ...kernels.common.errors import InputError, quoted
from ..sampling_params import SamplingParams, from_json
from ..utils.fields import check_fields, meant, option, refusal, require_fields
from .errors import api_error, bad

OWN = ("max_tokens", "logprobs")
"""Fields of SamplingParams that the two calls spell in their own ways."""
SAMPLING = tuple(field.name for field in fields(SamplingParams) if field.name not in OWN)
ROLES = ("system", "user", "assistant")
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""What says nothing about the answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of the OpenAI API that are not supported, and their values that ask for nothing."""
MOST = {"stop": 64, "stop_token_ids": 1000, "logit_bias": 1000}
"""Entries of a field that each token costs time for, and so the neighbours of a request."""
LONGEST_STOP = 256
"""Characters of a stop text, for the same reason."""
UNBOUNDED = 2**62
"""Of max_tokens: as long as the context allows."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """What both calls take, next to the fields of SamplingParams."""

    model: str | None = option(None, "a name of /v1/models; none takes the one there is")
    stream: bool = option(False, "send the answer piece by piece, as server-sent events")
    stream_options: Mapping[str, Any] | None = option(None, "{'include_usage': true} ends with the usage")
    steering: Any = option(None, "a method toward objectives, or the name of a profile")
    guidance_scale: float | None = option(None, "how far from negative_prompt; 1 is off")
    negative_prompt: str | None = option(None, "an instruction to steer away from")

    def __post_init__(self) -> None:
        check_fields(self)
        _known("stream_options", self.stream_options or {}, ("include_usage", "include_obfuscation"))
        for name, value in (self.stream_options or {}).items():
            if not isinstance(value, bool):
                raise refusal(f"{name} of stream_options", value, "true or false")
        if self.stream_options is not None and not self.stream:
            raise refusal("stream_options", self.stream_options, "left out unless stream is true")
        if self.guidance_scale not in (None, 1) and self.negative_prompt is None:
            raise refusal("guidance_scale", self.guidance_scale, "given together with negative_prompt")
        if self.negative_prompt is not None and self.steering is not None:
            raise refusal("negative_prompt", self.negative_prompt, "left out where steering is given")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool((self.stream_options or {}).get("include_usage"))


@dataclass(frozen=True, kw_only=True)
class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Sequence[Mapping[str, Any]] = option((), "the conversation")
    max_tokens: int | None = option(None, "longest answer, in tokens; none is as long as the context allows")
    max_completion_tokens: int | None = option(None, "the newer name of max_tokens")
    logprobs: bool = option(False, "report each token's log-probability in the steered distribution")
    top_logprobs: int | None = option(None, "and this many of the likeliest tokens")
    chat_template_kwargs: Mapping[str, Any] | None = option(None, "variables for the chat template")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_logprobs is not None and not self.logprobs:
            raise refusal("top_logprobs", self.top_logprobs, "left out unless logprobs is true")
        newer = self.max_completion_tokens
        if newer is not None and self.max_tokens not in (None, newer):
            raise refusal("max_tokens", self.max_tokens, f"max_completion_tokens ({newer}), or left out")
        for index, message in enumerate(self.messages):
            _check_message(index, message)

    @property
    def longest(self) -> int:
        """The most tokens that are asked for."""
        given = [n for n in (self.max_completion_tokens, self.max_tokens) if n is not None]
        return given[0] if given else UNBOUNDED

    @property
    def top(self) -> int | None:
        """How many log-probabilities a token is to be reported with."""
        return (self.top_logprobs or 0) if self.logprobs else None


@dataclass(frozen=True, kw_only=True)
class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Any = option(None, "a text, token ids, or a list of either")
    max_tokens: int | None = option(16, "longest answer, in tokens")
    logprobs: int | None = option(None, "report this many of each place's likeliest tokens")
    echo: bool = option(False, "repeating the prompt is not supported")
    suffix: str | None = option(None, "text after the answer is not supported")
    best_of: int | None = option(None, "choosing among more answers than n is not supported")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fields(
            self,
            ("echo", not self.echo, "false: repeating the prompt is not supported"),
            ("suffix", not self.suffix, "left out: text after the answer is not supported"),
            ("best_of", self.best_of in (None, 1), "left out, or 1"),
        )

    @property
    def longest(self) -> int:
        """The most tokens that are asked for."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def top(self) -> int | None:
        """How many log-probabilities a token is to be reported with."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        right = "a text, a list of token ids, or a list of either that is not empty"
        value = self.prompt
        if isinstance(value, str) or _are_ids(value):
            value = [value]
        if not isinstance(value, list) or not value:
            raise refusal("prompt", value, right)
        for each in value:
            if not isinstance(each, str) and not _are_ids(each):
                raise refusal("prompt", self.prompt, right)
            if not each:
                raise bad("the prompt is empty; ask something", "prompt")
        return value


def read(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises ApiError when there is none; null is as good as left out."""
    try:
        found = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "it is none that can be read"
        raise bad(f"the body is no JSON: {reason}", None) from error
    if not isinstance(found, dict):
        raise bad(f"the body is {quoted(found)}; it must be a JSON object", None)
    return {key: value for key, value in found.items() if value is not None}


def parsed(cls: type[Body], values: Mapping[str, Any]) -> tuple[Any, SamplingParams]:
    """The body, and the sampling that it asks for. Raises ApiError for what is wrong or not supported."""
    own = [field.name for field in fields(cls)]
    for name, value in values.items():
        if name in NEUTRAL and not any(value == ok and type(value) is type(ok) for ok in NEUTRAL[name]):
            raise bad(f"{name} is {quoted(value)}, which is not supported; leave it out", name)
    _known_field({*own, *SAMPLING, *IGNORED, *NEUTRAL}, values)
    for name, most in MOST.items():
        if isinstance(given := values.get(name), list | dict) and len(given) > most:
            raise bad(f"{name} has {len(given)} entries; this server takes {most}", name)
    stops = values.get("stop", ())
    for text in [stops] if isinstance(stops, str) else stops if isinstance(stops, list) else ():
        if isinstance(text, str) and len(text) > LONGEST_STOP:
            raise bad(f"a stop has {len(text)} characters; this server takes {LONGEST_STOP}", "stop")
    try:
        body: Any = cls(**{name: values[name] for name in own if name in values})
        return body, SamplingParams(**_sampling(values), max_tokens=body.longest, logprobs=body.top)
    except InputError as error:
        if error.field == "logprobs" and values.get("logprobs") is True:
            error.field = "top_logprobs"  # as a chat spells it
        raise api_error(error) from error


def _sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    found = {"temperature": 1.0, **{name: values[name] for name in SAMPLING if name in values}}
    if found.get("top_k") == -1:  # vLLM's "all"
        found["top_k"] = 0
    return from_json(found)


def _check_message(index: int, message: Mapping[str, Any]) -> None:
    """What a template would show otherwise, or not at all, is refused."""
    role = message.get("role")
    if role not in ROLES:
        raise bad(
            f"the role of messages[{index}] is {quoted(role)}; known are {', '.join(ROLES)}", "messages"
        )
    for name, value in message.items():
        if name not in ("role", "content", "name") and value:
            raise bad(
                f"messages[{index}] has {quoted(name)}, which is not supported; leave it out", "messages"
            )


def _known_field(known: set[str], values: Mapping[str, Any]) -> None:
    for name in values:
        if name not in known:
            raise bad(
                "; ".join(filter(None, (f"there is no field {quoted(name)}", meant(name, known)))), name
            )


def _known(owner: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in values:
        if name not in known:
            raise bad(f"{owner} has {quoted(name)}; it may have {' and '.join(known)}", owner)


def _are_ids(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(each, int) and not isinstance(each, bool) for each in value)


def _no_number(name: str) -> float:
    raise bad(f"the body holds {name}; JSON has no such number", None)
