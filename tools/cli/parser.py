"""Argument parser whose errors are InputErrors, and its help formatter."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from typing import TYPE_CHECKING, Any, NoReturn

from ...kernels.common.errors import InputError, short_repr

if TYPE_CHECKING:
    from collections.abc import Sequence


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises InputError and accepts flag values that start with a dash."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog, description=description, allow_abbrev=False, formatter_class=HelpFormatter
        )

    def format_help(self) -> str:
        """The help, with a usage line that does not list every flag."""
        positionals = [str(action.metavar) for action in self._actions if not action.option_strings]
        self.usage = " ".join([self.prog, *positionals, "[options]"])
        return super().format_help()

    def print_help(self, file: Any = None) -> None:
        """Print the help; unlike argparse, raise BrokenPipeError if the pipe is closed."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def parse_argv(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse `argv`. Raises InputError for invalid arguments."""
        return self.parse_args(self._join_flag_values(argv))

    def _join_flag_values(self, argv: Sequence[str]) -> list[str]:
        """Rewrite `--flag -value` as `--flag=-value`: argparse itself accepts only negative numbers there."""
        actions = {flag: action for action in self._actions for flag in action.option_strings}
        joined: list[str] = []
        remaining = list(argv)
        while remaining and remaining[0] != "--":
            arg = remaining.pop(0)
            name, sep, value = arg.partition("=")
            action = actions.get(name)
            takes_value = action is not None and action.nargs is None
            if takes_value and arg in actions and remaining and remaining[0].partition("=")[0] not in actions:
                value = remaining.pop(0)
                arg = f"{name}={value}"
            if action is not None and not takes_value and sep:
                self.error(f"{name} takes no value, but was given {short_repr(value)}")
            if takes_value and value == "--":  # argparse would read it as a missing value
                self.error(f"{name}: the value must not be '--'")
            joined.append(arg)
        return joined + remaining


class HelpFormatter(argparse.HelpFormatter):
    """Aligns all flags in one column and never breaks a name at a dash."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(shutil.get_terminal_size().columns, 100) - 2)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)
