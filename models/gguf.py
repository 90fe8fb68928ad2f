"""GGUF files: a model in llama.cpp's format becomes an ordinary Hugging Face folder."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from ..kernels.errors import InputError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import ModuleType

Progress = Callable[[int, int], None]
"""Told how far a long step is: bytes done, bytes in all."""

ARCHITECTURES = ("llama",)
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
LISTED = 8
"""How many names an error lists at most."""
STALE_SECONDS = 86_400
"""A half-made folder untouched for so long has no process behind it."""

TENSORS = {  # GGUF name: Hugging Face name, shape
    "token_embd.weight": ("model.embed_tokens.weight", ("vocab", "hidden")),
    "output_norm.weight": ("model.norm.weight", ("hidden",)),
    "output.weight": ("lm_head.weight", ("vocab", "hidden")),
}
LAYER_TENSORS = {
    "attn_norm.weight": ("input_layernorm.weight", ("hidden",)),
    "attn_q.weight": ("self_attn.q_proj.weight", ("query", "hidden")),
    "attn_k.weight": ("self_attn.k_proj.weight", ("key", "hidden")),
    "attn_v.weight": ("self_attn.v_proj.weight", ("key", "hidden")),
    "attn_output.weight": ("self_attn.o_proj.weight", ("hidden", "query")),
    "ffn_norm.weight": ("post_attention_layernorm.weight", ("hidden",)),
    "ffn_gate.weight": ("mlp.gate_proj.weight", ("inner", "hidden")),
    "ffn_up.weight": ("mlp.up_proj.weight", ("inner", "hidden")),
    "ffn_down.weight": ("mlp.down_proj.weight", ("hidden", "inner")),
}

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # tokenizer.ggml.token_type
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Pre:
    """What `tokenizer.ggml.pre` stands for: text is cut by each pattern in turn, then merged within the cuts.

    `whole_words`: a cut that is itself a token needs no merges. `bos`: a text begins with the BOS token,
    unless the file says otherwise. `nfc`: text is brought to Unicode's composed form first.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False


LLAMA3 = Pre((LLAMA3_SPLIT,), whole_words=True, bos=True)
PRE_TOKENIZERS = {
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Pre((GPT2_SPLIT,)),
    "llama-bpe": LLAMA3,
    "llama-v3": LLAMA3,
    "llama3": LLAMA3,
    "qwen2": Pre((QWEN2_SPLIT,), nfc=True),
    "smollm": Pre((r"\p{N}", GPT2_SPLIT)),
    "tekken": Pre((TEKKEN_SPLIT,), whole_words=True, bos=True),
}


