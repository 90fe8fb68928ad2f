"""Convert request bodies to engine requests, one for each prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError
from ..methods.builtin import Guidance
from ..methods.objective import Objective
from ..request import Request
from .errors import bad_request, to_api_error, unknown_model
from .protocol import ChatCompletionRequest, CompletionRequest, parse_body

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...models.tokenizer.tokenizer import Tokenizer
    from ..base_engine import BaseEngine
    from ..sampling_params import SamplingParams
    from .protocol import RequestBody
    from .steering import Profiles


@dataclass(frozen=True)
class ParsedCall:
    """A parsed HTTP call: the requests in the order of its prompts, and the response options."""

    requests: list[Request]
    chat: bool
    stream: bool = False
    include_usage: bool = False

    @property
    def num_choices(self) -> int:
        """Number of choices in the response."""
        return sum(request.sampling.n for request in self.requests)


class RequestParser:
    """Parses bodies for one engine. All methods raise ApiError for an invalid body."""

    def __init__(self, engine: BaseEngine, model: str, profiles: Profiles) -> None:
        self._engine, self._model, self._profiles = engine, model, profiles

    def parse_chat(self, values: Mapping[str, Any]) -> ParsedCall:
        """Parse a body of /v1/chat/completions."""
        body, sampling = self._parse_body(ChatCompletionRequest, {"messages": [], **values})
        if not body.messages:
            raise bad_request("messages is empty; it must have at least one message", "messages")
        request = self._make_request(
            "messages",
            prompt=body.messages,
            chat_template_kwargs=body.chat_template_kwargs or {},
            sampling=sampling,
        )
        self._check_queue_limit(sampling.n, "n")
        steering = self._profiles.resolve(body.steering)
        if body.negative_prompt is None:
            request = replace(request, steering=steering.method, trace=steering.trace)
        else:
            request = self._steer_away_from(body.negative_prompt, body.guidance_scale, request)
        return ParsedCall([request], True, body.stream, body.include_usage)

    def parse_completion(self, values: Mapping[str, Any]) -> ParsedCall:
        """Parse a body of /v1/completions. An objective precedes the prompt, separated by an empty line."""
        body, sampling = self._parse_body(CompletionRequest, {"prompt": None, **values})
        steering = self._profiles.resolve(body.steering)
        prompts, requests = body.prompts, []
        self._check_queue_limit(len(prompts) * sampling.n, "prompt")
        for prompt in prompts:
            if body.negative_prompt is None:
                branches = [
                    self._encode_prompt(objective, prompt)
                    for objective in (None, *steering.method.branch_objectives())
                ]
                method, trace = steering.method, steering.trace
            else:
                branches = [
                    self._encode_prompt(body.negative_prompt, prompt),
                    self._encode_prompt(None, prompt),
                ]
                method, trace = _make_guidance(body.guidance_scale), False
            requests.append(
                self._make_request(
                    "prompt", branch_token_ids=branches, steering=method, trace=trace, sampling=sampling
                )
            )
        return ParsedCall(requests, False, body.stream, body.include_usage)

    def _parse_body(self, cls: type[RequestBody], values: Mapping[str, Any]) -> tuple[Any, SamplingParams]:
        body, sampling = parse_body(cls, values)
        if body.model not in (None, self._model):
            raise unknown_model(body.model, self._model)
        return body, sampling

    def _check_queue_limit(self, num_choices: int, param: str) -> None:
        """Check the number of choices before any is created: a small body can ask for millions."""
        max_waiting = self._engine.config.max_waiting
        if num_choices > max_waiting:
            raise bad_request(
                f"the request asks for {num_choices} answers; max_waiting allows {max_waiting} at once", param
            )

    def _make_request(self, param: str, **kwargs: Any) -> Request:
        try:
            return Request(**kwargs)
        except InputError as error:
            error.field = ""
            raise to_api_error(error, param) from error

    def _steer_away_from(
        self, negative_prompt: str, guidance_scale: float | None, request: Request
    ) -> Request:
        """A Guidance request whose base branch has the negative prompt and whose other branch does not."""
        try:
            guided = replace(request, steering=Guidance((Objective(negative_prompt),)))
            positive_branch, negative_branch = self._engine.render(guided)
        except InputError as error:
            raise to_api_error(error) from error
        return Request(
            branch_token_ids=[negative_branch.prompt_token_ids, positive_branch.prompt_token_ids],
            steering=_make_guidance(guidance_scale),
            sampling=request.sampling,
            trace=False,
        )

    def _encode_prompt(self, objective: str | None, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            if objective is not None:
                raise bad_request(
                    "an objective cannot precede a prompt of token ids; the prompt must be a string", "prompt"
                )
            return prompt
        try:
            return encode_completion_prompt(self._engine.tokenizer, objective, prompt)
        except InputError as error:
            raise to_api_error(error, "prompt") from error


def encode_completion_prompt(tokenizer: Tokenizer, objective: str | None, prompt: str) -> list[int]:
    """The ids of a prompt, after the objective and an empty line if there is one.

    A prompt that begins with the BOS text, as a client's chat template writes it, gets one BOS nevertheless,
    at the beginning. Raises InputError when the text is not valid Unicode.
    """
    bos = tokenizer.bos_token
    has_bos = bool(bos) and prompt.startswith(bos)
    body = prompt.removeprefix(bos) if has_bos else prompt
    text = body if objective is None else f"{objective}\n\n{body}"
    ids = tokenizer.encode(text, add_special_tokens=True)
    bos_ids = tokenizer.token_to_ids(bos) if has_bos else []
    return ids if ids[: len(bos_ids)] == bos_ids else bos_ids + ids


def _make_guidance(guidance_scale: float | None) -> Guidance:
    try:
        objective = Objective("the prompt without the negative prompt")
        return Guidance((objective,), guidance_scale=1.5 if guidance_scale is None else guidance_scale)
    except InputError as error:
        raise to_api_error(error) from error
