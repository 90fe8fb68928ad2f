"""Response bodies in the OpenAI format: full responses and stream chunks.

The steering trace is at `choices[i].trace`: of the full answer, or of the chunk's tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...models.tokenizer.tokenizer import Tokenizer
    from ..outputs import BranchPrompt, Delta, Output, TokenLogprobs, Trace


class ResponseBuilder:
    """Builds the bodies of one response. `id` and `created` identify it.

    `chat` selects the format of chat completions, otherwise that of completions. `decode_token` returns the
    text of a token.
    """

    def __init__(
        self, id: str, created: int, model: str, chat: bool, decode_token: Callable[[int], str]
    ) -> None:
        self._envelope = {"id": id, "object": "", "created": created, "model": model}
        self._object = "chat.completion" if chat else "text_completion"
        self._chat, self._decode_token = chat, decode_token
        self._text_offsets: dict[int, int] = {}

    def full_response(
        self, outputs: Sequence[Output], prompts: Sequence[Sequence[BranchPrompt]]
    ) -> dict[str, Any]:
        """The body of a response that is not streamed. `prompts` has the branch prompts of each request."""
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        usage = make_usage(prompts, sum(len(output.token_ids) for output in outputs))
        return {**self._envelope, "object": self._object, "choices": choices, "usage": usage}

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice: the role in a chat, None for completions."""
        return self._chunk(index, {"role": "assistant", "content": ""}) if self._chat else None

    def delta_chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """The chunk of a delta; None if it has no content."""
        extra: dict[str, Any] = {}
        if delta.trace is not None and delta.token_ids:
            extra["trace"] = self._trace(delta.trace, delta.token_ids)
        if delta.logprobs:
            extra["logprobs"] = self._logprobs(index, delta.logprobs)
        if not delta.text and not extra:
            return None
        return self._chunk(index, {"content": delta.text} if self._chat else delta.text, **extra)

    def final_chunk(self, index: int, output: Output) -> dict[str, Any]:
        """The last chunk of a choice, with the finish reason."""
        content = {} if self._chat else ""
        return self._chunk(index, content, finish_reason=output.finish_reason, **_steering_result(output))

    def usage_chunk(
        self, prompts: Sequence[Sequence[BranchPrompt]], completion_tokens: int
    ) -> dict[str, Any]:
        """The chunk with the usage, after all choices."""
        return {**self._chunk(0, {}), "choices": [], "usage": make_usage(prompts, completion_tokens)}

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": output.finish_reason, "logprobs": None}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": output.text, "refusal": None}
        else:
            choice["text"] = output.text
        if output.logprobs is not None:
            choice["logprobs"] = self._logprobs(index, output.logprobs)
        if output.trace is not None:
            choice["trace"] = self._trace(output.trace, output.token_ids)
        return choice | _steering_result(output)

    def _chunk(self, index: int, content: Any, **extra: Any) -> dict[str, Any]:
        choice = {"index": index, "delta" if self._chat else "text": content, "logprobs": None}
        choice |= {"finish_reason": None, **extra}
        object_type = "chat.completion.chunk" if self._chat else self._object
        return {**self._envelope, "object": object_type, "choices": [choice]}

    def _trace(self, trace: Trace, token_ids: Sequence[int]) -> dict[str, Any]:
        return {
            "tokens": [self._decode_token(token) for token in token_ids],
            "weights": trace.weights,
            "rewards": trace.rewards,
            "fulfilment": trace.fulfilment,
            "strength": trace.strength,
            "kl": trace.kl,
            "branch_logprobs": trace.branch_logprobs,
        }

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        if self._chat:
            return {"content": [self._token_logprobs_dict(token) for token in logprobs], "refusal": None}
        texts, offsets = [self._decode_token(token.token_id) for token in logprobs], []
        for text in texts:
            offsets.append(self._text_offsets.get(index, 0))
            self._text_offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in logprobs],
            "top_logprobs": [{self._decode_token(i): p for i, p in token.top.items()} for token in logprobs],
            "text_offset": offsets,
        }

    def _token_logprobs_dict(self, token: TokenLogprobs) -> dict[str, Any]:
        top = [self._token_dict(i, p) for i, p in token.top.items()]
        return {**self._token_dict(token.token_id, token.logprob), "top_logprobs": top}

    def _token_dict(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._decode_token(token_id)
        complete = "\ufffd" not in text  # U+FFFD: the token is an incomplete UTF-8 sequence
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if complete else None}


def _steering_result(output: Output) -> dict[str, Any]:
    """The keys of a choice that was steered toward objectives."""
    if len(output.branches) < 2:
        return {}
    return {"fulfilment": output.fulfilment, "notes": output.notes}


def make_usage(prompts: Sequence[Sequence[BranchPrompt]], completion_tokens: int) -> dict[str, Any]:
    """The usage dictionary: prompt_tokens counts the base branches, the details list the other branches."""
    base, *branches = count_branch_tokens(prompts)
    return {
        "prompt_tokens": base,
        "completion_tokens": completion_tokens,
        "total_tokens": base + completion_tokens,
        "prompt_tokens_details": {"branches": branches},
    }


def count_branch_tokens(prompts: Sequence[Sequence[BranchPrompt]]) -> list[int]:
    """Prompt tokens of each branch, summed over the requests, base branch first."""
    lengths = [[len(branch.prompt_token_ids) for branch in branches] for branches in prompts]
    return [sum(counts) for counts in zip(*lengths, strict=True)]


def make_token_decoder(tokenizer: Tokenizer) -> Callable[[int], str]:
    """A cached function from token id to the token's text in mid-sentence, with its leading space."""

    @lru_cache(maxsize=1 << 16)
    def decode_token(token_id: int) -> str:
        once, twice = (tokenizer.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once) :] if twice.startswith(once) else once

    return decode_token
