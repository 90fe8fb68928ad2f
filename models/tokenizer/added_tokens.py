"""Read added and special tokens from the JSON files of a model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken

from ...kernels.common.errors import InputError, short_repr
from ..common.json_files import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SPECIAL_TOKEN_KEYS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
SPECIAL_TOKEN_LIST_KEYS = ("additional_special_tokens", "extra_special_tokens")
MATCH_FLAGS = ("lstrip", "rstrip", "single_word", "special", "normalized")
MAX_TOKEN_ID = 2**31 - 1


def read_added_tokens(folder: Path) -> list[tuple[AddedToken, int | None]]:
    """Return each added token with its id, by ascending id, then the tokens without an id in these files.

    The vocabulary must contain the latter. Ids are in tokenizer_config.json (`added_tokens_decoder`) and in
    the older added_tokens.json. A token is special if its entry says so, or if it is the value of a
    special-token key, such as "bos_token". Raises InputError when a file has an invalid entry.
    """
    special_tokens = {token.content: token for token in _iter_special_tokens(folder)}
    tokens_by_text: dict[str, tuple[AddedToken, int | None]] = {
        text: (token, None) for text, token in special_tokens.items()
    }
    for token, token_id in _iter_tokens_with_ids(folder):
        token.special = token.special or token.content in special_tokens
        tokens_by_text[token.content] = (token, token_id)
    tokens_by_text.pop("", None)
    return sorted(tokens_by_text.values(), key=lambda entry: MAX_TOKEN_ID if entry[1] is None else entry[1])


def read_special_token(folder: Path, name: str) -> str | None:
    """Return the text of "bos_token" or "eos_token": "" if it is null, None if no file has the key."""
    undefined = True
    for path in (folder / TOKENIZER_CONFIG, folder / SPECIAL_TOKENS_MAP):
        data = read_json(path)
        undefined = undefined and name not in data
        if data.get(name) is not None:
            return str(_parse_token(path, name, data[name]).content)
    return None if undefined else ""


def _iter_tokens_with_ids(folder: Path) -> Iterator[tuple[AddedToken, int]]:
    """Yield tokens with ids, those of the newer file format last."""
    path = folder / ADDED_TOKENS
    for text, raw_id in read_json(path).items():
        yield _parse_token(path, "a token", text), _parse_token_id(path, text, raw_id)
    path = folder / TOKENIZER_CONFIG
    entries = read_json(path).get("added_tokens_decoder") or {}
    if not isinstance(entries, dict):
        raise InputError(
            f"added_tokens_decoder in {str(path)!r} is {short_repr(entries)}; it must be an object"
        )
    for raw_id, entry in entries.items():
        token, is_number = (
            _parse_token(path, f"token {short_repr(raw_id)}", entry),
            raw_id.isdecimal() and len(raw_id) < 20,
        )
        yield token, _parse_token_id(path, token.content, int(raw_id) if is_number else raw_id)


def _iter_special_tokens(folder: Path) -> Iterator[AddedToken]:
    """Yield the tokens of the special-token keys, all marked special."""
    for path in (folder / TOKENIZER_CONFIG, folder / SPECIAL_TOKENS_MAP):
        data = read_json(path)
        entries = [(name, data[name]) for name in SPECIAL_TOKEN_KEYS if data.get(name) is not None]
        for name in SPECIAL_TOKEN_LIST_KEYS:
            values = data.get(name) or []
            if not isinstance(values, list | dict):
                raise InputError(
                    f"{name} in {str(path)!r} is {short_repr(values)}; it must be a list of tokens"
                )
            entries += [(name, entry) for entry in (values.values() if isinstance(values, dict) else values)]
        for name, entry in entries:
            token = _parse_token(path, name, entry)
            token.special = True
            yield token


def _parse_token(path: Path, name: str, value: Any) -> AddedToken:
    """Parse a token from its text, or from an object with its text and match flags."""
    entry = value if isinstance(value, dict) else {"content": value}
    flags = {flag: entry.get(flag, False) for flag in MATCH_FLAGS}
    try:
        return AddedToken(str.__str__(entry.get("content")), **flags)
    except (TypeError, UnicodeEncodeError):
        raise InputError(
            f"{name} in {str(path)!r} is {short_repr(value)}; it must be a string, or an object with content"
        ) from None


def _parse_token_id(path: Path, token: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_TOKEN_ID:
        raise InputError(
            f"the id of token {short_repr(token)} in {str(path)!r} is {short_repr(value)}; it must be an "
            f"integer ≥ 0"
        )
    return value