def convert(path: Path, folder: Path, dtype: str = "bfloat16", progress: Progress | None = None) -> Path:
    """Writes the GGUF file `path` as a Hugging Face folder and returns that folder.

    Weights are dequantised by the `gguf` package and rounded to nearest even in `dtype` ("float32",
    "bfloat16" or "float16"), one tensor in memory at a time. `folder` appears whole or not at all.
    Raises InputError for a file that is no such model, or a folder that is there and not empty; RunError
    without the `gguf` package or when the folder cannot be written.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    _refuse_occupied(folder)
    source = _Source.read(path)
    config, plan = source.config(dtype), source.plan()
    tokenizer = _tokenizer(source.metadata)
    with arriving(folder) as part:
        part.mkdir()
        tokenizer.save(str(part / "tokenizer.json"))
        _write_json(part / "tokenizer_config.json", source.tokenizer_config())
        if template := source.metadata.get("tokenizer.chat_template"):
            (part / "chat_template.jinja").write_text(template, encoding="utf-8")
        _write_json(part / "generation_config.json", source.generation_config())
        _write_weights(part / "model.safetensors", source, plan, dtype, progress)
        _write_json(part / "config.json", config)
    return folder


def gguf_package() -> ModuleType:
    """The optional `gguf` package. Raises RunError when it is not installed."""
    try:
        import gguf  # noqa: PLC0415 - optional
    except ImportError:
        raise RunError("reading GGUF files needs the gguf package: pip install gguf") from None
    return gguf


@contextmanager
def arriving(folder: Path) -> Iterator[Path]:
    """A path to build `folder` at. It takes its name when the block ends well, and is removed when not.

    It lies in a hidden folder beside, so a killed process leaves nothing under the name, and its parent is
    free for scratch files. Raises InputError when `folder` is there and not empty, before or after the block.
    """
    folder = folder.resolve()
    prefix = f".{folder.name}.partial-"
    _refuse_occupied(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent, prefix)
        with TemporaryDirectory(
            prefix=f"{prefix}{os.getpid()}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as scratch:
            part = Path(scratch) / folder.name
            yield part
            part.rename(folder)
    except OSError as error:
        _refuse_occupied(folder)  # it may have come to be meanwhile
        raise RunError(f"cannot write {str(folder)!r}: {error.strerror or error}") from error


def _refuse_occupied(folder: Path) -> None:
    try:
        occupied = any(folder.iterdir()) if os.path.isdir(folder) else os.path.lexists(folder)
    except OSError as error:
        raise RunError(f"cannot look into {str(folder)!r}: {error.strerror}") from error
    if occupied:
        raise InputError(f"{str(folder)!r} is there already; it must be a new or an empty folder")


def _sweep(parent: Path, prefix: str) -> None:
    """Removes what killed processes left behind."""
    for leftover in parent.iterdir():
        with suppress(OSError):
            if leftover.name.startswith(prefix) and time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


@dataclass(frozen=True)
class _Source:
    """An opened GGUF file: its metadata as plain Python values, its tensors by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> _Source:
        """The one place where a bad file becomes an InputError: the package raises whatever comes first."""
        gguf = gguf_package()
        try:
            with path.open("rb") as file:
                magic = file.read(4)
        except (OSError, ValueError) as error:
            raise InputError(f"{str(path)!r} cannot be read as a GGUF file: {error}") from None
        if magic != b"GGUF":
            raise InputError(f"{str(path)!r} is not a GGUF file; such a file begins with the letters GGUF")
        try:
            reader = _checked_reader(gguf, path)
            metadata = {name: field.contents() for name, field in reader.fields.items()}
            tensors = {tensor.name: tensor for tensor in reader.tensors}
        except Exception as error:
            raise InputError(
                f"{str(path)!r} is no whole GGUF file, it is cut short or damaged: {error}"
            ) from error
        source = cls(metadata, tensors)
        source._refuse_unsupported()
        return source

    def config(self, dtype: str) -> dict[str, Any]:
        """The model's config.json."""
        heads = self._size("attention.head_count")
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self._vocab_size(),
            "hidden_size": self._size("embedding_length"),
            "intermediate_size": self._size("feed_forward_length"),
            "num_hidden_layers": self._size("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._size("attention.head_count_kv", heads),
            "head_dim": self._head_dim(),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "max_position_embeddings": self._size("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_theta": self._number("rope.freq_base", 10_000.0),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "bos_token_id": self._token_id("bos"),
            "eos_token_id": self._token_id("eos"),
            "pad_token_id": self._token_id("padding"),
            "dtype": dtype,
        }
        if scaling := self._rope_scaling():
            config["rope_scaling"] = scaling
        return config

    def generation_config(self) -> dict[str, Any]:
        """End of sequence, of turn and of message all end an answer."""
        ends = [self._token_id(name) for name in ("eos", "eot", "eom")]
        ids = list(dict.fromkeys(end for end in ends if end is not None))
        config = {
            "bos_token_id": self._token_id("bos"),
            "eos_token_id": ids if len(ids) > 1 else next(iter(ids), None),
            "pad_token_id": self._token_id("padding"),
        }
        return {key: value for key, value in config.items() if value is not None}

    def tokenizer_config(self) -> dict[str, Any]:
        """The file beside tokenizer.json that names the special tokens."""
        tokens, (bos, eos) = self.metadata["tokenizer.ggml.tokens"], _additions(self.metadata)
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        ids = {key: self._token_id(name) for name, key in names.items()}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": bos,
            "add_eos_token": eos,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self._size("context_length"),
            **{key: tokens[index] for key, index in ids.items() if index is not None},
        }

    def plan(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Hugging Face name → GGUF name and shape of every tensor. Raises InputError unless they all fit."""
        heads, width = self._size("attention.head_count"), self._head_dim()
        sizes = {
            "vocab": self._vocab_size(),
            "hidden": self._size("embedding_length"),
            "inner": self._size("feed_forward_length"),
            "query": heads * width,
            "key": self._size("attention.head_count_kv", heads) * width,
        }
        table = dict(TENSORS)
        if "output.weight" not in self.tensors:
            del table["output.weight"]  # tied to the embedding
        for layer in range(self._size("block_count")):
            for name, (target, axes) in LAYER_TENSORS.items():
                table[f"blk.{layer}.{name}"] = (f"model.layers.{layer}.{target}", axes)
        plan = {target: (name, tuple(sizes[axis] for axis in axes)) for name, (target, axes) in table.items()}
        self._require(dict(plan.values()))
        return plan

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in float32, its rows in Hugging Face's order."""
        stored = self.tensors[name]
        try:
            values = gguf_package().quants.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            raise InputError(
                f"tensor {name!r} is of type {stored.tensor_type.name}, which this gguf package cannot read; "
                "a type like Q4_0, Q8_0 or F16 would do"
            ) from None
        tensor = torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
        if name.endswith("attn_q.weight"):
            return _halves_from_pairs(tensor, self._size("attention.head_count"))
        if name.endswith("attn_k.weight"):
            heads = self._size("attention.head_count")
            return _halves_from_pairs(tensor, self._size("attention.head_count_kv", heads))
        return tensor

    def _refuse_unsupported(self) -> None:
        found, known = self.metadata.get("general.architecture"), ", ".join(ARCHITECTURES)
        if found not in ARCHITECTURES:
            raise InputError(f"the GGUF file's general.architecture is {found!r}; known are {known}")
        if (parts := self.metadata.get("split.count", 1)) not in (0, 1):
            raise InputError(
                f"the GGUF file is one of {parts} parts; they must be merged into one file first"
            )
        if "rope_freqs.weight" in self.tensors:
            raise InputError(
                "the GGUF file has rope_freqs.weight, Llama 3.1's rotary scaling, not supported yet; "
                "it must be a model without"
            )
        width = self._head_dim()
        for key in ("rope.dimension_count", "attention.value_length"):
            if (value := self._size(key, width)) != width:
                raise InputError(
                    f"the GGUF file's llama.{key} is {value}; it must be the width of a head, {width}"
                )

    def _require(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        shapes = {name: _shape(tensor) for name, tensor in self.tensors.items()}
        wrong = [
            f"{name} is {list(shapes[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if shapes.get(name, shape) != shape
        ]
        problems = [
            f"{title}: {', '.join(names[:LISTED])}{' and more' * (len(names) > LISTED)}"
            for title, names in (
                ("missing", [name for name in expected if name not in shapes]),
                ("unexpected", [name for name in shapes if name not in expected]),
                ("of the wrong shape", wrong),
            )
            if names
        ]
        if problems:
            raise InputError(f"the GGUF file's tensors do not make a llama model; {'; '.join(problems)}")

    def _vocab_size(self) -> int:
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise InputError("the GGUF file has no tokenizer.ggml.tokens; it must hold the vocabulary")
        rows = (
            _shape(self.tensors["token_embd.weight"])[0]
            if "token_embd.weight" in self.tensors
            else len(tokens)
        )
        if rows < len(tokens):
            raise InputError(f"the GGUF file has {len(tokens)} tokens but embeds {rows}; each needs a row")
        return rows

    def _head_dim(self) -> int:
        hidden, heads = self._size("embedding_length"), self._size("attention.head_count")
        return self._size("attention.key_length", hidden // heads)

    def _rope_scaling(self) -> dict[str, Any] | None:
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 1.0))
        kind = self.metadata.get("llama.rope.scaling.type", "linear")
        if kind == "none" or factor == 1.0:
            return None
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            original = self._size("rope.scaling.original_context_length")
            return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        raise InputError(f"the GGUF file's llama.rope.scaling.type is {kind!r}; known are none, linear, yarn")

    def _size(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(f"llama.{key}", default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"the GGUF file's llama.{key} is {value!r}; it must be a whole number ≥ 1")
        return value

    def _number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(f"llama.{key}", default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(f"the GGUF file's llama.{key} is {value!r}; it must be a number above 0")
        return float(value)

    def _token_id(self, name: str) -> int | None:
        return _token_id(self.metadata, name)


def _checked_reader(gguf: ModuleType, path: Path) -> Any:
    """The package's reader, which by itself takes what lies beyond the end of the file for empty arrays."""

    class Reader(gguf.GGUFReader):  # type: ignore[misc, name-defined]
        data: Any

        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
            self.data = np.asarray(self.data)  # a plain array is cut twice as fast as a memmap
            values = super()._get(offset, dtype, count, *rest, **named)
            if len(values) < count:
                raise EOFError(f"byte {offset} and what follows are missing")
            return values

    return Reader(path)


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))


def _halves_from_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's order of query and key rows.

    Rotary embedding turns pairs of a head's rows: 2i and 2i + 1 in llama.cpp, i and i + head_dim / 2 here.
    """
    pairs = weight.view(heads, -1, 2, weight.shape[1])  # [heads, head_dim / 2, 2, hidden]
    return pairs.transpose(1, 2).reshape(weight.shape)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(
    path: Path,
    source: _Source,
    plan: Mapping[str, tuple[str, tuple[int, ...]]],
    dtype: str,
    progress: Progress | None,
) -> None:
    """Writes a safetensors file tensor by tensor, so that one of them is in memory at a time."""
    kind: torch.dtype = getattr(torch, dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for target, (_, shape) in plan.items():
        end = total + math.prod(shape) * kind.itemsize
        header[target] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (total, end)}
        total = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data that follow are aligned
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for target, (name, _) in plan.items():
            tensor = source.tensor(name).to(kind)
            if not torch.isfinite(tensor).all():
                raise InputError(f"tensor {name!r} has values that are no finite {dtype}; try dtype float32")
            file.write(tensor.view(torch.uint8).numpy().data)
            if progress:
                progress(header[target]["data_offsets"][1], total)


def _tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the file's vocabulary describes, as llama.cpp and transformers understand it."""
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise InputError(f"the GGUF file's tokenizer.ggml.tokens has {twice!r} twice; each token must differ")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(
        kind := metadata.get("tokenizer.ggml.model", "none")
    )
    if build is None:
        raise InputError(f"the GGUF file's tokenizer.ggml.model is {kind!r}; known are gpt2, llama")
    try:
        tokenizer = build(metadata, vocab, types)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the GGUF file's tokenizer.ggml entries do not fit together: {error}") from error
    tokenizer.add_special_tokens(_added(tokens, types, (UNKNOWN, CONTROL), special=True))
    tokenizer.add_tokens(_added(tokens, types, (USER_DEFINED,), special=False))
    _add_ends(tokenizer, metadata, tokens)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], vocab: dict[str, int], types: Sequence[int]) -> Tokenizer:
    pre = _pre(metadata)
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.splits]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], vocab: dict[str, int], types: Sequence[int]) -> Tokenizer:
    unknown = next((token for token, kind in zip(vocab, types, strict=True) if kind == UNKNOWN), None)
    pieces = {token: index for token, index in vocab.items() if types[index] in (NORMAL, UNUSED)}
    merges = _merges(pieces, metadata["tokenizer.ggml.scores"])
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(content=" ", left=1)] * prefix
    )
    return tokenizer


