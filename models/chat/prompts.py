"""The K+1 prompts of a request, rendered with the model's chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, quoted
from . import injection_guard as outside
from .sandbox_process import LimitError
from .template import Message

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer
    from .template import ChatTemplate

DEFAULT_SYSTEM = "You are a helpful assistant."
PROBE = "c4f1probe97ae"
"""A word no template alters, added to a system text to see whether the template shows it."""

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class BranchPrompt:
    """One branch as the model sees it. `name` is "base" or the wish."""

    name: str
    prompt: str
    prompt_token_ids: list[int]


def render_branches(
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    wishes: Sequence[str],
    placement: str = "system",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    check: Callable[[BranchPrompt], None] = lambda prompt: None,
) -> list[BranchPrompt]:
    """The prompts of a request's K+1 branches: the base, then one a wish.

    All share one system text: the conversation's first system message, else DEFAULT_SYSTEM. A wish follows it
    after a space (placement "system"), or follows the last user turn ("user"). Where a template refuses a
    system message, or drops it without a word, the system text opens the first user turn. A BOS token is
    added only where the tokenizer asks for one and the template has not written it.

    All text is encoded together, so that words join as in training. But added tokens are the template's to
    write: one in a message, a wish or an argument of the template is encoded as the text it is spelled with.
    `check` is shown each prompt before the next is made, the base first, and may raise.

    Raises InputError when there is no template, or it cannot render these messages.
    """
    if template is None:
        raise InputError(
            "the model has no chat template; give chat_template, or branch_token_ids for the prompt"
        )
    if placement not in ("system", "user"):
        raise InputError(f"placement is {placement!r}; it must be 'system' or 'user'")
    extra = dict(chat_template_kwargs or {})
    if "messages" in extra:
        raise InputError("chat_template_kwargs holds 'messages'; the conversation is the request's prompt")
    conversation = _with_system([_checked(index, message) for index, message in enumerate(messages)])
    arrange: Callable[[Messages], Messages] = (
        list if _shows_system(template, conversation, extra) else _folded
    )
    append = _append_to_system if placement == "system" else _append_to_user
    found = []
    for name, branch in (("base", conversation), *((wish, append(conversation, wish)) for wish in wishes)):
        found.append(render_prompt(name, template, tokenizer, arrange(branch), extra))
        check(found[-1])
    return found


def render_prompt(
    name: str,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    extra: Mapping[str, Any],
) -> BranchPrompt:
    """One conversation as it stands, with `extra` variables for the template; BOS and texts as above.

    Raises InputError when the template cannot render it.
    """
    text, foreign = outside.render(template, tokenizer, messages, extra)
    ids, prefix = tokenizer.encode(text, foreign=foreign), tokenizer.prefix_token_ids
    has_prefix = ids[: len(prefix)] == prefix or ids[:1] == tokenizer.ids_of(tokenizer.bos_token)
    return BranchPrompt(name, text, ids if has_prefix else prefix + ids)


def _checked(index: int, message: Message) -> dict[str, Any]:
    """The message with its content as one text. Other keys, such as tool_calls, pass through."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(
            f"messages[{index}] is {quoted(message)}; it must be an object with a role and a content"
        )
    content = message.get("content")
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return dict(message)
    if isinstance(content, list | tuple):
        return {**message, "content": "".join(_part(index, part) for part in content)}
    if not isinstance(content, str):
        raise InputError(
            f"the content of messages[{index}] is {quoted(content)}; "
            "it must be a text or a list of text parts"
        )
    return dict(message)


def _part(index: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type", part) if isinstance(part, Mapping) else part
    what = f"the content of messages[{index}] holds a part {quoted(kind)}"
    raise InputError(f"{what}; only parts of type 'text' are supported")


def _with_system(messages: Messages) -> Messages:
    if not any(message["role"] == "user" for message in messages):
        raise InputError("the conversation has no user turn; it needs at least one message with role 'user'")
    if any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]


def _append_to_system(messages: Messages, text: str) -> Messages:
    return _appended(messages, _first(messages, "system"), text)


def _append_to_user(messages: Messages, text: str) -> Messages:
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    return _appended(messages, last, text)


def _appended(messages: Messages, index: int, text: str) -> Messages:
    longer = {**messages[index], "content": f"{messages[index]['content']} {text}"}
    return [*messages[:index], longer, *messages[index + 1 :]]


def _folded(messages: Messages) -> Messages:
    """The system text moved to the front of the first user turn."""
    system, user = _first(messages, "system"), _first(messages, "user")
    text = f"{messages[system]['content']}\n\n{messages[user]['content']}"
    folded = [*messages[:user], {**messages[user], "content": text}, *messages[user + 1 :]]
    return folded[:system] + folded[system + 1 :]


def _first(messages: Messages, role: str) -> int:
    return next(index for index, message in enumerate(messages) if message["role"] == role)


def _shows_system(template: ChatTemplate, messages: Messages, extra: dict[str, Any]) -> bool:
    """Whether the template takes a system message and lets its text through."""
    try:
        return PROBE in template.render(_append_to_system(messages, PROBE), **extra)
    except LimitError:
        raise
    except InputError:
        return False  # if the system message was not the reason, the folded conversation fails the same way
