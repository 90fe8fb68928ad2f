"""Convert a GGUF file's tokenizer to tokenizer.json, tokenizer_config.json and generation_config.json."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ...kernels.common.errors import InputError, short_repr
from ..common.wrap_errors import wrap_errors
from .pre_tokenizer import get_pre_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .reader import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type
TURN_END_TOKENS = {"eot": ("<|eot_id|>", "<|im_end|>"), "eom": ("<|eom_id|>",)}
"""End-of-turn and end-of-message tokens, by text, for files that do not name them."""


def build_tokenizer(file: GGUFFile) -> Tokenizer:
    """Build the tokenizer.json. Raises InputError for an unsupported model or inconsistent entries."""
    tokens, model_type = file.get_tokens(), file.get("tokenizer.ggml.model")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        duplicate = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise InputError(
            f"the GGUF file's tokenizer.ggml.tokens has {short_repr(duplicate)} twice; tokens must be unique"
        )
    if model_type not in ("gpt2", "llama"):
        raise InputError(
            f"the GGUF file's tokenizer.ggml.model is {short_repr(model_type)}; expected gpt2 or llama"
        )
    token_types = (
        _read_token_list(file, "token_type")
        if "tokenizer.ggml.token_type" in file.metadata
        else [NORMAL] * len(vocab)
    )
    with wrap_errors("the GGUF file's tokenizer.ggml entries are inconsistent"):
        hf_tokenizer = (
            _build_byte_level(file, vocab)
            if model_type == "gpt2"
            else _build_sentencepiece(file, vocab, token_types)
        )
        hf_tokenizer.add_special_tokens(
            _select_added_tokens(tokens, token_types, (UNKNOWN, CONTROL), special=True)
        )
        hf_tokenizer.add_tokens(_select_added_tokens(tokens, token_types, (USER_DEFINED,), special=False))
        _set_post_processor(hf_tokenizer, file)
    return hf_tokenizer


def build_tokenizer_config(file: GGUFFile, context_length: int) -> dict[str, Any]:
    """The tokenizer_config.json, which names the special tokens."""
    tokens, (add_bos, add_eos) = file.get_tokens(), _read_add_bos_eos(file)
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {key: file.get_token_id(name) for name, key in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        **{key: tokens[index] for key, index in ids.items() if index is not None},
    }


def build_generation_config(file: GGUFFile) -> dict[str, Any]:
    """The generation_config.json: end of sequence, of turn and of message are all stop tokens."""
    end_ids = [file.get_token_id("eos"), *(_turn_end_id(file, name) for name in TURN_END_TOKENS)]
    ids = list(dict.fromkeys(end_id for end_id in end_ids if end_id is not None))
    config = {
        "bos_token_id": file.get_token_id("bos"),
        "eos_token_id": ids if len(ids) > 1 else next(iter(ids), None),
        "pad_token_id": file.get_token_id("padding"),
    }
    return {key: value for key, value in config.items() if value is not None}


def _turn_end_id(file: GGUFFile, name: str) -> int | None:
    token_id, tokens = file.get_token_id(name), file.get_tokens()
    candidates = (tokens.index(token) for token in TURN_END_TOKENS[name] if token in tokens)
    return next(candidates, None) if token_id is None else token_id


def _read_token_list(file: GGUFFile, name: str) -> Sequence[Any]:
    """A metadata list with one entry per token."""
    values, count = file.get(f"tokenizer.ggml.{name}"), len(file.get_tokens())
    if not isinstance(values, list) or len(values) != count:
        actual = f"{len(values)} entries" if isinstance(values, list) else short_repr(values)
        raise InputError(
            f"the GGUF file's tokenizer.ggml.{name} is {actual}; it must be a list with one entry for "
            f"each of {count} tokens"
        )
    return values


def _build_byte_level(file: GGUFFile, vocab: dict[str, int]) -> Tokenizer:
    spec = get_pre_tokenizer(file.get("tokenizer.ggml.pre", "default"))
    hf_tokenizer = Tokenizer(BPE(vocab=vocab, merges=_read_merges(file), ignore_merges=spec.ignore_merges))
    if spec.nfc:
        hf_tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in spec.split_patterns]
    hf_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    hf_tokenizer.decoder = decoders.ByteLevel()
    return hf_tokenizer


def _read_merges(file: GGUFFile) -> list[tuple[str, str]]:
    merges = file.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise InputError("the GGUF file has no tokenizer.ggml.merges; a byte-level vocabulary needs them")
    for merge in merges:
        if str(merge).count(" ") != 1:
            raise InputError(
                f"the GGUF file's tokenizer.ggml.merges has {short_repr(merge)}; "
                "it must be two tokens separated by a space"
            )
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]


def _build_sentencepiece(file: GGUFFile, vocab: dict[str, int], token_types: Sequence[int]) -> Tokenizer:
    unk_token = next(
        (token for token, token_type in zip(vocab, token_types, strict=True) if token_type == UNKNOWN), None
    )
    pieces = {token: index for token, index in vocab.items() if token_types[index] in (NORMAL, UNUSED)}
    hf_tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_derive_merges(pieces, _read_token_list(file, "scores")),
            unk_token=unk_token,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    add_prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    hf_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * add_prefix + [normalizers.Replace(" ", "▁")]
    )
    hf_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(content=" ", left=1)] * add_prefix
    )
    return hf_tokenizer


def _derive_merges(pieces: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Merges, best score first: SentencePiece joins the two neighbours whose joint piece scores best."""
    lengths = sorted(set(map(len, pieces)))  # few, so not every split of a long piece is tried
    pairs = [
        (scores[index], split, -index, piece[:split], piece[split:])
        for piece, index in pieces.items()
        for split in lengths[: bisect_left(lengths, len(piece))]
        if piece[:split] in pieces and piece[split:] in pieces
    ]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [(left, right) for *_, left, right in pairs]


