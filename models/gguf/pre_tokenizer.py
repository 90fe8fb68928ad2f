"""Pre-tokenizers of byte-level BPE vocabularies, by the value of `tokenizer.ggml.pre`."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.common.errors import InputError, short_repr

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizerSpec:
    """Text is split by each pattern in turn; BPE merges apply within the pieces.

    `ignore_merges`: a piece that is itself a token is not built by merges. `add_bos`: prepend the BOS token,
    unless the file overrides it. `nfc`: apply Unicode NFC normalisation first.
    """

    split_patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


LLAMA3 = PreTokenizerSpec((LLAMA3_SPLIT,), ignore_merges=True, add_bos=True)
SMOLLM = PreTokenizerSpec((r"\p{N}", GPT2_SPLIT))
PRE_TOKENIZERS = {
    "default": PreTokenizerSpec((r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]")),
    "deepseek-r1-qwen": PreTokenizerSpec((QWEN2_SPLIT,)),
    "gpt-2": PreTokenizerSpec((GPT2_SPLIT,)),
    "llama-bpe": LLAMA3,
    "llama-v3": LLAMA3,
    "llama3": LLAMA3,
    "qwen2": PreTokenizerSpec((QWEN2_SPLIT,), nfc=True),
    "qwen35": PreTokenizerSpec((QWEN35_SPLIT,), nfc=True),
    "refact": SMOLLM,
    "smollm": SMOLLM,
    "tekken": PreTokenizerSpec((TEKKEN_SPLIT,), ignore_merges=True, add_bos=True),
}


def get_pre_tokenizer(name: object) -> PreTokenizerSpec:
    """The entry of PRE_TOKENIZERS. Raises InputError for an unknown name."""
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise InputError(
            f"the GGUF file's tokenizer.ggml.pre is {short_repr(name)}; "
            f"expected one of {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]
