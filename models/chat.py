"""The checkpoint's own chat template, and the K+1 prompts of a request that are rendered with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..kernels.errors import InputError
from .tokenizer import Tokenizer, read_json

if TYPE_CHECKING:
    from jinja2.parser import Parser

DEFAULT_SYSTEM = "You are a helpful assistant."
PROBE = "c4f1probe97ae"
"""A word no template alters, added to a system text to see whether the template shows it."""

Message = Mapping[str, Any]
Messages = list[dict[str, Any]]


class ChatTemplate:
    """A Jinja chat template in the dialect of transformers, sandboxed: checkpoints are not trusted.

    Raises InputError when the source is no valid template.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        self.source = source
        self._special = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            where = f"line {error.lineno} of the chat template"
            raise InputError(f"{where} is no valid Jinja: {_sentence(error)}") from error
        except (
            Exception
        ) as error:  # jinja leaves some faults, like a break outside a loop, to Python's compiler
            raise InputError(f"the chat template is no valid Jinja: {_sentence(error)}") from error

    @classmethod
    def from_folder(
        cls, folder: Path, tokenizer: Tokenizer, override: str | None = None
    ) -> ChatTemplate | None:
        """The template of a model folder, or `override`: a template's text, or the path of a file with one.

        chat_template.jinja wins over tokenizer_config.json; None when the model has no template. Raises
        InputError when the template is malformed or the override is neither a template nor a file.
        """
        source = _folder_source(Path(folder)) if override is None else _override_source(override)
        return None if source is None else cls(source, tokenizer.bos_token, tokenizer.eos_token)

    def render(self, messages: Sequence[Message], **kwargs: Any) -> str:
        """The conversation as one text, open for the assistant's answer unless add_generation_prompt=False.

        `kwargs` are more variables for the template. Raises InputError when the template refuses the
        conversation or fails on it.
        """
        variables = {
            "tools": None,  # templates test these for none, as transformers always defines them
            "documents": None,
            "add_generation_prompt": True,
            **self._special,
            **_plain(kwargs, "chat_template_kwargs"),
            "messages": _plain(messages, "messages"),
        }
        try:
            return self._template.render(variables)
        except Exception as error:  # a template is foreign code and may fail in any way
            raise InputError(
                f"the chat template cannot render this conversation: {_sentence(error)}"
            ) from error


@dataclass(frozen=True)
class Rendered:
    """One branch's prompt. `name` is "base" or the wish; `text` is what `token_ids` [tokens] were made of."""

    name: str
    text: str
    token_ids: list[int]


def render_branches(
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    wishes: Sequence[str],
    placement: str = "system",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Rendered]:
    """The prompts of a request's K+1 branches: the base, then one a wish.

    All share one system text: the conversation's first system message, else DEFAULT_SYSTEM. A wish follows it
    after a space (placement "system"), or follows the last user turn ("user"). Where a template refuses a
    system message, or drops it without a word, the system text opens the first user turn. A BOS token is
    added only where the tokenizer asks for one and the template has not written it.

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
    branches = [("base", conversation), *((wish, append(conversation, wish)) for wish in wishes)]
    texts = [(name, template.render(arrange(branch), **extra)) for name, branch in branches]
    return [Rendered(name, text, _prompt_ids(tokenizer, text)) for name, text in texts]


def _checked(index: int, message: Message) -> dict[str, Any]:
    """The message with its content as one text. Other keys, such as tool_calls, pass through."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InputError(f"messages[{index}] is {message!r}; it must be an object with a role and a content")
    content = message.get("content")
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return dict(message)
    if isinstance(content, list | tuple):
        return {**message, "content": "".join(_part(index, part) for part in content)}
    if not isinstance(content, str):
        raise InputError(
            f"the content of messages[{index}] is {content!r}; it must be a text or a list of text parts"
        )
    return dict(message)


def _part(index: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type", part) if isinstance(part, Mapping) else part
    raise InputError(
        f"the content of messages[{index}] holds a part {kind!r}; only parts of type 'text' are supported"
    )


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
    except InputError:
        return False  # if the system message was not the reason, the folded conversation fails the same way


def _prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids, prefix = tokenizer.encode(text), tokenizer.prefix_token_ids
    written = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return ids if written or ids[: len(prefix)] == prefix else prefix + ids


def _folder_source(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read(path)
    config = folder / "tokenizer_config.json"
    found = read_json(config).get("chat_template")
    if isinstance(found, list):  # named templates, one of them for plain chat
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise InputError(f"chat_template in {config} is {found!r}; it must be a template's text")
    return found


def _override_source(override: str) -> str:
    try:
        is_file = Path(override).is_file()
    except (OSError, ValueError):  # a template's text may be no possible path
        is_file = False
    if is_file:
        return _read(Path(override))
    if "{" not in override:
        raise InputError(
            f"chat_template is {override!r}; it must be a Jinja template or a file that holds one"
        )
    return override


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the chat template {path} cannot be read ({error}); it must be UTF-8 text"
        ) from error


def _plain(value: Any, name: str) -> Any:
    """A copy in plain JSON types: a template reaches neither the caller's data nor methods of objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, str):  # a subclass, such as an enum's member, becomes its plain value
        return str.__str__(value)
    if isinstance(value, int | float):
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)
    raise InputError(f"{name} is {value!r}; a chat template takes only JSON values")


def _sentence(error: Exception) -> str:
    """The reason of an error in one line."""
    text = error.message if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    return " ".join((text or type(error).__name__).split()).rstrip(".")


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's text for training: here only its body counts."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dict:
    """`dict` for templates: calling it, and fromkeys, without the type and what hangs on it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates, closed to names that reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may name an attribute `self`
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}, a name with a leading underscore")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Says so when a template reaches for what is closed to it; jinja itself would render nothing there."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"it may not reach {attribute!r} of a {type(obj).__name__}")


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_Dict(), namespace=_Namespace
    )
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes HTML and sorts keys, which a model never saw in training."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
