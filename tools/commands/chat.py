"""`trimtab chat`: a conversation whose wishes may change between turns."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...engine.methods.builtin import Base
from ...engine.methods.objective import Objective
from ...engine.request import Request
from ...kernels.common.errors import InputError, RunError, quoted
from ..cli import common_args, formatting, live_answer, open_engine, terminal
from ..cli import method_args as steering

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from ...engine.engine import Engine
    from ...engine.methods.base import Method
    from ...engine.outputs import Output
    from ...engine.sampling_params import SamplingParams
    from ..cli.parser import Parser

HELP = """\
/prefer TEXT=WEIGHT               add a wish, or change its weight
/prefer                           list the wishes
/drop TEXT or /drop NUMBER        drop a wish
/method NAME [field=value ...]    how wishes steer from now on; without wishes answers are plain
/system TEXT                      change the system text; without TEXT 'You are a helpful assistant.'
/reset                            forget the conversation; wishes stay
/help                             this text
/quit                             leave; so does Ctrl-D
Ctrl-C stops an answer and keeps what was said."""
TRIAL = Objective("a wish to try settings with, before there is any")


def add_arguments(parser: Parser) -> None:
    """The flags of wishes, method, sampling, model and output."""
    parser.epilog = "In the chat, /help lists what may be changed between turns."
    common_args.add_system(parser)
    steering.add_flags(parser)
    common_args.add_sampling(parser, skip=("n",))
    common_args.add_model(parser)
    common_args.add_output(parser, json=None)


def run(args: argparse.Namespace) -> int:
    """Reads turns until the input ends. A mistake in a turn is a sentence, and the chat goes on."""
    wishes = steering.wishes(args)
    choice = steering.choice(args, wishes or [TRIAL])
    choice.toward(wishes or [TRIAL])
    sampling, config = common_args.sampling(args), common_args.config(args)
    stdin = common_args.stdin()
    chat = Chat(
        open_engine.open_engine(config), wishes, choice, sampling, system=args.system, trace=args.trace
    )
    interactive = stdin.isatty() and terminal.watched()
    if interactive:
        print("/help says what can be changed between turns.")
    for line in common_args.lines(_typed() if interactive else stdin):
        if not chat.take(line.strip()):
            break
    return 0


def _typed() -> Iterator[str]:
    """Lines as a person edits them; Ctrl-C drops a line, Ctrl-D ends."""
    with suppress(ImportError):  # some Pythons are built without it
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
    """A conversation: what was said, and how the next answer is to be steered."""

    def __init__(
        self,
        engine: Engine,
        wishes: list[Objective],
        choice: steering.Choice,
        sampling: SamplingParams,
        *,
        system: str | None = None,
        trace: bool = True,
    ) -> None:
        self.wishes = wishes
        self.choice = choice
        self._engine = engine
        self._sampling = sampling
        self._system = system
        self._trace = trace
        self._turns: list[dict[str, Any]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/prefer": self._prefer,
            "/drop": self._drop,
            "/method": self._method,
            "/system": self._set_system,
            "/reset": self._reset,
            "/help": lambda rest: print(HELP),
        }

    def take(self, line: str) -> bool:
        """Obeys a command or answers a turn. False when it was /quit."""
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        try:
            if command in self._commands:
                self._commands[command](rest.strip())
            elif command.startswith("/"):
                raise InputError(f"there is no command {quoted(command)}; /help lists them")
            elif line:
                self._answer(line)
        except (InputError, RunError) as error:
            terminal.say(str(error))
        return True

    def steering(self) -> Method:
        """The method of the next answer. Without wishes it is base, whichever was chosen."""
        return self.choice.toward(self.wishes) if self.wishes else Base()

    def _answer(self, text: str) -> None:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        turns = [*self._turns, {"role": "user", "content": text}]
        request = Request([*system, *turns], self.steering(), self._sampling, trace=self._trace)
        said = self._stream(request)
        if said.strip():
            self._turns = [*turns, {"role": "assistant", "content": said}]

    def _stream(self, request: Request) -> str:
        """Shows the answer and returns what was said. Raises RunError when the engine gives up on it."""
        said, output = "", None
        with live_answer.interruptible() as stopped, live_answer.view(request) as view:
            for delta in live_answer.pieces(self._engine, request, stopped):
                view.add(delta)
                said += delta.text
                output = delta.output or output
            view.finish(self._caption(output))
        error = output and live_answer.error_of(output)
        if error:
            raise RunError(error)
        return said

    def _caption(self, output: Output | None) -> str:
        return formatting.caption(output, self._sampling.temperature > 0) if output else "stopped"

    def _prefer(self, rest: str) -> None:
        if rest:
            wish = steering.parse_wish(rest)
            kept = [wish if w.text == wish.text else w for w in self.wishes]
            self._try(kept if wish in kept else [*kept, wish])
        for number, each in enumerate(self.wishes, 1):
            print(f"{number}. {terminal.safe(each.text)} = {each.weight:g}")
        if not self.wishes:
            print("no wishes; /prefer TEXT=WEIGHT adds one")

    def _drop(self, rest: str) -> None:
        found = [w for i, w in enumerate(self.wishes, 1) if rest in (w.text, str(i))]
        if not found:
            raise InputError(f"there is no wish {quoted(rest)} to drop; /prefer lists them")
        self._try([w for w in self.wishes if w is not found[0]])

    def _try(self, wishes: list[Objective]) -> None:
        """Takes these wishes, unless the method refuses them."""
        before, self.wishes = self.wishes, wishes
        try:
            self.steering()
        except InputError:
            self.wishes = before
            raise

    def _method(self, rest: str) -> None:
        name, *settings = rest.split() or [""]
        if name:
            choice = steering.named(name, settings)
            choice.toward(self.wishes or [TRIAL])
            self.choice = choice
        print(f"method: {self.choice.label}")

    def _set_system(self, rest: str) -> None:
        self._system = rest or None

    def _reset(self, rest: str) -> None:
        self._turns = []
