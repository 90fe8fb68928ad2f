"""Request bodies of the two generating routes: parsing and validation.

The sampling fields are those of `SamplingParams`, so they are defined only once. A field that is neither
supported nor set to a no-op value is rejected by name: nothing that a client asks for is silently ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, SkipValidation, ValidationError, create_model

from ...kernels.common.errors import InputError, short_repr
from ..sampling_params import NO_TOKEN_LIMIT, SamplingParams, from_json
from ..utils.fields import describe_type, did_you_mean, field_types, invalid_value, validate_rules
from .errors import bad_request, to_api_error
from .openapi import MessageJson, PromptJson, Role, SteeringJson, describe_fields

RENAMED = ("max_tokens", "logprobs")
"""Fields of SamplingParams that the two routes define differently."""
SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams) if field.name not in RENAMED)
ROLES = get_args(Role)
StreamOption = Literal["include_usage", "include_obfuscation"]
IGNORED_FIELDS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""Accepted fields that do not affect the answer."""
NOOP_VALUES: dict[str, tuple[Any, ...]] = {
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
"""Unsupported fields of the OpenAI API, and the values of them that have no effect."""
MAX_ENTRIES = {"stop": 64, "stop_token_ids": 1000, "logit_bias": 1000, "stream_options": 64}
"""Maximum entries of the fields that cost time at each token or to validate, which slows other requests."""
MAX_STOP_CHARS = 256
"""Maximum characters of a stop string, for the same reason."""
Integer = Annotated[int, Field(ge=-(2**63), lt=2**64)]
String = InstanceOf[str]
"""Any string. Pydantic's `str` refuses lone surrogates, which have an error of their own."""


class RequestBody(BaseModel):
    """Fields of both routes, besides those of SamplingParams."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: String | None = Field(None, description="a name of /v1/models; none uses the served model")
    stream: bool = Field(False, description="stream the answer as server-sent events")
    stream_options: dict[StreamOption, bool] | None = Field(
        None, description="{'include_usage': true} adds a last chunk with the usage"
    )
    steering: SteeringJson = Field(None, description="a method with objectives, or the name of a profile")
    guidance_scale: float | None = Field(
        None, description="strength of steering away from negative_prompt; 1 is off"
    )
    negative_prompt: String | None = Field(None, description="an instruction to steer away from")

    def model_post_init(self, context: Any, /) -> None:
        if self.stream_options is not None and not self.stream:
            raise invalid_value("stream_options", self.stream_options, "omitted unless stream is true")
        if self.guidance_scale not in (None, 1) and self.negative_prompt is None:
            raise invalid_value("guidance_scale", self.guidance_scale, "given together with negative_prompt")
        if self.negative_prompt is not None and self.steering is not None:
            raise invalid_value("negative_prompt", self.negative_prompt, "omitted when steering is given")

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return (self.stream_options or {}).get("include_usage", False)


def _with_sampling_fields(cls: type[RequestBody]) -> type[RequestBody]:
    """The body with the fields of SamplingParams besides its own."""
    sampling_fields = describe_fields(SamplingParams, SAMPLING_FIELDS, temperature=1.0)
    return create_model(cls.__name__, __base__=cls, __doc__=cls.__doc__, **sampling_fields)


@_with_sampling_fields
class ChatCompletionRequest(RequestBody):
    """Body of POST /v1/chat/completions."""

    messages: list[SkipValidation[MessageJson]] = Field(
        description="the conversation", json_schema_extra={"minItems": 1}
    )
    max_tokens: Integer | None = Field(
        None, description="maximum tokens of the answer; none is limited by the context only"
    )
    max_completion_tokens: Integer | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool = Field(
        False, description="report each token's log-probability in the steered distribution"
    )
    top_logprobs: Integer | None = Field(None, description="also report this many of the most likely tokens")
    chat_template_kwargs: dict[Any, Any] | None = Field(None, description="variables for the chat template")

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid_value("top_logprobs", self.top_logprobs, "omitted unless logprobs is true")
        new_max_tokens = self.max_completion_tokens
        if new_max_tokens is not None and self.max_tokens not in (None, new_max_tokens):
            raise invalid_value(
                "max_tokens", self.max_tokens, f"max_completion_tokens ({new_max_tokens}), or omitted"
            )
        for index, message in enumerate(self.messages):
            _check_message(index, message)

    @property
    def effective_max_tokens(self) -> int:
        """The requested maximum of tokens."""
        limits = [n for n in (self.max_completion_tokens, self.max_tokens) if n is not None]
        return limits[0] if limits else NO_TOKEN_LIMIT

    @property
    def num_logprobs(self) -> int | None:
        """How many top log-probabilities to report for each token; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


@_with_sampling_fields
class CompletionRequest(RequestBody):
    """Body of POST /v1/completions."""

    prompt: PromptJson = Field(description="a string, token ids, or a list of either")
    max_tokens: Integer | None = Field(16, description="maximum tokens of the answer")
    logprobs: Integer | None = Field(
        None, description="report this many of the most likely tokens at each position"
    )
    echo: bool = Field(False, description="repeating the prompt is not supported")
    suffix: String | None = Field(None, description="text after the answer is not supported")
    best_of: Integer | None = Field(None, description="choosing among more answers than n is not supported")

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        validate_rules(
            self,
            ("echo", not self.echo, "false: repeating the prompt is not supported"),
            ("suffix", not self.suffix, "omitted: text after the answer is not supported"),
            ("best_of", self.best_of in (None, 1), "omitted, or 1"),
        )

    @property
    def effective_max_tokens(self) -> int:
        """The requested maximum of tokens."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many top log-probabilities to report for each token; None for no log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a string or a list of token ids. Raises InputError or ApiError if invalid."""
        expected = "a string, a list of token ids, or a non-empty list of either"
        value: Any = self.prompt
        if isinstance(value, str) or _is_token_ids(value):
            value = [value]
        if not isinstance(value, list) or not value:
            raise invalid_value("prompt", value, expected)
        for item in value:
            if not isinstance(item, str) and not _is_token_ids(item):
                raise invalid_value("prompt", self.prompt, expected)
            if not item:
                raise bad_request("the prompt is empty; it must have at least one token", "prompt")
        return value


def parse_json(raw: bytes) -> dict[str, Any]:
    """Parse a body as a JSON object, dropping keys whose value is null. Raises ApiError if invalid."""
    try:
        body = json.loads(raw, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "it cannot be parsed"
        raise bad_request(f"invalid JSON in the request body: {reason}", None) from error
    if not isinstance(body, dict):
        raise bad_request(f"the body is {short_repr(body)}; it must be a JSON object", None)
    return {key: value for key, value in body.items() if value is not None}


def parse_body(cls: type[RequestBody], values: Mapping[str, Any]) -> tuple[Any, SamplingParams]:
    """The parsed body and its sampling parameters. Raises ApiError for an invalid or unsupported field."""
    allowed = {*cls.model_fields, *IGNORED_FIELDS, *NOOP_VALUES}
    for name, value in values.items():
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise bad_request("; ".join(filter(None, (f"unknown field {short_repr(name)}", hint))), name)
        if name in NOOP_VALUES and not any(
            value == noop and type(value) is type(noop) for noop in NOOP_VALUES[name]
        ):
            raise bad_request(f"{name} is {short_repr(value)}, which is not supported; omit it", name)
    for name, max_entries in MAX_ENTRIES.items():
        if isinstance(entries := values.get(name), list | dict) and len(entries) > max_entries:
            raise bad_request(f"{name} has {len(entries)} entries; the maximum is {max_entries}", name)
    stops = values.get("stop", ())
    for text in [stops] if isinstance(stops, str) else stops if isinstance(stops, list) else ():
        if isinstance(text, str) and len(text) > MAX_STOP_CHARS:
            raise bad_request(
                f"a stop string has {len(text)} characters; the maximum is {MAX_STOP_CHARS}", "stop"
            )
    try:
        body: Any = cls.model_validate({name: values[name] for name in cls.model_fields if name in values})
        return body, _sampling_params(body)
    except ValidationError as error:
        raise to_api_error(_first_error(cls, error)) from error
    except InputError as error:
        if error.field == "logprobs" and values.get("logprobs") is True:
            error.field = "top_logprobs"  # the chat route's name of it
        raise to_api_error(error) from error


def _sampling_params(body: Any) -> SamplingParams:
    kwargs = {name: getattr(body, name) for name in SAMPLING_FIELDS}
    if kwargs["top_k"] == -1:  # vLLM's "all"
        kwargs["top_k"] = 0
    return SamplingParams(
        **from_json(kwargs), max_tokens=body.effective_max_tokens, logprobs=body.num_logprobs
    )


def _first_error(cls: type[RequestBody], error: ValidationError) -> InputError:
    """The first of pydantic's errors, in the words of the dataclasses."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":
        cause: InputError = first["ctx"]["error"]
        return cause
    (name, *keys), value = map(str, first["loc"]), first["input"]
    if keys[1:]:  # the key itself is invalid, which is possible in stream_options only
        allowed = " and ".join(get_args(StreamOption))
        return InputError(f"unknown key {short_repr(value)} in {name}; its keys are {allowed}", name)
    expected = describe_type(bool if keys else field_types(cls)[name])
    if type(value) is int and first["type"] in ("less_than", "greater_than_equal", "float_type"):
        expected = "a number that fits 64 bits"
    return invalid_value(" of ".join((*keys, name)), value, expected, name)


def _check_message(index: int, message: Any) -> None:
    """Reject what a chat template would render differently or ignore."""
    if not isinstance(message, Mapping):
        raise invalid_value(f"item {index} of messages", message, "a dictionary", "messages")
    role = message.get("role")
    if role not in ROLES:
        raise bad_request(
            f"the role of messages[{index}] is {short_repr(role)}; it must be one of {', '.join(ROLES)}",
            "messages",
        )
    for name, value in message.items():
        if name not in ("role", "content", "name") and value:
            raise bad_request(
                f"messages[{index}] has {short_repr(name)}, which is not supported; omit it", "messages"
            )


def _is_token_ids(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def _reject_constant(name: str) -> float:
    raise bad_request(f"the request body contains {name}, which is not valid JSON", None)
