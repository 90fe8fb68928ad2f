"""The tokenizer of a GGUF file, as llama.cpp and transformers understand it."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ...kernels.common.errors import InputError, quoted
from ..common.wrap_errors import guarded
from .pre_tokenizer import pre_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .reader import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type
TURN_ENDS = {"eot": ("<|eot_id|>", "<|im_end|>"), "eom": ("<|eom_id|>",)}
"""The tokens that end a turn or a message by their looks, where the file does not say which do."""


def tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer.json. Raises InputError for an unknown kind, or entries that do not fit together."""
    tokens, kind = file.tokens(), file.get("tokenizer.ggml.model")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise InputError(
            f"the GGUF file's tokenizer.ggml.tokens has {quoted(twice)} twice; each token must differ"
        )
    if kind not in ("gpt2", "llama"):
        raise InputError(f"the GGUF file's tokenizer.ggml.model is {quoted(kind)}; known are gpt2, llama")
    types = (
        _list(file, "token_type") if "tokenizer.ggml.token_type" in file.metadata else [NORMAL] * len(vocab)
    )
    with guarded("the GGUF file's tokenizer.ggml entries do not fit together"):
        backend = _byte_level(file, vocab) if kind == "gpt2" else _sentencepiece(file, vocab, types)
        backend.add_special_tokens(_added(tokens, types, (UNKNOWN, CONTROL), special=True))
        backend.add_tokens(_added(tokens, types, (USER_DEFINED,), special=False))
        _add_ends(backend, file)
    return backend


def tokenizer_config(file: GGUFFile, context: int) -> dict[str, Any]:
    """The file beside tokenizer.json that names the special tokens."""
    tokens, (bos, eos) = file.tokens(), _additions(file)
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {key: file.token_id(name) for name, key in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bos,
        "add_eos_token": eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **{key: tokens[index] for key, index in ids.items() if index is not None},
    }


def generation_config(file: GGUFFile) -> dict[str, Any]:
    """End of sequence, of turn and of message all end an answer."""
    ends = [file.token_id("eos"), *(_turn_end(file, name) for name in TURN_ENDS)]
    ids = list(dict.fromkeys(end for end in ends if end is not None))
    config = {
        "bos_token_id": file.token_id("bos"),
        "eos_token_id": ids if len(ids) > 1 else next(iter(ids), None),
        "pad_token_id": file.token_id("padding"),
    }
    return {key: value for key, value in config.items() if value is not None}


def _turn_end(file: GGUFFile, name: str) -> int | None:
    given, tokens = file.token_id(name), file.tokens()
    looks = (tokens.index(token) for token in TURN_ENDS[name] if token in tokens)
    return next(looks, None) if given is None else given


def _list(file: GGUFFile, name: str) -> Sequence[Any]:
    """A list with an entry for each token."""
    found, count = file.get(f"tokenizer.ggml.{name}"), len(file.tokens())
    if not isinstance(found, list) or len(found) != count:
        have = f"{len(found)} entries" if isinstance(found, list) else quoted(found)
        raise InputError(
            f"the GGUF file's tokenizer.ggml.{name} is {have}; it must have one for each of {count} tokens"
        )
    return found


def _byte_level(file: GGUFFile, vocab: dict[str, int]) -> Tokenizer:
    pre = pre_tokenizer(file.get("tokenizer.ggml.pre", "default"))
    backend = Tokenizer(BPE(vocab=vocab, merges=_pairs(file), ignore_merges=pre.whole_words))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.splits]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _pairs(file: GGUFFile) -> list[tuple[str, str]]:
    merges = file.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise InputError("the GGUF file has no tokenizer.ggml.merges; a byte-level vocabulary needs them")
    for merge in merges:
        if str(merge).count(" ") != 1:
            raise InputError(
                f"the GGUF file's tokenizer.ggml.merges has {quoted(merge)}; "
                "it must be two tokens and a space"
            )
    return [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]


def _sentencepiece(file: GGUFFile, vocab: dict[str, int], types: Sequence[int]) -> Tokenizer:
    unknown = next((token for token, kind in zip(vocab, types, strict=True) if kind == UNKNOWN), None)
    pieces = {token: index for token, index in vocab.items() if types[index] in (NORMAL, UNUSED)}
    backend = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges(pieces, _list(file, "scores")),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(content=" ", left=1)] * prefix
    )
    return backend


def _merges(pieces: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose joint piece scores best; the pairs, best first."""
    lengths = sorted(set(map(len, pieces)))  # few: of a long piece not every cut is tried
    pairs = [
        (scores[index], cut, -index, piece[:cut], piece[cut:])
        for piece, index in pieces.items()
        for cut in lengths[: bisect_left(lengths, len(piece))]
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [(left, right) for *_, left, right in pairs]


def _added(
    tokens: Sequence[str], types: Sequence[int], kinds: tuple[int, ...], special: bool
) -> list[AddedToken]:
    chosen = [token for token, kind in zip(tokens, types, strict=True) if kind in kinds]
    return [AddedToken(token, special=special, normalized=False) for token in chosen]


def _additions(file: GGUFFile) -> tuple[bool, bool]:
    """Whether a text gets a BOS token before it, an EOS token after it."""
    usual = file.get("tokenizer.ggml.model") == "llama"
    usual = usual or pre_tokenizer(file.get("tokenizer.ggml.pre", "default")).bos
    bos, eos = (
        file.get(f"tokenizer.ggml.add_{end}_token", at) for end, at in (("bos", usual), ("eos", False))
    )
    return bool(bos), bool(eos)


def _add_ends(backend: Tokenizer, file: GGUFFile) -> None:
    ids: list[list[int]] = []
    for name, wanted in zip(("bos", "eos"), _additions(file), strict=True):
        index = file.token_id(name) if wanted else None
        if wanted and index is None:
            raise InputError(f"the GGUF file adds a {name} token but has no tokenizer.ggml.{name}_token_id")
        ids.append([] if index is None else [index])
    tokens = file.tokens()
    before, after = ([tokens[index] for index in side] for side in ids)
    if before or after:
        second = [f"{token}:1" for token in before], [f"{token}:1" for token in after]
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *second[0], "$B:1", *second[1]],
            special_tokens=[(tokens[index], index) for side in ids for index in side],
        )
