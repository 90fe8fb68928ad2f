"""Script of the sandbox process that renders a chat template with Jinja, in the dialect of transformers.

It imports only the standard library and jinja2: a template is untrusted code and must reach nothing but the
conversation. Each input line is a JSON object, each output line an answer; `sandbox_process.py` is the other
end of the pipe.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path += sys.argv[3:]  # folders of jinja2 and markupsafe: -I -S excludes site-packages

import errno
import importlib
import json
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

if TYPE_CHECKING:
    from jinja2.environment import Template
    from jinja2.parser import Parser

LAZY_MODULES = (
    *("encodings.unicode_escape", "jinja2.constants", "jinja2.debug", "pprint", "random", "textwrap"),
    "unicodedata",
)
"""Modules that are imported lazily while rendering, which RLIMIT_NOFILE would prevent."""
MAX_ERROR_CHARS = 1000
SEARCH_METHODS = (
    *("__contains__", "__eq__", "__getitem__", "__ne__", "count", "endswith", "find", "index", "lstrip"),
    *("partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit"),
    *("rstrip", "split", "splitlines", "startswith", "strip"),
)


def main(cpu_seconds: float, memory_bytes: int) -> None:
    """Answer requests line by line, with `cpu_seconds` of CPU time per answer and `memory_bytes` in total.

    A line with a conversation has one answer per entry of "disguises", up to the first error.
    """
    for name in LAZY_MODULES:
        importlib.import_module(name)
    datetime.now()  # reads the time zone while files can be opened
    _set_limits(memory_bytes)
    template = None
    _write_answer({})
    for line in sys.stdin.buffer:
        _set_cpu_timer(cpu_seconds)
        try:
            request = json.loads(line.decode("utf-8", "surrogatepass"))
            if template is None:
                template = _create_environment().from_string(request["source"])
                _write_answer({})
            for substitution in request.get("disguises", ()):
                _set_cpu_timer(cpu_seconds)
                _write_answer({"text": _render(template, request["variables"], substitution)})
        except MemoryError:
            os._exit(errno.ENOMEM)
        except Exception as error:  # a template is foreign code and may fail in any way
            _write_answer({"error": _format_error(error), "line": getattr(error, "lineno", None)})
        _set_cpu_timer(0)


def _set_limits(memory_bytes: int) -> None:
    """Limit memory to `memory_bytes`, and allow no new file, no connection and no core dump."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return
    limits = ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_NOFILE, 0), (resource.RLIMIT_CORE, 0))
    for resource_id, limit in limits:
        with suppress(ValueError, OSError):  # this system does not support the limit
            resource.setrlimit(resource_id, (limit, limit))


def _set_cpu_timer(seconds: float) -> None:
    """End this process after `seconds` of CPU time, even in C code; 0 disables the timer."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _write_answer(answer: dict[str, Any]) -> None:
    line = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _render(template: Template, variables: dict[str, Any], substitution: tuple[str, str]) -> str:
    table = str.maketrans(*substitution)

    def unwrap(value: Any) -> Any:
        """Remove the marker of each string, and substitute the characters of those marked "~"."""
        if isinstance(value, str):
            return ShadowStr(value[1:], table) if table and value[0] == "~" else value[1:]
        if isinstance(value, dict):
            return {unwrap(key): unwrap(item) for key, item in value.items()}
        return [unwrap(item) for item in value] if isinstance(value, list) else value

    return template.render(unwrap(variables))


def _format_error(error: Exception) -> str:
    """Format an error as one line."""
    text = error.message if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    return " ".join((text or type(error).__name__)[:MAX_ERROR_CHARS].split()).rstrip(".")


class ShadowStr(str):
    """A string with substituted characters, which can be searched for the original characters."""

    _table: Mapping[int, Any]

    def __new__(cls, text: str, table: Mapping[int, Any]) -> ShadowStr:
        shadow = super().__new__(cls, text.translate(table))
        shadow._table = table
        return shadow

    def _substitute(self, value: Any) -> Any:
        """Substitute the characters of a search argument."""
        if isinstance(value, tuple):
            return tuple(map(self._substitute, value))
        return value.translate(self._table) if isinstance(value, str) else value

    def _wrap(self, value: Any) -> Any:
        """Make the strings of a result searchable too."""
        if isinstance(value, list | tuple):
            return type(value)(map(self._wrap, value))
        return ShadowStr(value, self._table) if isinstance(value, str) else value


def _shadow_method(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def call(self: ShadowStr, *args: Any, **kwargs: Any) -> Any:
        substituted = {key: self._substitute(value) for key, value in kwargs.items()}
        return self._wrap(method(self, *map(self._substitute, args), **substituted))

    return call


for _name in SEARCH_METHODS:
    setattr(ShadowStr, _name, _shadow_method(_name))


class _GenerationTag(Extension):
    """`{% generation %}`, which marks the assistant's text for training; renders its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _TemplateDict:
    """`dict` for templates: the constructor and fromkeys, without access to the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """`namespace` for templates, without names that reach Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may name an attribute `self`
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _reject_private(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _reject_private(name)
        super().__setitem__(name, value)


def _reject_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} must not start with an underscore")


class _SandboxEnvironment(ImmutableSandboxedEnvironment):
    """Raise SecurityError on access to an unsafe attribute; jinja2 would render it as empty."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__} is not allowed")


def _create_environment() -> _SandboxEnvironment:
    environment = _SandboxEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_TemplateDict(),
        namespace=_TemplateNamespace,
    )
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: the filter of jinja2 escapes HTML and sorts keys, unlike the training data."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(fmt: str) -> str:
    return datetime.now().strftime(fmt)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
