"""The checkpoint's own chat template: Jinja in the dialect of transformers, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..kernels.errors import InputError
from .folder import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jinja2.parser import Parser

    from .tokenizer import Tokenizer

Message = Mapping[str, Any]
Spell = Callable[[str, str], str]
"""What a template gets for a text at a place, such as "messages[0]['content']", or "" for a key."""


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

    def render(self, messages: Sequence[Message], /, **kwargs: Any) -> str:
        """The conversation as one text, open for the assistant's answer unless add_generation_prompt=False.

        `kwargs` are more variables for the template. Raises InputError when the template refuses the
        conversation or fails on it.
        """
        return self.render_spelled(messages, kwargs, lambda text, place: text)

    def render_spelled(self, messages: Sequence[Message], extra: Mapping[str, Any], spell: Spell) -> str:
        """The same, with each text of `messages` and `extra` as `spell` gives it."""
        try:
            variables = {
                "tools": None,  # templates test these for none, as transformers always defines them
                "documents": None,
                "add_generation_prompt": True,
                **self._special,
                **_plain(extra, "chat_template_kwargs", spell),
                "messages": _plain(messages, "messages", spell),
            }
            return self._template.render(variables)
        except InputError:
            raise
        except Exception as error:  # a template is foreign code and may fail in any way
            raise InputError(
                f"the chat template cannot render this conversation: {_sentence(error)}"
            ) from error


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


def _plain(value: Any, name: str, spell: Spell) -> Any:
    """A copy in plain JSON types: a template reaches neither the caller's data nor methods of objects."""
    if value is None or type(value) in (int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {spell(str(key), ""): _plain(item, f"{name}[{key!r}]", spell) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{index}]", spell) for index, item in enumerate(value)]
    if isinstance(value, str):  # a subclass, such as an enum's member, becomes its plain value
        return spell(str.__str__(value), name)
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