def _select_added_tokens(
    tokens: Sequence[str], token_types: Sequence[int], selected_types: tuple[int, ...], special: bool
) -> list[AddedToken]:
    selected = [
        token for token, token_type in zip(tokens, token_types, strict=True) if token_type in selected_types
    ]
    return [AddedToken(token, special=special, normalized=False) for token in selected]


def _read_add_bos_eos(file: GGUFFile) -> tuple[bool, bool]:
    """Whether to prepend a BOS token, and whether to append an EOS token."""
    default_bos = file.get("tokenizer.ggml.model") == "llama"
    default_bos = default_bos or get_pre_tokenizer(file.get("tokenizer.ggml.pre", "default")).add_bos
    add_bos, add_eos = (
        file.get(f"tokenizer.ggml.add_{name}_token", default)
        for name, default in (("bos", default_bos), ("eos", False))
    )
    return bool(add_bos), bool(add_eos)


def _set_post_processor(hf_tokenizer: Tokenizer, file: GGUFFile) -> None:
    end_ids: list[list[int]] = []
    for name, enabled in zip(("bos", "eos"), _read_add_bos_eos(file), strict=True):
        token_id = file.get_token_id(name) if enabled else None
        if enabled and token_id is None:
            raise InputError(
                f"the GGUF file's tokenizer adds a {name} token but has no tokenizer.ggml.{name}_token_id"
            )
        end_ids.append([] if token_id is None else [token_id])
    tokens = file.get_tokens()
    prefix, suffix = ([tokens[index] for index in side] for side in end_ids)
    if prefix or suffix:
        pair_ends = [f"{token}:1" for token in prefix], [f"{token}:1" for token in suffix]
        hf_tokenizer.post_processor = processors.TemplateProcessing(
            single=[*prefix, "$A", *suffix],
            pair=[*prefix, "$A", *suffix, *pair_ends[0], "$B:1", *pair_ends[1]],
            special_tokens=[(tokens[index], index) for side in end_ids for index in side],
        )
