"""Load the chat template of a checkpoint and render conversations with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, short_repr, truncate
from ..common.json_files import read_json
from .renderer import SandboxRenderer
from .sandbox_process import DEFAULT_LIMITS, SandboxLimits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..tokenizer.tokenizer import Tokenizer

Message = Mapping[str, Any]
TextSelector = Callable[[str, str], bool]
"""Whether to substitute a text, from the text and its path: "messages[0]['content']", or "" for a key."""


class ChatTemplate:
    """A Jinja chat template in the dialect of transformers, rendered in a sandbox: see `SandboxRenderer`.

    Raises InputError when the source is not a valid template.
    """

    def __init__(
        self, source: str, bos_token: str = "", eos_token: str = "", limits: SandboxLimits = DEFAULT_LIMITS
    ) -> None:
        self.source = source
        self._special_tokens = {"=bos_token": f"={bos_token}", "=eos_token": f"={eos_token}"}
        self._renderer = SandboxRenderer(source, limits)

    @classmethod
    def from_folder(
        cls, folder: Path, tokenizer: Tokenizer, override: str | None = None
    ) -> ChatTemplate | None:
        """Load the template of a model folder, or `override`: the template itself, or the path of its file.

        chat_template.jinja takes precedence over tokenizer_config.json. None if the model has no template.
        Raises InputError when the template is malformed or the override is neither a template nor a file.
        """
        source = _read_folder_source(Path(folder)) if override is None else _read_override(override)
        return None if source is None else cls(source, tokenizer.bos_token, tokenizer.eos_token)

    def render(self, messages: Sequence[Message], /, **kwargs: Any) -> str:
        """Render the conversation, with the assistant's prefix at the end unless add_generation_prompt=False.

        `kwargs` are further variables of the template. Raises InputError when the template rejects the
        conversation or fails on it.
        """
        return self._renderer.render(self._build_variables(messages, kwargs, lambda text, path: False))

    def render_shadowed(
        self,
        messages: Sequence[Message],
        template_kwargs: Mapping[str, Any],
        is_untrusted: TextSelector,
        substitution: tuple[str, str],
    ) -> tuple[str, str | None]:
        """Render twice: as `render`, and with the untrusted texts in substitute characters.

        `substitution` is the characters, and their substitutes. The second text is None if the template fails
        on it.
        """
        return self._renderer.render_shadowed(
            self._build_variables(messages, template_kwargs, is_untrusted), substitution
        )

    def collect_texts(
        self, messages: Sequence[Message], template_kwargs: Mapping[str, Any]
    ) -> list[tuple[str, str]]:
        """Return all texts that `render` passes to the template, each with its path, as for TextSelector.

        Raises InputError for a value that is not JSON.
        """
        texts = list[tuple[str, str]]()

        def record(text: str, path: str) -> bool:
            texts.append((text, path))
            return False

        self._build_variables(messages, template_kwargs, record)
        return texts

    def _build_variables(
        self, messages: Sequence[Message], template_kwargs: Mapping[str, Any], is_untrusted: TextSelector
    ) -> dict[str, Any]:
        try:
            return {
                "=tools": None,  # templates test these with "is none": transformers always defines them
                "=documents": None,
                "=add_generation_prompt": True,
                **self._special_tokens,
                **_to_plain_json(template_kwargs, "chat_template_kwargs", is_untrusted),
                "=messages": _to_plain_json(messages, "messages", is_untrusted),
            }
        except RecursionError as error:
            raise InputError(
                "the chat template cannot render this conversation: it is nested too deeply"
            ) from error


def _read_folder_source(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    config = folder / "tokenizer_config.json"
    source = read_json(config).get("chat_template")
    if isinstance(source, list):  # named templates; "default" is for plain chat
        templates = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = templates.get("default")
    if source is not None and not isinstance(source, str):
        raise InputError(f"chat_template in {config} is {short_repr(source)}; it must be a string")
    return source


def _read_override(override: str) -> str:
    try:
        is_file = Path(override).is_file()
    except (OSError, ValueError):  # the text of a template may not be a valid path
        is_file = False
    if is_file:
        return _read_text(Path(override))
    if "{" not in override:
        raise InputError(
            f"chat_template is {short_repr(override)}; it must be a Jinja template or the path of one"
        )
    return override


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the chat template {path} cannot be read ({error}); it must be UTF-8 text"
        ) from error


def _to_plain_json(value: Any, path: str, is_untrusted: TextSelector) -> Any:
    """Copy to plain JSON types, with texts marked for `SandboxRenderer`."""
    if value is None or type(value) in (int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {
            _mark_text(str(key), "", is_untrusted): _to_plain_json(item, f"{path}[{key!r}]", is_untrusted)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_to_plain_json(item, f"{path}[{index}]", is_untrusted) for index, item in enumerate(value)]
    if isinstance(value, str):  # a subclass, such as an enum member, becomes a plain str
        return _mark_text(str.__str__(value), path, is_untrusted)
    if isinstance(value, int | float):
        return int.__int__(value) if isinstance(value, int) else float.__float__(value)
    raise InputError(f"{truncate(path)} is {short_repr(value)}; chat template variables must be JSON values")


def _mark_text(text: str, path: str, is_untrusted: TextSelector) -> str:
    return ("~" if is_untrusted(text, path) else "=") + text
