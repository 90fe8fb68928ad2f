"""Entry point of `trimtab`: command dispatch, error messages and exit status."""

from __future__ import annotations

import io
import os
import sys
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, RunError, SteeringWarning
from ...kernels.common.version import VERSION
from . import command
from .signals import INTERRUPTED, terminable
from .terminal import log_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TextIO

COMMANDS = {
    "generate": "decode one prompt toward weighted objectives",
    "chat": "chat with a model; objectives may change between turns",
    "compare": "one prompt, several methods side by side",
    "serve": "run an OpenAI-compatible server with a playground page",
    "pull": "download the demo model",
    "convert": "turn a GGUF file into a model folder",
    "info": "show a model's architecture, size and memory needs",
    "bench": "measure latency, throughput and serving; compare with other engines or another commit",
    "profile": "show the resources of each kernel on a GPU, or the stages of a decoding step",
    "plan": "estimate the GPUs, speed and cost of a load",
    "tune": "find the fastest kernel launch settings of this machine's GPU and save them",
    "evaluate": "evaluate how well each method follows objectives, and at what cost",
}
PACKAGES = ("bench", "evaluate", "plan", "profile")
"""Commands that are packages of `tools`; the others are modules of `tools/commands`."""
PACKAGE_DIR = Path(__file__).parents[2]
SUBPACKAGES = ("engine", "kernels", "models", "tools")
INVALID_INPUT, FAILED, PIPE_CLOSED = 2, 1, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    0: success, 1: failed, 2: invalid input, 130: interrupted, 141: the output pipe was closed.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    _configure_streams()
    with _show_warnings(), terminable():
        try:
            status = _dispatch(args)
            sys.stdout.flush()
            return status
        except InputError as error:
            log_line(str(error))
            return INVALID_INPUT
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            _redirect_stdout_to_null()
            return PIPE_CLOSED
        except (RunError, OSError, MemoryError, RuntimeError) as error:
            message = _failure_message(error)
            if message is None:
                raise
            log_line(message)
            return FAILED


def _dispatch(args: list[str]) -> int:
    if sys.stdout is None:
        raise RunError("standard output is closed")
    for arg in args:
        _require_utf8(arg)
    if not args or args[0] in ("-h", "--help"):
        print(_usage_text())
        return 0
    if args[0] == "--version":
        print(f"trimtab {VERSION}")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        raise InputError(f"unknown command {name!r}; commands are {', '.join(COMMANDS)}; see trimtab --help")
    folder = "tools" if name in PACKAGES else "tools.commands"
    return command.run(f"trimtab.{folder}.{name}", f"trimtab {name}", COMMANDS[name], rest)


def _require_utf8(arg: str) -> None:
    try:
        arg.encode()
    except UnicodeEncodeError:
        raise InputError(f"the argument {arg!r} is not valid UTF-8") from None


def _usage_text() -> str:
    commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return (
        "usage: trimtab COMMAND ...\n\n"
        "Decode one frozen language model toward several weighted objectives at once.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n  -h, --help  show this help; for a command, trimtab COMMAND --help\n"
        "  --version   show the version\n\n"
        'example:\n  trimtab generate "What is rain?" --prefer "Be poetic.=0.7" --prefer "Be brief.=0.3"'
    )


def _failure_message(error: Exception) -> str | None:
    """The error message of a failed run; None for an unexpected error, which is shown with its traceback."""
    # torch raises its own RuntimeErrors when out of memory, and is not imported for every command.
    if (
        isinstance(error, MemoryError)
        or "out of memory" in str(error)
        or "can't allocate memory" in str(error)
    ):
        return f"out of memory ({error})" if str(error) else "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    return str(error) if isinstance(error, OSError | RunError) else None


def _configure_streams() -> None:
    """Make stdin strict about invalid text, and make stdout and stderr write any text.

    A terminal without UTF-8 gets backslash escapes instead of an exception. Messages to a closed stderr are
    dropped.
    """
    sys.stderr = sys.stderr or io.StringIO()
    _set_encoding_errors(sys.stdin, "strict")
    _set_encoding_errors(sys.stdout, "backslashreplace")
    _set_encoding_errors(sys.stderr, "backslashreplace")


def _set_encoding_errors(stream: TextIO, errors: str) -> None:
    reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        with suppress(io.UnsupportedOperation):  # it has already been read from
            reconfigure(errors=errors)


def _redirect_stdout_to_null() -> None:
    """Redirect stdout to the null device, so that the interpreter's last flush does not fail."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _show_warnings() -> Iterator[None]:
    """Print each UserWarning of trimtab once, as one line on stderr, inside the block."""
    seen: set[str] = set()
    with warnings.catch_warnings():
        original = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, *args: Any, **kwargs: Any
        ) -> None:
            if not _is_ours(category, filename):
                original(message, category, filename, *args, **kwargs)
            elif str(message) not in seen:
                seen.add(str(message))
                log_line(f"note: {message}")

        warnings.filterwarnings("always", category=UserWarning, module=r"trimtab\.")
        warnings.simplefilter("always", SteeringWarning)
        warnings.showwarning = show
        yield


def _is_ours(category: type[Warning], filename: str) -> bool:
    path = Path(filename)
    in_package = path.is_relative_to(PACKAGE_DIR) and path.relative_to(PACKAGE_DIR).parts[0] in SUBPACKAGES
    return issubclass(category, SteeringWarning) or (category is UserWarning and in_package)
