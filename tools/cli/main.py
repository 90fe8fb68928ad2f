"""The command `trimtab`: finds the verb, and turns every failure into one sentence and an exit status."""

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
from .terminal import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TextIO

VERBS = {
    "generate": "decode one prompt toward weighted wishes",
    "chat": "talk with a model; wishes may change between turns",
    "compare": "one prompt, several methods side by side",
    "serve": "an OpenAI-compatible server, and a page to try it on",
    "pull": "download the demo model",
    "convert": "turn a GGUF file into a model folder",
    "info": "what a model is, and what it takes to hold",
    "bench": "how fast it is: latency, throughput, serving, beside peers, beside another commit",
    "profile": "what the kernels take on each GPU; where a decoding step's time goes",
    "plan": "how many GPUs a load takes, how fast it is then and what it costs",
    "tune": "measures how this machine's GPU is best launched, and writes it down",
    "evaluate": "how far each method turns toward wishes, and what it costs",
}
PACKAGES = ("bench", "evaluate", "plan", "profile")
"""Commands that are folders of their own; each other one is a file of `tools/commands`."""
PACKAGE = Path(__file__).parents[2]
FOLDERS = ("engine", "kernels", "models", "tools")
WRONG_INPUT, FAILED, PIPE_CLOSED = 2, 1, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. 0: done, 1: failed, 2: wrong input, 130: interrupted, 141: nobody reads on."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _ready_streams()
    with _notes(), terminable():
        try:
            status = _dispatch(arguments)
            sys.stdout.flush()
            return status
        except InputError as error:
            say(str(error))
            return WRONG_INPUT
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            _drop_stdout()
            return PIPE_CLOSED
        except (RunError, OSError, MemoryError, RuntimeError) as error:
            sentence = _failure(error)
            if sentence is None:
                raise
            say(sentence)
            return FAILED


def _dispatch(arguments: list[str]) -> int:
    if sys.stdout is None:
        raise RunError("standard output is closed; there is nowhere to write to")
    for argument in arguments:
        _require_text(argument)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"trimtab {VERSION}")
        return 0
    name, *rest = arguments
    if name not in VERBS:
        raise InputError(f"there is no verb {name!r}; verbs are {', '.join(VERBS)}; see trimtab --help")
    folder = "tools" if name in PACKAGES else "tools.commands"
    return command.run(f"trimtab.{folder}.{name}", f"trimtab {name}", VERBS[name], rest)


def _require_text(argument: str) -> None:
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise InputError(f"the argument {argument!r} is no UTF-8 text") from None


def _overview() -> str:
    verbs = "\n".join(f"  {name:<10} {text}" for name, text in VERBS.items())
    return (
        "usage: trimtab VERB ...\n\n"
        "Decode one frozen language model toward several weighted wishes at once.\n\n"
        f"verbs:\n{verbs}\n\n"
        "options:\n  -h, --help  this text; trimtab VERB --help says more\n  --version   the version\n\n"
        'example:\n  trimtab generate "What is rain?" --prefer "Be poetic.=0.7" --prefer "Be brief.=0.3"'
    )


def _failure(error: Exception) -> str | None:
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


def _ready_streams() -> None:
    """Has stdin refuse what is no text, and the other two write whatever comes.

    A terminal without UTF-8 gets written-out characters instead of an exception. What is said to a closed
    stderr is lost.
    """
    sys.stderr = sys.stderr or io.StringIO()
    _on_odd_characters(sys.stdin, "strict")
    _on_odd_characters(sys.stdout, "backslashreplace")
    _on_odd_characters(sys.stderr, "backslashreplace")


def _on_odd_characters(stream: TextIO, errors: str) -> None:
    reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        with suppress(io.UnsupportedOperation):  # it has been read from
            reconfigure(errors=errors)


def _drop_stdout() -> None:
    """Points stdout at nothing, so that the interpreter's last flush does not complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _notes() -> Iterator[None]:
    """Within, a UserWarning of trimtab is one line on stderr, and each is shown once."""
    seen: set[str] = set()
    with warnings.catch_warnings():
        as_before = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, *rest: Any, **named: Any
        ) -> None:
            if not _ours(category, filename):
                as_before(message, category, filename, *rest, **named)
            elif str(message) not in seen:
                seen.add(str(message))
                say(f"note: {message}")

        warnings.filterwarnings("always", category=UserWarning, module=r"trimtab\.")
        warnings.simplefilter("always", SteeringWarning)
        warnings.showwarning = show
        yield


def _ours(category: type[Warning], filename: str) -> bool:
    path = Path(filename)
    here = path.is_relative_to(PACKAGE) and path.relative_to(PACKAGE).parts[0] in FOLDERS
    return issubclass(category, SteeringWarning) or (category is UserWarning and here)
