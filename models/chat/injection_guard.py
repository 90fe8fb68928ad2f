"""Keep user-written text from becoming special tokens of the chat template.

The conversation is rendered twice. In the second rendering, the shadow, untrusted texts are written in
substitute characters that occur nowhere else. Templates trim, cut and search such texts, so a shadow text can
be searched for the characters that it replaces. When the shadow equals the first rendering, character by
character, the substitutes mark the untrusted characters.
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
"""Unicode's private use planes, from which the substitutes are taken."""
JSON_ESCAPED = frozenset('"\\')
"""Characters that JSON output escapes with a backslash; a substitute would not be escaped."""


def render_with_untrusted(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any],
) -> tuple[str, Container[int]]:
    """Return the rendered conversation, and the indices of its untrusted characters.

    Untrusted are the visible characters of all message texts. A role or a text in `template_kwargs` is
    untrusted only if it contains an added token, because some templates write "<|" + role + "|>". If the
    template rewrites a text, for example to upper case, so that its characters cannot be matched, only texts
    that contain an added token are untrusted.

    Raises InputError when the template cannot render the conversation, or rewrites a text that contains an
    added token.
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
            used_chars.update(rendered)  # the template writes substitutes itself: choose others
        if shadow is None or shadow.translate(str.maketrans(substitutes, originals)) != rendered:
            return rendered, None
        return rendered, _UntrustedChars(shadow, frozenset(substitutes))

    rendered, untrusted = render_shadowed(
        lambda text, path: _is_message_text(path) or text in added_token_by_text
    )
    if untrusted is None and added_token_by_text:
        rendered, untrusted = render_shadowed(lambda text, path: text in added_token_by_text)
        if untrusted is None:
            raise InputError(
                f"a text of the conversation contains {min(added_token_by_text.values())!r}, a token of the "
                "model, and the chat template rewrites that text; remove the token"
            )
    return rendered, untrusted or ()


@dataclass(frozen=True)
class _UntrustedChars:
    """The set of indices at which `shadow` has a substitute character."""

    shadow: str
    substitutes: frozenset[str]

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and self.shadow[index] in self.substitutes


def _is_message_text(path: str) -> bool:
    """Whether the text at this path is in a message and is not its role."""
    return path.startswith("messages[") and not path.endswith("['role']")


def _private_alphabet(chars: set[str], used_chars: set[str]) -> tuple[str, str]:
    """Return the visible characters of `chars`, and an unused substitute for each."""
    visible = [char for char in chars - JSON_ESCAPED if char.isprintable() and not char.isspace()]
    unused = (letter for letter in map(chr, chain(*PRIVATE_USE_RANGES)) if letter not in used_chars)
    substitutes = [letter for letter, _ in zip(unused, visible, strict=False)]
    if len(substitutes) < len(visible):
        raise InputError(
            f"a text of the conversation has {len(visible)} different characters; the maximum is "
            f"{len(substitutes)}"
        )
    return "".join(visible), "".join(substitutes)
