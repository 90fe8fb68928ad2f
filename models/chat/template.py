"""The checkpoint's own chat template, found and given plain texts to render."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, cut, quoted
from ..common.json_files import read_json
from .renderer import Renderer
from .sandbox_process import LIMITS, Limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..tokenizer.tokenizer import Tokenizer

Message = Mapping[str, Any]
Choice = Callable[[str, str], bool]
"""Whether a text is to be disguised, by itself and its place: "messages[0]['content']", or "" for a key."""


class ChatTemplate:
    """A Jinja chat template in the dialect of transformers. Checkpoints are not trusted: see `Renderer`.

    Raises InputError when the source is no valid template.
    """

    def __init__(
        self, source: str, bos_token: str = "", eos_token: str = "", limits: Limits = LIMITS
    ) -> None:
        self.source = source
        self._special = {"=bos_token": f"={bos_token}", "=eos_token": f"={eos_token}"}
        self._renderer = Renderer(source, limits)

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
        return self._renderer.render(self._variables(messages, kwargs, lambda text, place: False))

    def render_both(
        self,
        messages: Sequence[Message],
        extra: Mapping[str, Any],
        chosen: Choice,
        disguise: tuple[str, str],
    ) -> tuple[str, str | None]:
        """The same, and once more with the chosen texts of `messages` and `extra` in other letters.

        `disguise` is the letters, and those that stand for them. None where the template fails on those.
        """
        return self._renderer.render_both(self._variables(messages, extra, chosen), disguise)

    def texts(self, messages: Sequence[Message], extra: Mapping[str, Any]) -> list[tuple[str, str]]:
        """All texts that `render` gives to the template, each with its place, as a `Choice` has them.

        Raises InputError where one is none that a template takes.
        """
        found = list[tuple[str, str]]()

        def noted(text: str, place: str) -> bool:
            found.append((text, place))
            return False

        self._variables(messages, extra, noted)
        return found

    def _variables(
        self, messages: Sequence[Message], extra: Mapping[str, Any], chosen: Choice
    ) -> dict[str, Any]:
        try:
            return {
                "=tools": None,  # templates test these for none, as transformers always defines them
                "=documents": None,
                "=add_generation_prompt": True,
                **self._special,
                **_plain(extra, "chat_template_kwargs", chosen),
                "=messages": _plain(messages, "messages", chosen),
            }
        except RecursionError as error:
            raise InputError(
                "the chat template cannot render this conversation: it is nested too deep"
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
        raise InputError(f"chat_template in {config} is {quoted(found)}; it must be a template's text")
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
            f"chat_template is {quoted(override)}; it must be a Jinja template or a file that holds one"
        )
    return override


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the chat template {path} cannot be read ({error}); it must be UTF-8 text"
        ) from error


def _plain(value: Any, name: str, chosen: Choice) -> Any:
    """A copy in plain JSON types, with texts as `Renderer` takes them."""
    if value is None or type(value) in (int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {
            _marked(str(key), "", chosen): _plain(item, f"{name}[{key!r}]", chosen)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{index}]", chosen) for index, item in enumerate(value)]
    if isinstance(value, str):  # a subclass, such as an enum's member, becomes its plain value
        return _marked(str.__str__(value), name, chosen)
    if isinstance(value, int | float):
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)
    raise InputError(f"{cut(name)} is {quoted(value)}; a chat template takes only JSON values")


def _marked(text: str, place: str, chosen: Choice) -> str:
    return ("~" if chosen(text, place) else "=") + text
