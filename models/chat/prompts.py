"""The K+1 prompts of a request, rendered with the model's chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, short_repr
from .injection_guard import render_with_untrusted
from .sandbox_process import LimitError
from .template import Message

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer
    from .template import ChatTemplate

DEFAULT_SYSTEM = "You are a helpful assistant."
SYSTEM_PROBE = "c4f1probe97ae"
"""A word that no template alters, appended to the system text to test whether it is rendered."""

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class BranchPrompt:
    """One branch as the model sees it. `name` is "base" or the objective."""

    name: str
    prompt: str
    prompt_token_ids: list[int]


def render_branches(
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    objectives: Sequence[str],
    placement: str = "system",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    check: Callable[[BranchPrompt], None] = lambda prompt: None,
) -> list[BranchPrompt]:
    """Render the prompts of a request's K+1 branches: the base, then one per objective.

    All share one system text: the conversation's first system message, else DEFAULT_SYSTEM. An objective
    follows it after a space (placement "system"), or follows the last user turn ("user"). Where a template
    rejects a system message, or silently drops it, the system text is prepended to the first user turn. A BOS
    token is added only if the tokenizer adds one and the template has not written it.

    All text is encoded together, so that words join as in training. Only the template may write added tokens:
    one in a message, an objective or a template argument is encoded as plain text. `check` is called with
    each prompt before the next is rendered, the base first, and may raise.

    Raises InputError if `template` is None or cannot render these messages.
    """
    if template is None:
        raise InputError(
            "the model has no chat template; give chat_template, or branch_token_ids for the prompt"
        )
    if placement not in ("system", "user"):
        raise InputError(f"placement is {placement!r}; it must be 'system' or 'user'")
    template_kwargs = dict(chat_template_kwargs or {})
    if "messages" in template_kwargs:
        raise InputError("chat_template_kwargs contains 'messages'; pass the conversation as the prompt")
    conversation = _ensure_system(
        [_normalize_message(index, message) for index, message in enumerate(messages)]
    )
    arrange: Callable[[Messages], Messages] = (
        list if _supports_system(template, conversation, template_kwargs) else _fold_system
    )
    append = _append_to_system if placement == "system" else _append_to_user
    prompts = []
    for name, branch_messages in (
        ("base", conversation),
        *((objective, append(conversation, objective)) for objective in objectives),
    ):
        prompts.append(render_prompt(name, template, tokenizer, arrange(branch_messages), template_kwargs))
        check(prompts[-1])
    return prompts


def render_prompt(
    name: str,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any],
) -> BranchPrompt:
    """Render one conversation unchanged, with `template_kwargs` as variables of the template.

    BOS and untrusted text are handled as in `render_branches`. Raises InputError when the template cannot
    render it.
    """
    text, untrusted = render_with_untrusted(template, tokenizer, messages, template_kwargs)
    token_ids, prefix_ids = tokenizer.encode(text, untrusted=untrusted), tokenizer.prefix_token_ids
    has_prefix = token_ids[: len(prefix_ids)] == prefix_ids or token_ids[:1] == tokenizer.token_to_ids(
        tokenizer.bos_token
    )
    return BranchPrompt(name, text, token_ids if has_prefix else prefix_ids + token_ids)


def _normalize_message(index: int, message: Message) -> dict[str, Any]:
    """Return the message with its content as one string. Other keys, such as tool_calls, are unchanged."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(
            f"messages[{index}] is {short_repr(message)}; it must be an object with role and content"
        )
    content = message.get("content")
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return dict(message)
    if isinstance(content, list | tuple):
        return {**message, "content": "".join(_part_text(index, part) for part in content)}
    if not isinstance(content, str):
        raise InputError(
            f"the content of messages[{index}] is {short_repr(content)}; "
            "it must be a string or a list of text parts"
        )
    return dict(message)


def _part_text(index: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    part_type = part.get("type", part) if isinstance(part, Mapping) else part
    prefix = f"the content of messages[{index}] contains a part {short_repr(part_type)}"
    raise InputError(f"{prefix}; only parts of type 'text' are supported")


def _ensure_system(messages: Messages) -> Messages:
    if not any(message["role"] == "user" for message in messages):
        raise InputError("the conversation must have at least one message with role 'user'")
    if any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]


def _append_to_system(messages: Messages, text: str) -> Messages:
    return _append_text(messages, _first_index(messages, "system"), text)


def _append_to_user(messages: Messages, text: str) -> Messages:
    last_user = max(index for index, message in enumerate(messages) if message["role"] == "user")
    return _append_text(messages, last_user, text)


def _append_text(messages: Messages, index: int, text: str) -> Messages:
    extended = {**messages[index], "content": f"{messages[index]['content']} {text}"}
    return [*messages[:index], extended, *messages[index + 1 :]]


def _fold_system(messages: Messages) -> Messages:
    """Move the system text to the front of the first user turn."""
    system_index, user_index = _first_index(messages, "system"), _first_index(messages, "user")
    text = f"{messages[system_index]['content']}\n\n{messages[user_index]['content']}"
    merged = [*messages[:user_index], {**messages[user_index], "content": text}, *messages[user_index + 1 :]]
    return merged[:system_index] + merged[system_index + 1 :]


def _first_index(messages: Messages, role: str) -> int:
    return next(index for index, message in enumerate(messages) if message["role"] == role)


def _supports_system(template: ChatTemplate, messages: Messages, template_kwargs: dict[str, Any]) -> bool:
    """Whether the template accepts a system message and renders its text."""
    try:
        return SYSTEM_PROBE in template.render(_append_to_system(messages, SYSTEM_PROBE), **template_kwargs)
    except LimitError:
        raise
    except InputError:
        return False  # if the system message was not the reason, the folded conversation fails the same way
