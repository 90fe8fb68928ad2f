"""Response bodies in the OpenAI format: full responses and stream chunks.

The steering trace is at `choices[i].trace`: of the full answer, or of the chunk's tokens.
"""

from __future__ import annotations

import codecs
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..outputs import BranchPrompt, Delta, Output, TokenLogprobs, Trace


class ResponseBuilder:
    """Builds the bodies of one response. `id` and `created` identify it.

    `chat` selects the format of chat completions, otherwise that of completions. `token_bytes` returns the
    bytes of a token.
    """

    def __init__(
        self, id: str, created: int, model: str, chat: bool, token_bytes: Callable[[int], bytes]
    ) -> None:
        self._envelope = {"id": id, "object": "", "created": created, "model": model}
        self._object = "chat.completion" if chat else "text_completion"
        self._chat, self._token_bytes = chat, token_bytes
        self._texts: defaultdict[int, _TextPosition] = defaultdict(_TextPosition)

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
            "tokens": [self._token_bytes(token).decode(errors="replace") for token in token_ids],
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
        return {
            "tokens": [self._token_key(token.token_id) for token in logprobs],
            "token_logprobs": [token.logprob for token in logprobs],
            "top_logprobs": [self._top_logprobs(token) for token in logprobs],
            "text_offset": [
                self._texts[index].advance(self._token_bytes(token.token_id)) for token in logprobs
            ],
        }

    def _top_logprobs(self, token: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens by text. Of several with one text, the chosen one has it, others their id."""
        chosen, values = token.token_id, dict[str, float]()
        for token_id, logprob in sorted(token.top.items(), key=lambda item: item[0] != chosen):
            key = self._token_key(token_id)
            values[key if key not in values else f"token_id:{token_id}"] = logprob
        return dict(sorted(values.items(), key=lambda item: -item[1]))

    def _token_key(self, token_id: int) -> str:
        """A token's text; for a part of a character its bytes, as OpenAI writes them: `bytes:\\xf0\\x9f`."""
        token_bytes = self._token_bytes(token_id)
        try:
            return token_bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)

    def _token_logprobs_dict(self, token: TokenLogprobs) -> dict[str, Any]:
        top = [self._token_dict(i, p) for i, p in token.top.items()]
        return {**self._token_dict(token.token_id, token.logprob), "top_logprobs": top}

    def _token_dict(self, token_id: int, logprob: float) -> dict[str, Any]:
        token_bytes = self._token_bytes(token_id)
        text = token_bytes.decode(errors="replace")  # U+FFFD for a part of a character
        return {"token": text, "logprob": logprob, "bytes": list(token_bytes)}


class _TextPosition:
    """The number of characters of an answer so far."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0

    def advance(self, token_bytes: bytes) -> int:
        """Add a token; returns the index of the character in which it begins."""
        start = self._num_chars
        self._num_chars += len(self._decoder.decode(token_bytes))
        return start


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
