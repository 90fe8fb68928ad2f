"""The tokens that a model folder names beside its vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken

from ...kernels.common.errors import InputError, quoted
from ..common.json_files import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONFIG, SPECIALS, NUMBERS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("lstrip", "rstrip", "single_word", "special", "normalized")
MAX_ID = 2**31 - 1


def added_tokens(folder: Path) -> list[tuple[AddedToken, int | None]]:
    """Each token with its id, by rising ids; then those without, whose text must have an id already.

    Ids stand in tokenizer_config.json (`added_tokens_decoder`) and in the older added_tokens.json. Special
    are tokens that are said to be, and those that the folder names for a purpose. Raises InputError when
    a file holds something else.
    """
    named = {token.content: token for token in _named(folder)}
    found: dict[str, tuple[AddedToken, int | None]] = {text: (token, None) for text, token in named.items()}
    for token, index in _numbered(folder):
        token.special = token.special or token.content in named
        found[token.content] = (token, index)
    found.pop("", None)
    return sorted(found.values(), key=lambda entry: MAX_ID if entry[1] is None else entry[1])


def special_token(folder: Path, name: str) -> str | None:
    """The text of "bos_token" or "eos_token": "" where there is to be none, None where no file says."""
    silent = True
    for path in (folder / CONFIG, folder / SPECIALS):
        found = read_json(path)
        silent = silent and name not in found
        if found.get(name) is not None:
            return str(_token(path, name, found[name]).content)
    return None if silent else ""


def _numbered(folder: Path) -> Iterator[tuple[AddedToken, int]]:
    """Tokens with ids, the newer file last."""
    path = folder / NUMBERS
    for text, number in read_json(path).items():
        yield _token(path, "a token", text), _id(path, text, number)
    path = folder / CONFIG
    entries = read_json(path).get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise InputError(f"added_tokens_decoder in {str(path)!r} is {quoted(entries)}; it must be an object")
    for number, entry in entries.items():
        token, is_number = (
            _token(path, f"token {quoted(number)}", entry),
            number.isdecimal() and len(number) < 20,
        )
        yield token, _id(path, token.content, int(number) if is_number else number)


def _named(folder: Path) -> Iterator[AddedToken]:
    """Tokens with a purpose, all special."""
    for path in (folder / CONFIG, folder / SPECIALS):
        found = read_json(path)
        entries = [(name, found[name]) for name in NAMES if found.get(name) is not None]
        for name in LISTS:
            several = found.get(name) or []
            if not isinstance(several, list | dict):
                raise InputError(f"{name} in {str(path)!r} is {quoted(several)}; it must be a list of tokens")
            entries += [
                (name, entry) for entry in (several.values() if isinstance(several, dict) else several)
            ]
        for name, entry in entries:
            token = _token(path, name, entry)
            token.special = True
            yield token


def _token(path: Path, name: str, value: Any) -> AddedToken:
    """A token in either form: its text, or an object with its text and how it is matched."""
    entry = value if isinstance(value, dict) else {"content": value}
    flags = {flag: entry.get(flag, False) for flag in FLAGS}
    try:
        return AddedToken(str.__str__(entry.get("content")), **flags)
    except (TypeError, UnicodeEncodeError):
        raise InputError(
            f"{name} in {str(path)!r} is {quoted(value)}; it must be a text, or an object with a content"
        ) from None


def _id(path: Path, token: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_ID:
        raise InputError(
            f"the id of token {quoted(token)} in {str(path)!r} is {quoted(value)}; it must be an integer ≥ 0"
        )
    return value
