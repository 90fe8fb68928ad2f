"""A request: prompt, decoding method with its objectives, and sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..kernels.common.errors import InputError
from .methods.base import Method
from .methods.builtin import Base
from .methods.objective import Objective
from .methods.registry import DEFAULT_METHOD
from .sampling_params import SamplingParams
from .utils.fields import validate_types

Message = Mapping[Any, Any]


@dataclass(frozen=True)
class Request:
    """A prompt to decode toward the objectives of `steering`.

    prompt:            a string (one user turn) or a list of chat messages {"role": …, "content": …}.
    steering:          a method with its objectives. Objectives alone, as {"Be brief.": 0.7} or a list of
                       `Objective`, are those of `DEFAULT_METHOD`.
    branch_token_ids:  instead of a prompt, the exact ids of each branch: the base, then one per objective.
    trace:             record per token what `Trace` lists: weights, rewards, fulfilment and more.
    chat_template_kwargs: extra variables for the chat template, such as {"enable_thinking": False}.
    """

    prompt: str | Sequence[Message] | None = field(
        default=None, metadata={"expected": "a string or a list of chat messages"}
    )
    steering: Method = field(
        default_factory=Base,
        metadata={"expected": 'a method such as Trim([Objective("Be brief.")]), or {"Be brief.": 0.7}'},
    )
    sampling: SamplingParams = field(default_factory=SamplingParams)
    branch_token_ids: Sequence[Sequence[int]] | None = None
    trace: bool = True
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    if TYPE_CHECKING:  # what `__post_init__` accepts besides the fields' own types

        def __init__(
            self,
            prompt: str | Sequence[Message] | None = None,
            steering: Method | Mapping[str, float] | Sequence[Objective] = ...,
            sampling: SamplingParams = ...,
            branch_token_ids: Sequence[Sequence[int]] | None = None,
            trace: bool = True,
            chat_template_kwargs: Mapping[str, Any] = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "steering", _to_method(self.steering))
        validate_types(self)
        if (self.prompt is None) == (self.branch_token_ids is None):
            raise InputError("a request needs either a prompt or branch_token_ids, and not both")
        if self.branch_token_ids is not None:
            self._check_branch_token_ids(self.branch_token_ids)
        elif not self.prompt or _is_blank(self.messages[-1].get("content")):
            raise InputError("the prompt is empty; ask something")

    def _check_branch_token_ids(self, branches: Sequence[Sequence[int]]) -> None:
        num_branches = 1 + len(self.steering.branch_objectives())
        if len(branches) != num_branches:
            raise InputError(
                f"branch_token_ids has {len(branches)} branches; "
                f"{self.steering.name} here needs {num_branches}: the base and one per objective"
            )
        for index, ids in enumerate(branches):
            if not ids:
                raise InputError(f"branch_token_ids[{index}] is empty; every branch needs at least one token")

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation; a string is one user turn."""
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return [dict(message) for message in self.prompt or ()]


def _to_method(steering: Any) -> Any:
    """Objectives as `DEFAULT_METHOD` with them; no objectives as plain decoding; anything else unchanged."""
    if isinstance(steering, Mapping):
        steering = [Objective(text, weight) for text, weight in steering.items()]
    if isinstance(steering, Objective):
        steering = [steering]
    if isinstance(steering, list | tuple) and all(isinstance(item, Objective) for item in steering):
        return DEFAULT_METHOD(tuple(steering)) if steering else Base()
    return steering


def _is_blank(content: Any) -> bool:
    """Whether a message's content, a string or a list of text parts, is blank."""
    if not isinstance(content, list | tuple):
        return content is None or (isinstance(content, str) and not content.strip())
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    return all(isinstance(text, str) and not text.strip() for text in texts)
