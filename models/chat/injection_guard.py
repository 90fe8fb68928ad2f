"""Keep what users write from becoming special tokens of the chat template.

Texts from outside are rendered a second time in letters that stand nowhere else. Templates trim, cut and
search such texts, so the letters can be searched for what they stand for. When the second rendering says the
same as the first, letter by letter, these letters show what is from outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from ..tokenizer.tokenizer import Tokenizer
    from .template import ChatTemplate, Message, TextSelector

PRIVATE_USE_RANGES = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Code points that Unicode leaves to private use."""
JSON_ESCAPED = frozenset('"\\')
"""Letters that templates writing JSON put a backslash before, which no other letter would get."""


def render_with_untrusted(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any],
) -> tuple[str, Container[int]]:
    """The conversation as one text, and the places in it of characters that are not to be trusted.

    These are the visible characters of all that messages say, and of a role or a text in `template_kwargs`
    only when it holds what may be read as an added token, for there are templates that write "<|" + role +
    "|>". Where a template so changes a text that it cannot be followed, say to capitals, other messages are
    trusted too unless they hold such a thing.

    Raises InputError when the template cannot render the conversation, or so changes a text that does.
    """
    texts = template.collect_texts(messages, template_kwargs)
    added_token_by_text = {text: token for text, _ in texts if (token := tokenizer.find_added_token(text))}
    used_chars = set(template.source).union(*(text for text, _ in texts))

    def render_shadowed(is_untrusted: TextSelector) -> tuple[str, _UntrustedChars | None]:
        chars = set[str]().union(*(text for text, path in texts if is_untrusted(text, path)))
        for _ in range(2):
            originals, substitutes = _private_alphabet(chars, used_chars)
            rendered, shadow = template.render_shadowed(
                messages, template_kwargs, is_untrusted, (originals, substitutes)
            )
            if set(substitutes).isdisjoint(rendered):
                break
            used_chars.update(rendered)  # the template writes such letters itself: others will do
        if shadow is None or shadow.translate(str.maketrans(substitutes, originals)) != rendered:
            return rendered, None
        return rendered, _UntrustedChars(shadow, frozenset(substitutes))

    rendered, untrusted = render_shadowed(
        lambda text, path: _is_message_text(path) or text in added_token_by_text
    )
    if untrusted is None and added_token_by_text:
        rendered, untrusted = render_shadowed(lambda text, place: text in added_token_by_text)
        if untrusted is None:
            raise InputError(
                f"a text of the conversation holds {min(added_token_by_text.values())!r}, a token of the "
                f"model, and the "
                "chat template rewrites that text; leave the token out"
            )
    return rendered, untrusted or ()


@dataclass(frozen=True)
class _UntrustedChars:
    """Where some letters stand in a text."""

    shadow: str
    substitutes: frozenset[str]

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and self.shadow[index] in self.substitutes


def _is_message_text(path: str) -> bool:
    """Whether a text at this place is something that a message says."""
    return path.startswith("messages[") and not path.endswith("['role']")


def _private_alphabet(chars: set[str], used_chars: set[str]) -> tuple[str, str]:
    """The visible letters, and for each another that is not taken."""
    visible = [char for char in chars - JSON_ESCAPED if char.isprintable() and not char.isspace()]
    unused = (letter for letter in map(chr, chain(*PRIVATE_USE_RANGES)) if letter not in used_chars)
    substitutes = [letter for letter, _ in zip(unused, visible, strict=False)]
    if len(substitutes) < len(visible):
        raise InputError(
            f"a text of the conversation has {len(visible)} different letters; at most {len(substitutes)} "
            f"will do"
        )
    return "".join(visible), "".join(substitutes)
