"""Command-line flags made from dataclass fields, and the fields made from the flags that were given.

A flag that is not given is absent from the namespace, so the dataclass's own default stands and no
default is written twice. Values are read here and checked by the dataclass itself.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
import types
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any, NoReturn, Union, get_args, get_origin

from ..engine.options import refusal, types_of, wanted
from ..kernels.errors import InputError, quoted

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

SWITCH = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
LETTER = {int: "N", float: "X"}


@dataclass(frozen=True)
class Kind:
    """How a field is written: the type of one value, whether "none" is one, and how many it holds."""

    item: type
    optional: bool = False
    several: bool = False
    keyed: bool = False


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one sentence (InputError), and whose values may start with a dash."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=Help)

    def format_help(self) -> str:
        """The help, with a usage line that does not repeat every flag."""
        places = [str(action.metavar) for action in self._actions if not action.option_strings]
        self.usage = " ".join([self.prog, *places, "[options]"])
        return super().format_help()

    def print_help(self, file: Any = None) -> None:
        """Unlike argparse's own, tells when nobody reads it."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """The namespace of `argv`. Raises InputError for what argparse would refuse."""
        return self.parse_args(self._joined(argv))

    def _joined(self, argv: Sequence[str]) -> list[str]:
        """`--flag -value` as `--flag=-value`: argparse takes only plain negative numbers apart from flags."""
        known = {flag: action for action in self._actions for flag in action.option_strings}
        joined: list[str] = []
        rest = list(argv)
        while rest and rest[0] != "--":
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            action = known.get(name)
            takes_value = action is not None and action.nargs is None
            if takes_value and word in known and rest and rest[0].partition("=")[0] not in known:
                value = rest.pop(0)
                word = f"{name}={value}"
            if action is not None and not takes_value and equals:
                self.error(f"{name} takes no value, but was given {quoted(value)}")
            if takes_value and value == "--":  # which argparse would read as no value at all
                self.error(f"{name}: a value may start with two dashes, but not be them")
            joined.append(word)
        return joined + rest


class Help(argparse.HelpFormatter):
    """Help whose flags stand in one column, and which never breaks a name at its dash."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(shutil.get_terminal_size().columns, 100) - 2)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def kind_of(annotation: Any) -> Kind:
    """The kind of a field by its type: int, float, bool, str, tuple[X, ...], dict[int, float] or a union.

    A flag takes the first type of a union; the others are for Python.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        item = next(a for a in inner if a is not types.NoneType)
        return Kind(item, optional=types.NoneType in inner)
    if origin is tuple:
        return Kind(inner[0], several=True)
    if origin is dict:
        return Kind(inner[1], keyed=True)
    if annotation in (int, float, bool, str):
        return Kind(annotation)
    raise TypeError(f"no flag can be made for a field of type {annotation!r}")


def kinds(cls: type, skip: Collection[str] = ()) -> dict[str, Kind]:
    """The kind of each field of a dataclass, by name, but for those in `skip`."""
    hints = types_of(cls)
    return {f.name: kind_of(hints[f.name]) for f in fields(cls) if f.name not in skip}


def flag(name: str) -> str:
    """`max_tokens` → `--max-tokens`."""
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """A default as a person would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def default_of(field: Field[Any]) -> Any:
    """The default of a dataclass field; a field without one has none."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def add_flag(
    group: argparse._ArgumentGroup, name: str, kind: Kind, help: str, choices: Collection[str] = ()
) -> None:
    """Adds the flag of one field. Values stay text until `given` reads them; only bools are switches."""
    text = help.replace("%", "%%")
    if kind.item is bool:
        group.add_argument(
            flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, dest=name, help=text
        )
        return
    letter = LETTER.get(kind.item, name.rpartition("_")[2].upper())
    group.add_argument(
        flag(name),
        action="append" if kind.several or kind.keyed else "store",
        default=argparse.SUPPRESS,
        dest=name,
        metavar="ID=BIAS" if kind.keyed else metavar(choices) or letter,
        help=text,
    )


def metavar(choices: Collection[str]) -> str:
    """`{a,b}`, "" without choices. They are shown here and checked where they are used, for some are open."""
    return "{" + ",".join(choices) + "}" if choices else ""


def add_fields(parser: Parser, title: str, cls: type, skip: Collection[str] = ()) -> argparse._ArgumentGroup:
    """A group of flags, one for each field of the dataclass, but for those in `skip`."""
    group = parser.add_argument_group(title)
    by_name = {f.name: f for f in fields(cls)}
    for name, kind in kinds(cls, skip).items():
        field = by_name[name]
        default = default_of(field)
        is_empty = isinstance(default, tuple | dict) and not default
        help = field.metadata["help"] + ("" if is_empty else f" (default: {shown(default)})")
        add_flag(group, name, kind, help, field.metadata.get("choices", ()))
    return group


def given(cls: type, namespace: argparse.Namespace, skip: Collection[str] = ()) -> dict[str, Any]:
    """The fields of `cls` whose flags were given, as their types. Raises InputError for what is none."""
    found = vars(namespace)
    return {
        name: _collected(name, kind, found[name]) for name, kind in kinds(cls, skip).items() if name in found
    }


def _collected(name: str, kind: Kind, value: Any) -> Any:
    if kind.item is bool:
        return value
    if kind.several:
        return tuple(read(flag(name), kind, text) for text in value)
    if kind.keyed:
        return _keyed(flag(name), [_pair(flag(name), kind, text) for text in value])
    return read(flag(name), kind, value)


def _keyed(name: str, pairs: list[tuple[int, Any]]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{name} has {key} twice; once is enough")
        found[key] = value
    return found


def _pair(name: str, kind: Kind, text: str) -> tuple[int, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise refusal(name, text, "ID=BIAS, such as 42=-100")
    return read(name, Kind(int), key), read(name, kind, value)


def read(name: str, kind: Kind, text: str) -> Any:
    """One value from its text. `name` is what the sentence of an InputError calls it."""
    if kind.optional and text.strip().lower() == "none":
        return None
    try:
        return SWITCH[text.strip().lower()] if kind.item is bool else kind.item(text)
    except (ValueError, KeyError):
        right = wanted(kind.item) + (", or none" if kind.optional else "")
        raise refusal(name, text, right) from None
