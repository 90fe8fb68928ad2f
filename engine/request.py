"""What is asked of the engine: a prompt, the wishes, and how to sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..kernels.errors import InputError
from .methods import Base, Method
from .sampling import SamplingParams

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """One question, decoded toward the objectives of `steering`.

    prompt:            a string (one user turn) or a list of chat messages {"role": …, "content": …}.
    branch_token_ids:  instead of a prompt, the exact ids of each branch: the base, then one per objective.
    trace:             keep per token the weights, rewards, strength, KL and each branch's log-probability.
    chat_template_kwargs: extra variables for the chat template, such as {"enable_thinking": False}.
    """

    prompt: str | Sequence[Message] | None = None
    steering: Method = field(default_factory=Base)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    branch_token_ids: Sequence[Sequence[int]] | None = None
    trace: bool = True
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.branch_token_ids is None):
            raise InputError("a request needs either a prompt or branch_token_ids, and not both")
        if self.prompt is not None:
            self._check_prompt(self.prompt)
            return
        assert self.branch_token_ids is not None
        expected = 1 + len(self.steering.branches())
        if len(self.branch_token_ids) != expected:
            raise InputError(
                f"branch_token_ids has {len(self.branch_token_ids)} branches; "
                f"{self.steering.name} here needs {expected}: the base and one per objective"
            )
        for index, ids in enumerate(self.branch_token_ids):
            if not ids:
                raise InputError(f"branch_token_ids[{index}] is empty; every branch needs at least one token")

    @staticmethod
    def _check_prompt(prompt: Any) -> None:
        if isinstance(prompt, str):
            if not prompt.strip():
                raise InputError("the prompt is empty; ask something")
            return
        if not isinstance(prompt, Sequence) or not all(isinstance(message, Mapping) for message in prompt):
            raise InputError(f"the prompt is {prompt!r}; it must be a string or a list of chat messages")
        last = prompt[-1].get("content") if prompt else None
        if not last or (isinstance(last, str) and not last.strip()):
            raise InputError("the prompt is empty; ask something")

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation; a string is one user turn."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return [dict(message) for message in self.prompt or ()]
