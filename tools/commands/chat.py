"""`trimtab chat`: a conversation whose objectives may change between turns."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...engine.methods.builtin import Base
from ...engine.methods.objective import Objective
from ...engine.request import Request
from ...kernels.common.errors import InputError, RunError, short_repr
from ..cli import common_args, formatting, live_answer, method_args, open_engine, terminal

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from ...engine.engine import Engine
    from ...engine.methods.base import Method
    from ...engine.sampling_params import SamplingParams
    from ..cli.parser import Parser

HELP_TEXT = """\
/prefer TEXT=WEIGHT               add an objective, or change its weight
/prefer                           list the objectives
/drop TEXT or /drop NUMBER        drop an objective
/method NAME [field=value ...]    change the method; without objectives answers are not steered
/system TEXT                      change the system prompt (default: You are a helpful assistant.)
/reset                            clear the conversation; keep the objectives
/help                             show this help
/quit                             quit; so does Ctrl-D
Ctrl-C stops an answer and keeps its text."""
PLACEHOLDER = Objective("a placeholder that validates settings while there are no objectives")


def add_arguments(parser: Parser) -> None:
    """Add the flags of objectives, method, sampling, model and output."""
    parser.epilog = "In the chat, /help lists the commands that change settings between turns."
    common_args.add_system(parser)
    method_args.add_method_flags(parser)
    common_args.add_sampling(parser, skip=("n",))
    common_args.add_model(parser)
    common_args.add_output(parser, json=None)


def run(args: argparse.Namespace) -> int:
    """Read turns until the input ends. An error in a turn is printed, and the chat continues."""
    objectives = method_args.parse_objectives(args)
    method_spec = method_args.method_from_args(args, objectives or [PLACEHOLDER])
    method_spec.build_compatible(objectives or [PLACEHOLDER])
    sampling, config = common_args.sampling_params(args), common_args.engine_config(args)
    stdin = common_args.get_stdin()
    chat = Chat(
        open_engine.open_engine(config),
        objectives,
        method_spec,
        sampling,
        system=args.system,
        trace=args.trace,
    )
    interactive = stdin.isatty() and terminal.is_tty()
    if interactive:
        print("/help lists the commands.")
    for line in common_args.read_lines(_read_terminal() if interactive else stdin):
        if not chat.handle_line(line.strip()):
            break
    return 0


def _read_terminal() -> Iterator[str]:
    """Yield lines with line editing; Ctrl-C discards a line, Ctrl-D ends the input."""
    with suppress(ImportError):  # optional in some Python builds
        import readline  # noqa: F401, PLC0415
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


class Chat:
    """A conversation: its messages, and the objectives, method and sampling of the next answer."""

    def __init__(
        self,
        engine: Engine,
        objectives: list[Objective],
        method_spec: method_args.MethodSpec,
        sampling: SamplingParams,
        *,
        system: str | None = None,
        trace: bool = True,
    ) -> None:
        self.objectives = objectives
        self.method_spec = method_spec
        self._engine = engine
        self._sampling = sampling
        self._system = system
        self._trace = trace
        self._history: list[dict[str, Any]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/prefer": self._prefer,
            "/drop": self._drop,
            "/method": self._set_method,
            "/system": self._set_system,
            "/reset": self._reset_history,
            "/help": lambda arg: print(HELP_TEXT),
        }

    def handle_line(self, line: str) -> bool:
        """Run a command or answer a turn. Returns False for /quit."""
        command, _, arg = line.partition(" ")
        if command == "/quit":
            return False
        try:
            if command in self._commands:
                self._commands[command](arg.strip())
            elif command.startswith("/"):
                raise InputError(f"unknown command {short_repr(command)}; /help lists them")
            elif line:
                self._reply(line)
        except (InputError, RunError) as error:
            terminal.log_line(str(error))
        return True

    def current_method(self) -> Method:
        """The method of the next answer; always base without objectives."""
        return self.method_spec.build_compatible(self.objectives) if self.objectives else Base()

    def _reply(self, text: str) -> None:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        history = [*self._history, {"role": "user", "content": text}]
        request = Request([*system, *history], self.current_method(), self._sampling, trace=self._trace)
        reply = self._stream(request)
        if reply.strip():
            self._history = [*history, {"role": "assistant", "content": reply}]

    def _stream(self, request: Request) -> str:
        """Show the answer and return its text. Raises RunError if the answer failed."""
        text, output = "", None
        with live_answer.catch_interrupt() as should_stop, live_answer.open_view(request) as view:
            for delta in live_answer.iter_deltas(self._engine, request, should_stop):
                view.add(delta)
                text += delta.text
                output = delta.output or output
            view.finish(formatting.format_caption_and_notes(output, request) if output else "stopped")
        error = output and live_answer.error_message(output)
        if error:
            raise RunError(error)
        return text

    def _prefer(self, arg: str) -> None:
        if arg:
            objective = method_args.parse_objective(arg)
            objectives = [objective if o.text == objective.text else o for o in self.objectives]
            self._set_objectives(objectives if objective in objectives else [*objectives, objective])
        for number, entry in enumerate(self.objectives, 1):
            print(f"{number}. {terminal.escape(entry.text)} = {entry.weight:g}")
        if not self.objectives:
            print("no objectives; /prefer TEXT=WEIGHT adds one")

    def _drop(self, arg: str) -> None:
        matches = [o for i, o in enumerate(self.objectives, 1) if arg in (o.text, str(i))]
        if not matches:
            raise InputError(f"unknown objective {short_repr(arg)}; /prefer lists them")
        self._set_objectives([w for w in self.objectives if w is not matches[0]])

    def _set_objectives(self, objectives: list[Objective]) -> None:
        """Set the objectives. Raises InputError and keeps the previous ones if the method rejects them."""
        previous, self.objectives = self.objectives, objectives
        try:
            self.current_method()
        except InputError:
            self.objectives = previous
            raise

    def _set_method(self, arg: str) -> None:
        name, *settings = arg.split() or [""]
        if name:
            method_spec = method_args.parse_method(name, settings)
            method_spec.build_compatible(self.objectives or [PLACEHOLDER])
            self.method_spec = method_spec
        print(f"method: {self.method_spec.label}")

    def _set_system(self, arg: str) -> None:
        self._system = arg or None

    def _reset_history(self, arg: str) -> None:
        self._history = []
