"""Tokenizer backend for tokenizer.json, with the `tokenizers` package."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from ...kernels.common.errors import InputError, short_repr
from ..common.wrap_errors import wrap_errors
from .backend import AddedTokenMatch, TextPosition
from .detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer, byte_level_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

UNKNOWN_CHAR = "\U0010ffff"
"""A noncharacter, which no vocabulary contains."""
ENCODE_ERROR, DECODE_ERROR = (
    "tokenizer.json cannot encode the text",
    "tokenizer.json cannot decode the tokens",
)


class HFTokenizerBackend:
    """A `TokenizerBackend` over `tokenizers.Tokenizer`."""

    def __init__(self, hf_tokenizer: Backend) -> None:
        hf_tokenizer.no_truncation()  # a tokenizer saved after training may silently truncate long prompts
        hf_tokenizer.no_padding()
        added = hf_tokenizer.get_added_tokens_decoder()
        self.kind = type(hf_tokenizer.model).__name__
        self.vocab_size = max(hf_tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.added_tokens = {token.content: token_id for token_id, token in added.items()}
        self.unk_ids = _find_unk_ids(hf_tokenizer)
        self._next_positions = {
            index: TextPosition.AFTER_NORMALIZED if token.normalized else TextPosition.AFTER_TOKEN
            for index, token in added.items()
            if index not in self.unk_ids
        }
        self.special_tokens: dict[str, str] = {}
        self._hf_tokenizer = hf_tokenizer
        self._decoder = hf_tokenizer.decoder
        steps = [] if self._decoder is None else _flatten(_component_state(self._decoder))
        self._decoder_steps = [step["type"] for step in steps]
        self._special_texts = {token.content for token in added.values() if token.special}
        self._pipelines = {TextPosition.START: hf_tokenizer}
        self.bos_eos_ids = self._find_bos_eos_ids()

    @classmethod
    def from_file(cls, path: Path, added: Iterable[tuple[AddedToken, int | None]] = ()) -> HFTokenizerBackend:
        """Load a tokenizer.json, with the added tokens of other files in its folder.

        Raises InputError when the file is corrupt, or its id of a token differs from that of those files.
        """
        with wrap_errors(f"{str(path)!r} is a corrupt tokenizer file; fetch the model folder again"):
            return cls(cls._add_tokens(Backend.from_file(str(path)), path, added))

    @staticmethod
    def _add_tokens(
        hf_tokenizer: Backend, path: Path, added: Iterable[tuple[AddedToken, int | None]]
    ) -> Backend:
        file_tokens = {token.content for token in hf_tokenizer.get_added_tokens_decoder().values()}
        for token, token_id in added:
            if token.content in file_tokens or (
                token_id is None and hf_tokenizer.token_to_id(token.content) is None
            ):
                continue
            hf_tokenizer.add_tokens([token])
            if token_id is not None and (file_id := hf_tokenizer.token_to_id(token.content)) != token_id:
                raise InputError(
                    f"token {short_repr(token.content)} has id {file_id} in {path.name} and id {token_id} "
                    "in other files of the folder; the ids must be equal"
                )
        return hf_tokenizer

    def encode(self, text: str) -> list[int]:
        with wrap_errors(ENCODE_ERROR):
            ids: list[int] = self._hf_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_with_matches(self, text: str) -> tuple[list[int], list[AddedTokenMatch]]:
        with wrap_errors(ENCODE_ERROR):
            encoding = self._hf_tokenizer.encode(text, add_special_tokens=False)
        matches: list[AddedTokenMatch] = []
        segment_ids: list[int] = []  # ids since the last match
        for token_id, offsets in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._next_positions:
                matches.append(
                    AddedTokenMatch(*offsets, token_id, self._next_positions[token_id], tuple(segment_ids))
                )
                segment_ids = []
            else:
                segment_ids.append(token_id)
        return encoding.ids, matches

    def encode_plain(self, text: str, position: TextPosition) -> list[int]:
        with wrap_errors(ENCODE_ERROR):
            pipeline = self._get_pipeline(position)
            if pipeline.normalizer is not None:
                text = pipeline.normalizer.normalize_str(text)
            pieces = [text]
            if pipeline.pre_tokenizer is not None:
                pieces = [piece for piece, _ in pipeline.pre_tokenizer.pre_tokenize_str(text)]
            model = self._hf_tokenizer.model
            return [token.id for piece in pieces for token in model.tokenize(piece)]

    def normalize(self, text: str) -> str:
        normalizer = self._hf_tokenizer.normalizer
        with wrap_errors(ENCODE_ERROR):
            return text if normalizer is None else str(normalizer.normalize_str(text))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        with wrap_errors(DECODE_ERROR):
            text: str = self._hf_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        def to_tokens(ids: Sequence[int]) -> list[str]:
            return self.ids_to_tokens(ids, skip_special_tokens)

        if self._decoder_steps == ["ByteLevel"]:
            return ByteLevelDetokenizer(to_tokens)
        steps = [] if self._decoder is None else _flatten(_component_state(self._decoder))
        anchor = (
            next((char for char in "aeiou01" if self.decode_tokens([char]) == char), "")
            if _is_local(steps)
            else ""
        )
        if not anchor:
            return WindowDetokenizer(to_tokens, self.decode_tokens, lambda token: True, anchor)
        has_bytes = "ByteFallback" in self._decoder_steps
        return WindowDetokenizer(
            to_tokens, self.decode_tokens, _is_byte_token if has_bytes else lambda token: False, anchor
        )

    def ids_to_tokens(self, ids: Sequence[int], skip_special_tokens: bool) -> list[str]:
        """Return the vocabulary entries that `decode` joins to text."""
        tokens = (self._hf_tokenizer.id_to_token(token_id) for token_id in ids)
        return [
            token
            for token in tokens
            if token is not None and not (skip_special_tokens and token in self._special_texts)
        ]

    def decode_tokens(self, tokens: list[str]) -> str:
        """Decode vocabulary entries: `decode` is `decode_tokens` of `ids_to_tokens`."""
        with wrap_errors(DECODE_ERROR):
            return " ".join(tokens) if self._decoder is None else str(self._decoder.decode(tokens))

    def token_to_id(self, token: str) -> int | None:
        token_id: int | None = self._hf_tokenizer.token_to_id(token)
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        token: str | None = self._hf_tokenizer.id_to_token(token_id)
        return token

    def token_bytes(self, token_id: int) -> bytes | None:
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        if self._decoder_steps == ["ByteLevel"]:
            return byte_level_bytes(token)
        is_byte = "ByteFallback" in self._decoder_steps and _is_byte_token(token)
        return bytes([int(token[3:5], 16)]) if is_byte else None

    def _find_bos_eos_ids(self) -> tuple[list[int], list[int]]:
        plain, full = self.encode("a"), self._hf_tokenizer.encode("a", add_special_tokens=True).ids
        starts = (i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain)
        start = next(starts, len(full))
        return full[:start], full[start + len(plain) :]

    def _get_pipeline(self, position: TextPosition) -> Backend:
        """Return a normalizer and pre-tokenizer for this position, which differs only in the prefix space."""
        if position not in self._pipelines:
            steps = {
                "normalizer": self._hf_tokenizer.normalizer,
                "pre_tokenizer": self._hf_tokenizer.pre_tokenizer,
            }
            adapted = {
                name: None if step is None else _adapt_step(_component_state(step), position)
                for name, step in steps.items()
            }
            model = {"type": "BPE", "vocab": {}, "merges": []}
            spec: dict[str, Any] = {"version": "1.0", "added_tokens": [], "model": model, **adapted}
            self._pipelines[position] = Backend.from_str(json.dumps(spec))
        return self._pipelines[position]


def _component_state(component: Any) -> dict[str, Any]:
    """Return a component as its tokenizer.json object."""
    state: dict[str, Any] = json.loads(component.__getstate__())
    return state


def _adapt_step(step: dict[str, Any], position: TextPosition) -> dict[str, Any]:
    """Adapt a normalizer or pre-tokenizer to a position after the start of a text."""
    steps_key = next((key for key in ("normalizers", "pretokenizers") if key in step), None)
    if steps_key is not None:
        return {**step, steps_key: [_adapt_step(sub_step, position) for sub_step in step[steps_key]]}
    if step.get("prepend_scheme") == "first":
        return {**step, "prepend_scheme": "never"}
    if position is TextPosition.AFTER_TOKEN:
        return step
    if step["type"] == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    if position is TextPosition.AFTER_NORMALIZED:
        return step
    no_prefix = {"prepend_scheme": "never", "add_prefix_space": False}
    return {**step, **{key: value for key, value in no_prefix.items() if key in step}}


def _find_unk_ids(hf_tokenizer: Backend) -> set[int]:
    """Ids of an unknown character; relevant only if they are added tokens, such as "<unk>"."""
    try:
        return {token.id for token in hf_tokenizer.model.tokenize(UNKNOWN_CHAR)}
    except Exception:  # tokenizers raises plain Exception if the model has no unknown token
        return set()


def _is_local(steps: list[dict[str, Any]]) -> bool:
    """Whether no step lets a token change the text of an earlier one, except in runs of byte tokens."""
    types = [step["type"] for step in steps]
    fuse = types.index("Fuse") if "Fuse" in types else len(steps)
    return all(map(_is_per_token, steps[:fuse])) and all(map(_is_per_char, steps[fuse + 1 :]))


def _is_per_token(step: dict[str, Any]) -> bool:
    return step["type"] in ("Replace", "ByteFallback", "Metaspace", "Strip", "WordPiece")


def _is_per_char(step: dict[str, Any]) -> bool:
    """Whether a step on the joined text, after Fuse, can be applied incrementally."""
    if step["type"] == "Replace":
        return len(step["pattern"].get("String", "")) == 1
    return bool(step["type"] == "Fuse" or (step["type"] == "Strip" and step["stop"] == 0))


def _is_byte_token(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flatten(inner)]
