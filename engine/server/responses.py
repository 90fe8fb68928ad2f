"""What clients get: whole answers and pieces of them, in the shapes of the OpenAI API.

The trace of a steered answer stands at `choices[i].trace`, whole or of the chunk's tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ...models.tokenizer.tokenizer import Tokenizer
    from ..outputs import BranchPrompt, Delta, Output, TokenLogprobs, Trace


class Answers:
    """The shapes of one response. `id` and `created` name it, `chat` says of which of the two calls it is."""

    def __init__(self, id: str, created: int, model: str, chat: bool, text_of: Callable[[int], str]) -> None:
        self._head = {"id": id, "object": "", "created": created, "model": model}
        self._object = "chat.completion" if chat else "text_completion"
        self._chat, self._text_of = chat, text_of
        self._offsets: dict[int, int] = {}

    def whole(self, outputs: Sequence[Output], prompts: Sequence[Sequence[BranchPrompt]]) -> dict[str, Any]:
        """A response that is not streamed. `prompts` are those of each request."""
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        usage = usage_of(prompts, sum(len(output.token_ids) for output in outputs))
        return {**self._head, "object": self._object, "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice: in a chat, whose turn it is."""
        return self._chunk(index, {"role": "assistant", "content": ""}) if self._chat else None

    def piece(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """The chunk of a piece; None where it says nothing."""
        more: dict[str, Any] = {}
        if delta.trace is not None and delta.token_ids:
            more["trace"] = self._trace(delta.trace, delta.token_ids)
        if delta.logprobs:
            more["logprobs"] = self._logprobs(index, delta.logprobs)
        if not delta.text and not more:
            return None
        return self._chunk(index, {"content": delta.text} if self._chat else delta.text, **more)

    def closing(self, index: int, finish_reason: str) -> dict[str, Any]:
        """The last chunk of a choice."""
        return self._chunk(index, {} if self._chat else "", finish_reason=finish_reason)

    def usage(self, prompts: Sequence[Sequence[BranchPrompt]], tokens: int) -> dict[str, Any]:
        """The chunk with the usage, after all choices."""
        return {**self._chunk(0, {}), "choices": [], "usage": usage_of(prompts, tokens)}

    def _choice(self, index: int, output: Output) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index, "finish_reason": output.finish_reason, "logprobs": None}
        if self._chat:
            found["message"] = {"role": "assistant", "content": output.text, "refusal": None}
        else:
            found["text"] = output.text
        if output.logprobs is not None:
            found["logprobs"] = self._logprobs(index, output.logprobs)
        if output.trace is not None:
            found["trace"] = self._trace(output.trace, output.token_ids)
        return found

    def _chunk(self, index: int, content: Any, **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta" if self._chat else "text": content, "logprobs": None}
        choice |= {"finish_reason": None, **more}
        name = "chat.completion.chunk" if self._chat else self._object
        return {**self._head, "object": name, "choices": [choice]}

    def _trace(self, trace: Trace, token_ids: Sequence[int]) -> dict[str, Any]:
        return {
            "tokens": [self._text_of(token) for token in token_ids],
            "weights": trace.weights,
            "rewards": trace.rewards,
            "strength": trace.strength,
            "kl": trace.kl,
            "branch_logprobs": trace.branch_logprobs,
        }

    def _logprobs(self, index: int, found: Sequence[TokenLogprobs]) -> dict[str, Any]:
        if self._chat:
            return {"content": [self._token_logprobs(token) for token in found], "refusal": None}
        texts, offsets = [self._text_of(token.token_id) for token in found], []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in found],
            "top_logprobs": [{self._text_of(i): p for i, p in token.top.items()} for token in found],
            "text_offset": offsets,
        }

    def _token_logprobs(self, token: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(i, p) for i, p in token.top.items()]
        return {**self._token(token.token_id, token.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text_of(token_id)
        known = "\ufffd" not in text  # a part of a character is no text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if known else None}


def usage_of(prompts: Sequence[Sequence[BranchPrompt]], tokens: int) -> dict[str, Any]:
    """prompt_tokens are those of the base branches; what the others took stands in the details."""
    base, *branches = branch_tokens(prompts)
    return {
        "prompt_tokens": base,
        "completion_tokens": tokens,
        "total_tokens": base + tokens,
        "prompt_tokens_details": {"branches": branches},
    }


def branch_tokens(prompts: Sequence[Sequence[BranchPrompt]]) -> list[int]:
    """How many tokens each branch's prompts have, the base first."""
    lengths = [[len(branch.prompt_token_ids) for branch in branches] for branches in prompts]
    return [sum(each) for each in zip(*lengths, strict=True)]


def text_of(tokenizer: Tokenizer) -> Callable[[int], str]:
    """The text of a token as it stands within a text, with the space that it begins with."""

    @lru_cache(maxsize=1 << 16)
    def found(token_id: int) -> str:
        once, twice = (tokenizer.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once) :] if twice.startswith(once) else once

    return found
