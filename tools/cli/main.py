"""The program `trimtab`: finds the command, and turns every failure into one sentence and an exit status."""

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
    "chat": "talk with a model; objectives may change between turns",
    "compare": "one prompt, several methods side by side",
    "serve": "an OpenAI-compatible server, and a page to try it on",
    "pull": "download the demo model",
    "convert": "turn a GGUF file into a model folder",
    "info": "what a model is, and what it takes to hold",
    "bench": "how fast it is: latency, throughput, serving, beside peers, beside another commit",
    "profile": "what the kernels take on each GPU; where a decoding step's time goes",
    "plan": "how many GPUs a load takes, how fast it is then and what it costs",
    "tune": "measures how this machine's GPU is best launched, and writes it down",
    "evaluate": "how far each method turns toward objectives, and what it costs",
}
PACKAGES = ("bench", "evaluate", "plan", "profile")
"""Commands that are folders of their own; each other one is a file of `tools/commands`."""
PACKAGE_DIR = Path(__file__).parents[2]
SUBPACKAGES = ("engine", "kernels", "models", "tools")
INVALID_INPUT, FAILED, PIPE_CLOSED = 2, 1, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. 0: done, 1: failed, 2: wrong input, 130: interrupted, 141: nobody reads on."""
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
        raise RunError("standard output is closed; there is nowhere to write to")
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
        raise InputError(f"unknown verb {name!r}; verbs are {', '.join(COMMANDS)}; see trimtab --help")
    folder = "tools" if name in PACKAGES else "tools.commands"
    return command.run(f"trimtab.{folder}.{name}", f"trimtab {name}", COMMANDS[name], rest)


def _require_utf8(arg: str) -> None:
    try:
        arg.encode()
    except UnicodeEncodeError:
        raise InputError(f"the argument {arg!r} is not UTF-8 text") from None


def _usage_text() -> str:
    commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    return (
        "usage: trimtab VERB ...\n\n"
        "Decode one frozen language model toward several weighted objectives at once.\n\n"
        f"verbs:\n{commands}\n\n"
        "options:\n  -h, --help  this text; trimtab VERB --help says more\n  --version   the version\n\n"
        'example:\n  trimtab generate "What is rain?" --prefer "Be poetic.=0.7" --prefer "Be brief.=0.3"'
    )


def _failure_message(error: Exception) -> str | None:
    """The sentence of a failed run; None for what is a defect and deserves its traceback."""
    # torch raises RuntimeErrors of its own when memory runs out, and is not imported for every verb.
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
    """Has stdin refuse what is no text, and the other two write whatever comes.

    A terminal without UTF-8 gets written-out characters instead of an exception. What is said to a closed
    stderr is lost.
    """
    sys.stderr = sys.stderr or io.StringIO()
    _set_encoding_errors(sys.stdin, "strict")
    _set_encoding_errors(sys.stdout, "backslashreplace")
    _set_encoding_errors(sys.stderr, "backslashreplace")


def _set_encoding_errors(stream: TextIO, errors: str) -> None:
    reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        with suppress(io.UnsupportedOperation):  # it has been read from
            reconfigure(errors=errors)


def _redirect_stdout_to_null() -> None:
    """Points stdout at nothing, so that the interpreter's last flush does not complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _show_warnings() -> Iterator[None]:
    """Within, a UserWarning of trimtab is one line on stderr, and each is shown once."""
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