def _merges(pieces: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose joint piece scores best; the pairs, best first."""
    pairs = [
        (scores[index], len(piece[:cut]), -index, piece[:cut], piece[cut:])
        for piece, index in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    pairs.sort(key=lambda pair: pair[:3], reverse=True)
    return [(left, right) for *_, left, right in pairs]


def _pre(metadata: Mapping[str, Any]) -> Pre:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise InputError(
            f"the GGUF file's tokenizer.ggml.pre is {name!r}; known are {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


def _added(
    tokens: Sequence[str], types: Sequence[int], kinds: tuple[int, ...], special: bool
) -> list[AddedToken]:
    chosen = [token for token, kind in zip(tokens, types, strict=True) if kind in kinds]
    return [AddedToken(token, special=special, normalized=False) for token in chosen]


def _additions(metadata: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a text gets a BOS token before it, an EOS token after it."""
    usual = metadata.get("tokenizer.ggml.model") == "llama" or _pre(metadata).bos
    bos = metadata.get("tokenizer.ggml.add_bos_token", usual)
    return bool(bos), bool(metadata.get("tokenizer.ggml.add_eos_token", False))


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, Any], tokens: Sequence[str]) -> None:
    ids: list[list[int]] = []
    for name, wanted in zip(("bos", "eos"), _additions(metadata), strict=True):
        index = _token_id(metadata, name) if wanted else None
        if wanted and index is None:
            raise InputError(f"the GGUF file adds a {name} token but has no tokenizer.ggml.{name}_token_id")
        ids.append([] if index is None else [index])
    before, after = ([tokens[index] for index in side] for side in ids)
    if before or after:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[
                *before,
                "$A",
                *after,
                *(f"{token}:1" for token in before),
                "$B:1",
                *(f"{t}:1" for t in after),
            ],
            special_tokens=[(tokens[index], index) for side in ids for index in side],
        )


def _token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    key, tokens = f"tokenizer.ggml.{name}_token_id", metadata["tokenizer.ggml.tokens"]
    value = metadata.get(key)
    if value is not None and (not isinstance(value, int) or not 0 <= value < len(tokens)):
        raise InputError(f"the GGUF file's {key} is {value!r}; it must be from 0 to {len(tokens) - 1}")
    return value
