"""From a body to what the engine is asked: one request for each prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError
from ..methods.builtin import Guidance
from ..methods.objective import Objective
from ..request import Request
from .errors import api_error, bad, unknown_model
from .protocol import ChatBody, CompletionBody, parsed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..base_engine import Front
    from ..sampling_params import SamplingParams
    from .protocol import Body
    from .steering import Profiles


@dataclass(frozen=True)
class Asked:
    """What a client wants: the requests, in the order of its prompts, and how to tell of the answers."""

    requests: list[Request]
    chat: bool
    stream: bool = False
    include_usage: bool = False

    @property
    def answers(self) -> int:
        """How many of them there will be."""
        return sum(request.sampling.n for request in self.requests)


class Asking:
    """Reads bodies for one engine. All methods raise ApiError for what is wrong."""

    def __init__(self, engine: Front, model: str, profiles: Profiles) -> None:
        self._engine, self._model, self._profiles = engine, model, profiles

    def chat(self, values: Mapping[str, Any]) -> Asked:
        """Of /v1/chat/completions."""
        body, sampling = self._parsed(ChatBody, values)
        if not body.messages:
            raise bad("messages is empty; it must hold at least one message", "messages")
        request = self._request(
            "messages",
            prompt=list(body.messages),
            chat_template_kwargs=body.chat_template_kwargs or {},
            sampling=sampling,
        )
        self._require_room(sampling.n, "n")
        steering = self._profiles.steering(body.steering)
        if body.negative_prompt is None:
            request = replace(request, steering=steering.method, trace=steering.trace)
        else:
            request = self._away_from(body.negative_prompt, body.guidance_scale, request)
        return Asked([request], True, body.stream, body.include_usage)

    def completion(self, values: Mapping[str, Any]) -> Asked:
        """Of /v1/completions. A wish stands before the prompt, with an empty line between."""
        body, sampling = self._parsed(CompletionBody, values)
        steering = self._profiles.steering(body.steering)
        prompts, requests = body.prompts, []
        self._require_room(len(prompts) * sampling.n, "prompt")
        for prompt in prompts:
            if body.negative_prompt is None:
                branches = [self._text(wish, prompt) for wish in (None, *steering.method.branches())]
                method, trace = steering.method, steering.trace
            else:
                branches = [self._text(body.negative_prompt, prompt), self._text(None, prompt)]
                method, trace = _guidance(body.guidance_scale), False
            requests.append(
                self._request(
                    "prompt", branch_token_ids=branches, steering=method, trace=trace, sampling=sampling
                )
            )
        return Asked(requests, False, body.stream, body.include_usage)

    def _parsed(self, cls: type[Body], values: Mapping[str, Any]) -> tuple[Any, SamplingParams]:
        body, sampling = parsed(cls, values)
        if body.model not in (None, self._model):
            raise unknown_model(body.model, self._model)
        return body, sampling

    def _require_room(self, answers: int, param: str) -> None:
        """Before anything is made of them: a small body can ask for millions."""
        most = self._engine.config.max_waiting
        if answers > most:
            raise bad(f"the request asks for {answers} answers; max_waiting allows {most} at once", param)

    def _request(self, param: str, **parts: Any) -> Request:
        try:
            return Request(**parts)
        except InputError as error:
            error.field = ""
            raise api_error(error, param) from error

    def _away_from(self, negative: str, scale: float | None, request: Request) -> Request:
        """Guidance whose base has been given the negative prompt, and whose other branch has not."""
        try:
            toward = replace(request, steering=Guidance((Objective(negative),)))
            plain, base = self._engine.render(toward)
        except InputError as error:
            raise api_error(error) from error
        return Request(
            branch_token_ids=[base.prompt_token_ids, plain.prompt_token_ids],
            steering=_guidance(scale),
            sampling=request.sampling,
            trace=False,
        )

    def _text(self, wish: str | None, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            if wish is not None:
                raise bad("prompt is token ids, which no wish can be put before; give a text", "prompt")
            return prompt
        text = prompt if wish is None else f"{wish}\n\n{prompt}"
        try:
            return self._engine.tokenizer.encode(text, add_special_tokens=True)
        except InputError as error:
            raise api_error(error, "prompt") from error


def _guidance(scale: float | None) -> Guidance:
    try:
        objective = Objective("the prompt without the negative one")
        return Guidance((objective,), guidance_scale=1.5 if scale is None else scale)
    except InputError as error:
        raise api_error(error) from error
