"""GGUF files become Hugging Face folders: weights, config, tokenizer, atomicity, refusals."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from trimtab.kernels.errors import InputError, RunError
from trimtab.models.gguf import convert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

HIDDEN, INNER, HEADS, KV_HEADS, WIDTH, LAYERS = 256, 96, 4, 2, 16, 2
QUANTISABLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4")
UNQUANTISABLE = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "IQ2_XXS", "IQ1_S")
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ t", "h e", "Ġt he", "1 2", "l l"]
SPECIALS = ["<|start|>", "<|end|>", "<pad>", "<|turn|>"]
USER_DEFINED = "<think>"
TOKENS = [*SPECIALS, USER_DEFINED, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
TYPES = [3] * len(SPECIALS) + [4] + [1] * (len(ALPHABET) + len(MERGES))

METADATA: dict[str, Any] = {
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.block_count": LAYERS,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 50_000.0,
    "llama.attention.key_length": WIDTH,
    "llama.attention.value_length": WIDTH,
    "llama.rope.dimension_count": WIDTH,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}é{% endfor %}",
}


def shapes(tied: bool = True, vocab: int = len(TOKENS)) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        found |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HEADS * WIDTH, HIDDEN),
            f"blk.{layer}.attn_k.weight": (KV_HEADS * WIDTH, HIDDEN),
            f"blk.{layer}.attn_v.weight": (KV_HEADS * WIDTH, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HEADS * WIDTH),
            f"blk.{layer}.ffn_gate.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (INNER, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, INNER),
        }
    return found if tied else {**found, "output.weight": (vocab, HIDDEN)}


def encoded(shape: tuple[int, ...], kind: Kind, generator: np.random.Generator) -> np.ndarray:
    """A random tensor as a GGUF file holds it."""
    if kind.name in QUANTISABLE:
        return np.asarray(gguf.quants.quantize(generator.standard_normal(shape, np.float32), kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    # Bytes below 0x7c make every float16 scale in a block finite.
    return generator.integers(0, 0x7C, (shape[0], shape[1] // block * size), np.uint8)


def tensors(kind: str = "F16", tied: bool = True, **sizes: int) -> dict[str, tuple[np.ndarray, Kind]]:
    """Random tensors of one kind; F32, as llama.cpp has it, for norms and rows that no whole blocks fill."""
    generator, block = np.random.default_rng(0), gguf.GGML_QUANT_SIZES[Kind[kind]][0]
    kinds = {
        name: Kind.F32 if len(shape) == 1 or shape[-1] % block else Kind[kind]
        for name, shape in shapes(tied, **sizes).items()
    }
    return {
        name: (encoded(shape, kinds[name], generator), kinds[name])
        for name, shape in shapes(tied, **sizes).items()
    }


def write(
    path: Path,
    metadata: Mapping[str, Any] | None = None,
    contents: Mapping[str, tuple[np.ndarray, Kind]] | None = None,
    architecture: str = "llama",
) -> Path:
    """A GGUF file of `METADATA`, changed by `metadata` (None drops a key), holding `contents`."""
    writer = gguf.GGUFWriter(path, architecture)
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in {**METADATA, **(metadata or {})}.items():
        if value is not None:
            adders[type(value)](key, value)
    for name, (values, kind) in (tensors() if contents is None else contents).items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dequantised(contents: Mapping[str, tuple[np.ndarray, Kind]], name: str) -> torch.Tensor:
    values, kind = contents[name]
    return torch.from_numpy(np.array(gguf.quants.dequantize(values, kind), np.float32))


def unpermuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: the 2i-th row of a head goes to its first half, the one after it to its second half."""
    rows, width = torch.empty_like(weight), weight.shape[0] // heads
    for head in range(heads):
        for row in range(width):
            rows[head * width + (row % 2) * (width // 2) + row // 2] = weight[head * width + row]
    return rows


def expected(contents: Mapping[str, tuple[np.ndarray, Kind]]) -> dict[str, torch.Tensor]:
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(LAYERS):
        names |= {f"blk.{layer}.{part}": f"model.layers.{layer}.{target}" for part, target in parts.items()}
    found = {}
    for name in contents:
        weight = dequantised(contents, name)
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        stem = name.removesuffix(".weight")
        found[f"{names[stem]}.weight"] = unpermuted(weight, heads) if heads else weight
    return found


def rounded_to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """Nearest, ties to even, in whole-number arithmetic on the float32 bits."""
    bits = values.numpy().view(np.uint32).astype(np.uint64)
    high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.from_numpy(high.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("kind", [*QUANTISABLE, *UNQUANTISABLE])
def test_every_tensor_is_the_packages_dequantisation_with_rows_in_order(tmp_path: Path, kind: str) -> None:
    contents = tensors(kind)
    folder = convert(write(tmp_path / "m.gguf", contents=contents), tmp_path / "out", "float32")
    found, right = load_file(folder / "model.safetensors"), expected(contents)
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert torch.equal(found[name], tensor), name


def test_bfloat16_is_rounded_to_nearest_and_ties_to_even(tmp_path: Path) -> None:
    contents = tensors("F32")
    ties = np.float32(1) + np.arange(HIDDEN, dtype=np.float32) * np.float32(2.0**-8)  # every other is a tie
    contents["output_norm.weight"] = (ties, Kind.F32)
    folder = convert(write(tmp_path / "m.gguf", contents=contents), tmp_path / "out", "bfloat16")
    found = load_file(folder / "model.safetensors")
    for name, tensor in expected(contents).items():
        assert torch.equal(found[name], rounded_to_bfloat16(tensor)), name
    assert found["model.norm.weight"][[1, 3]].tolist() == [1.0, 1.015625]


def test_float16_is_the_dequantisation_cast_and_the_dtype_is_in_the_config(tmp_path: Path) -> None:
    contents = tensors("Q8_0")
    folder = convert(write(tmp_path / "m.gguf", contents=contents), tmp_path / "out", "float16")
    found = load_file(folder / "model.safetensors")
    for name, tensor in expected(contents).items():
        assert torch.equal(found[name], tensor.half()), name
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"


def test_attention_scores_survive_the_change_from_interleaved_to_half_split_rotation(tmp_path: Path) -> None:
    contents = tensors("F32")
    folder = convert(write(tmp_path / "m.gguf", contents=contents), tmp_path / "out", "float32")
    found = load_file(folder / "model.safetensors")
    states = torch.randn(5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    angle = torch.arange(5.0, dtype=torch.float64)[:, None, None] * 50_000.0 ** (
        -torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH
    )  # [positions, 1, width / 2]

    def turned(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1
        )

    def scores(query: torch.Tensor, key: torch.Tensor, interleaved: bool) -> torch.Tensor:
        sides = []
        for weight, heads in ((query, HEADS), (key, KV_HEADS)):
            rows = (states @ weight.double().T).view(5, heads, WIDTH)
            pair = (rows[..., ::2], rows[..., 1::2]) if interleaved else rows.chunk(2, -1)
            sides.append(turned(*pair))
        return torch.einsum("qhd,khd->hqk", sides[0], sides[1].repeat_interleave(HEADS // KV_HEADS, 1))

    ours = scores(
        *(found[f"model.layers.0.self_attn.{side}_proj.weight"] for side in "qk"), interleaved=False
    )
    theirs = scores(*(dequantised(contents, f"blk.0.attn_{side}.weight") for side in "qk"), interleaved=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-9)
    wrong = scores(*(dequantised(contents, f"blk.0.attn_{side}.weight") for side in "qk"), interleaved=False)
    assert (wrong - theirs).abs().max() > 1


@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_is_the_model_that_transformers_makes_of_the_file(tmp_path: Path, tied: bool) -> None:
    path = write(tmp_path / "m.gguf", contents=tensors("Q4_1", tied))
    folder = convert(path, tmp_path / "out", "float32")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ours = LlamaForCausalLM.from_pretrained(folder)
    right = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, right[name]), name
    same = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    same += (
        "vocab_size",
        "head_dim",
        "rms_norm_eps",
        "rope_parameters",
        "max_position_embeddings",
        "hidden_act",
    )
    same += (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
    )
    assert {key: getattr(ours.config, key) for key in same} == {
        key: getattr(theirs.config, key) for key in same
    }
    assert ours.config.tie_word_embeddings is tied


def test_the_safetensors_file_names_its_format_and_aligns_its_data(source: Path, tmp_path: Path) -> None:
    path = convert(source, tmp_path / "out") / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


@pytest.mark.parametrize(
    ("scaling", "right"),
    [
        ({}, None),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scaling_is_carried_over(tmp_path: Path, scaling: dict[str, Any], right: object) -> None:
    folder = convert(write(tmp_path / "m.gguf", scaling), tmp_path / "out")
    assert json.loads((folder / "config.json").read_text()).get("rope_scaling") == right


def test_heads_share_the_hidden_size_where_the_file_does_not_say_their_width(tmp_path: Path) -> None:
    contents = tensors("F16")
    generator = np.random.default_rng(2)
    for layer in range(LAYERS):
        for name, shape in (("q", (256, 256)), ("k", (128, 256)), ("v", (128, 256)), ("output", (256, 256))):
            contents[f"blk.{layer}.attn_{name}.weight"] = (encoded(shape, Kind.F16, generator), Kind.F16)
    lengths = ("llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count")
    path = write(tmp_path / "m.gguf", dict.fromkeys(lengths), contents)
    folder = convert(path, tmp_path / "out", "float32")
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 64
    found = load_file(folder / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(found, unpermuted(dequantised(contents, "blk.1.attn_q.weight"), HEADS))


def test_every_way_an_answer_ends_is_in_the_generation_config(tmp_path: Path) -> None:
    one = convert(write(tmp_path / "1.gguf"), tmp_path / "one")
    two = convert(write(tmp_path / "2.gguf", {"tokenizer.ggml.eot_token_id": 3}), tmp_path / "two")
    found = [
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"] for folder in (one, two)
    ]
    assert found == [1, [1, 3]]


def test_the_chat_template_and_the_special_tokens_are_kept(source: Path, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "out")
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == METADATA["tokenizer.chat_template"]
    found = json.loads((folder / "tokenizer_config.json").read_text())
    assert (found["bos_token"], found["eos_token"], found["pad_token"]) == ("<|start|>", "<|end|>", "<pad>")
    assert found["add_bos_token"] is False


def test_a_file_without_a_chat_template_makes_a_folder_without_one(tmp_path: Path) -> None:
    folder = convert(write(tmp_path / "m.gguf", {"tokenizer.chat_template": None}), tmp_path / "out")
    assert not (folder / "chat_template.jinja").exists()


def tokenizer_of(tmp_path: Path, **metadata: Any) -> Tokenizer:
    path = write(tmp_path / "m.gguf", {f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    return Tokenizer.from_file(str(convert(path, tmp_path / "out") / "tokenizer.json"))


def random_texts(count: int) -> list[str]:
    chooser, alphabet = random.Random(0), "ab The l 12\uff19½\n\t\r'.,é日🙂\u00a0\u3000'sLL"
    return ["".join(chooser.choices(alphabet, k=30)) for _ in range(count)]


def test_byte_level_text_comes_back_and_ids_are_the_files(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(TOKENS)}
    encoding = tokenizer.encode("<|start|> the<think>12")
    assert encoding.tokens == ["<|start|>", "Ġthe", "<think>", "1", "2"]
    assert encoding.ids == [TOKENS.index(token) for token in encoding.tokens]
    for text in random_texts(200):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_control_tokens_are_special_and_user_defined_ones_are_not(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a<|end|>b<think>").ids) == "ab<think>"


def cuts(tokenizer: Tokenizer, text: str) -> list[str]:
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "peer"),
    [
        ("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)),
        (
            "smollm",
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            ),
        ),
        ("qwen2", Qwen2Tokenizer()._tokenizer.pre_tokenizer),
    ],
)
def test_text_is_cut_as_the_models_own_tokenizer_cuts_it(tmp_path: Path, pre: str, peer: Any) -> None:
    tokenizer = tokenizer_of(tmp_path, pre=pre)
    for text in random_texts(500):
        assert cuts(tokenizer, text) == [piece for piece, _ in peer.pre_tokenize_str(text)], text


@pytest.mark.parametrize(
    ("pre", "text", "right"),
    [
        (
            "llama-bpe",
            "I'LL pay 12345 x\n\n  y",
            ["I", "'LL", "Ġpay", "Ġ", "123", "45", "Ġx", "ĊĊ", "Ġ", "Ġy"],
        ),
        ("tekken", "HelloWorld 12", ["Hello", "World", "Ġ", "1", "2"]),
        ("default", "a=b c1234", ["a", "=", "b", "Ġc", "123", "4"]),
    ],
)
def test_text_is_cut_by_the_pattern_that_the_name_stands_for(
    tmp_path: Path, pre: str, text: str, right: list[str]
) -> None:
    assert cuts(tokenizer_of(tmp_path, pre=pre), text) == right


@pytest.mark.parametrize(("pre", "right"), [("qwen2", "é"), ("smollm", "e\u0301")])
def test_accents_are_composed_only_for_qwen2(tmp_path: Path, pre: str, right: str) -> None:
    tokenizer = tokenizer_of(tmp_path, pre=pre)
    assert tokenizer.decode(tokenizer.encode("e\u0301").ids) == right


def test_llama3_takes_a_whole_word_over_its_merges(tmp_path: Path) -> None:
    tokens, types = [*TOKENS, "cab"], [*TYPES, 1]  # no merge makes "cab"
    contents = tensors("F16", vocab=len(tokens))
    found = {}
    for pre in ("llama-bpe", "gpt-2"):
        changes = {"tokens": tokens, "token_type": types, "pre": pre, "add_bos_token": False}
        path = tmp_path / f"{pre}.gguf"
        write(path, {f"tokenizer.ggml.{key}": value for key, value in changes.items()}, contents)
        found[pre] = (
            Tokenizer.from_file(str(convert(path, tmp_path / pre) / "tokenizer.json")).encode("cab").tokens
        )
    assert found == {"llama-bpe": ["cab"], "gpt-2": ["c", "a", "b"]}


@pytest.mark.parametrize(
    ("changes", "right"),
    [
        ({}, ["a"]),
        ({"add_bos_token": True}, ["<|start|>", "a"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<|start|>", "a", "<|end|>"]),
        ({"pre": "llama-bpe"}, ["<|start|>", "a"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, ["a"]),
    ],
)
def test_a_text_gets_the_ends_that_the_file_asks_for(
    tmp_path: Path, changes: dict[str, Any], right: list[str]
) -> None:
    tokenizer = tokenizer_of(tmp_path, **changes)
    assert tokenizer.encode("a").tokens == right
    assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids == tokenizer.encode("a").ids


@pytest.fixture(scope="module")
def trained() -> sentencepiece.SentencePieceProcessor:
    """A small SentencePiece BPE, trained the way Llama's was."""
    words = [
        "the cat sat on the mat",
        "there then that this",
        "  indented   text",
        "naïve café 2024",
        "hello hello",
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["[INST]"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    def kind(index: int) -> int:
        if model.is_unknown(index):
            return 2
        if model.is_control(index):
            return 3
        if model.is_byte(index):
            return 6
        return 4 if model.id_to_piece(index) == "[INST]" else 1

    indices = range(model.vocab_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": [model.id_to_piece(index) for index in indices],
        "tokenizer.ggml.scores": [float(model.get_score(index)) for index in indices],
        "tokenizer.ggml.token_type": [kind(index) for index in indices],
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.padding_token_id": None,
    }


@pytest.fixture(scope="module")
def spm(
    trained: sentencepiece.SentencePieceProcessor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Tokenizer]:
    def build(**changes: Any) -> Tokenizer:
        folder = tmp_path_factory.mktemp("spm")
        metadata = {**sentencepiece_metadata(trained), **changes}
        path = write(folder / "m.gguf", metadata, tensors("F16", vocab=trained.vocab_size()))
        return Tokenizer.from_file(str(convert(path, folder / "out") / "tokenizer.json"))

    return build


def test_sentencepiece_ids_are_sentencepieces_own(
    trained: sentencepiece.SentencePieceProcessor, spm: Callable[..., Tokenizer]
) -> None:
    tokenizer = spm()
    chooser = random.Random(0)
    texts = ["the cat", " the", "there  then that", "naïve 2024 🙂 日本", "hello\n\nthe mat", "<0x0A>", "x"]
    texts += ["".join(chooser.choices("theca sno m in29é日\n", k=25)) for _ in range(300)]
    for text in texts:
        assert tokenizer.encode(text, add_special_tokens=False).ids == trained.encode(text), text
        assert tokenizer.decode(trained.encode(text)) == text
    assert tokenizer.encode("the cat").ids == [trained.bos_id(), *trained.encode("the cat")]


def test_a_spelt_out_byte_token_stays_text(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "<0x41>", "<0x4", "<0", "x4", "1>", *"▁<0x41>"]
    path = write(
        tmp_path / "m.gguf",
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.merges": None,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
            "tokenizer.ggml.token_type": [2, 3, 3, 6] + [1] * (len(tokens) - 4),
        },
        tensors(vocab=len(tokens)),
    )
    tokenizer = Tokenizer.from_file(str(convert(path, tmp_path / "out") / "tokenizer.json"))
    assert tokenizer.encode("<0x41>A", add_special_tokens=False).tokens == ["▁", "<0x4", "1>", "<0x41>"]
    assert tokenizer.decode([3]) == "A"


def test_sentencepiece_control_and_user_defined_tokens_stay_whole(
    trained: sentencepiece.SentencePieceProcessor, spm: Callable[..., Tokenizer]
) -> None:
    tokenizer = spm()
    tokens = tokenizer.encode("[INST]the</s>", add_special_tokens=False).tokens
    assert tokens[0] == "[INST]"
    assert tokens[-1] == "</s>"
    assert "[INST]" in tokenizer.decode(tokenizer.encode("[INST]the</s>").ids)
    assert "</s>" not in tokenizer.decode(tokenizer.encode("[INST]the</s>").ids)


def test_no_space_is_put_before_a_text_when_the_file_says_so(spm: Callable[..., Tokenizer]) -> None:
    tokenizer = spm(**{"tokenizer.ggml.add_space_prefix": False})
    assert not tokenizer.encode("the", add_special_tokens=False).tokens[0].startswith("▁")
    assert tokenizer.encode(" the", add_special_tokens=False).tokens[0].startswith("▁")
    assert tokenizer.decode(tokenizer.encode(" the").ids) == " the"


def test_progress_reaches_the_size_of_the_weights(source: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    folder = convert(source, tmp_path / "out", progress=lambda done, total: heard.append((done, total)))
    weights = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert heard[-1] == (weights, weights)
    assert [done for done, _ in heard] == sorted({done for done, _ in heard})
    assert len(heard) == len(shapes())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_nothing(source: Path, tmp_path: Path, error: type[BaseException]) -> None:
    def stop(done: int, total: int) -> None:
        assert any(entry.name.startswith(".out.partial-") for entry in (tmp_path / "new").iterdir())
        raise error

    with pytest.raises(error):
        convert(source, tmp_path / "new" / "out", progress=stop)
    assert list((tmp_path / "new").iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from trimtab.models.gguf import convert
die = lambda done, total: os.kill(os.getpid(), signal.SIGKILL)
convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=die)
"""


def test_a_killed_conversion_leaves_no_folder_of_that_name_and_is_swept_up_a_day_later(
    source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "out"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(source), str(folder)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not folder.exists()
    (leftover,) = folder.parent.iterdir()
    convert(source, folder)
    assert leftover.exists()  # so fresh that it might be a process at work
    os.utime(leftover, (0, 0))
    convert(source, folder.parent / "another")
    assert leftover.exists()  # another folder's
    for entry in folder.iterdir():
        entry.unlink()
    convert(source, folder)
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["another", "out"]
    assert (folder / "config.json").is_file()


def test_a_folder_that_appears_meanwhile_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def meanwhile(done: int, total: int) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "other").touch()

    with pytest.raises(InputError, match="is there already"):
        convert(source, folder, progress=meanwhile)
    assert [entry.name for entry in folder.iterdir()] == ["other"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "tiny.gguf"]


def test_the_folder_is_as_readable_as_any_new_one(source: Path, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_is_a_failed_run(source: Path, tmp_path: Path) -> None:
    def full(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"cannot write .*out': No space left on device"):
        convert(source, tmp_path / "out", progress=full)


def changed(name: str, values: np.ndarray, kind: Kind = Kind.F32) -> dict[str, tuple[np.ndarray, Kind]]:
    return {**tensors(), name: (values, kind)}


def without(name: str) -> dict[str, tuple[np.ndarray, Kind]]:
    return {key: value for key, value in tensors().items() if key != name}


SQUARE = np.zeros((256, 256), np.float32)
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another architecture": ({"architecture": "qwen2"}, ["'qwen2'", "known are llama"]),
    "an unknown pre-tokenizer": (
        {"metadata": {"tokenizer.ggml.pre": "mystery"}},
        ["'mystery'", "smollm", "llama-bpe", "qwen2"],
    ),
    "an unknown tokenizer": ({"metadata": {"tokenizer.ggml.model": "bert"}}, ["'bert'", "gpt2, llama"]),
    "no vocabulary": ({"metadata": {"tokenizer.ggml.tokens": None}}, ["tokenizer.ggml.tokens"]),
    "no merges": ({"metadata": {"tokenizer.ggml.merges": None}}, ["tokenizer.ggml.merges"]),
    "a merge of no tokens": ({"metadata": {"tokenizer.ggml.merges": ["zz qq"]}}, ["do not fit together"]),
    "one token twice": ({"metadata": {"tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}}, ["'a' twice"]),
    "more tokens than rows": ({"contents": tensors(vocab=9)}, [f"{len(TOKENS)} tokens", "embeds 9"]),
    "an id beyond the vocabulary": (
        {"metadata": {"tokenizer.ggml.eos_token_id": 9999}},
        ["eos_token_id is 9999", f"0 to {len(TOKENS) - 1}"],
    ),
    "a BOS token without an id": (
        {"metadata": {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}},
        ["tokenizer.ggml.bos_token_id"],
    ),
    "no sizes": (
        {"metadata": {"llama.block_count": None}},
        ["llama.block_count is None", "whole number ≥ 1"],
    ),
    "no heads": ({"metadata": {"llama.attention.head_count": 0}}, ["llama.attention.head_count is 0"]),
    "another width in each layer": (
        {"metadata": {"llama.attention.head_count_kv": [2, 2]}},
        ["llama.attention.head_count_kv is [2, 2]"],
    ),
    "an infinite base": (
        {"metadata": {"llama.rope.freq_base": float("inf")}},
        ["llama.rope.freq_base is inf"],
    ),
    "partial rotation": ({"metadata": {"llama.rope.dimension_count": 8}}, ["dimension_count is 8", "16"]),
    "an unknown scaling": (
        {"metadata": {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}},
        ["'longrope'", "none, linear, yarn"],
    ),
    "Llama 3.1's scaling": (
        {"contents": changed("rope_freqs.weight", np.ones(32, np.float32))},
        ["rope_freqs.weight", "not supported yet"],
    ),
    "a part of a file": ({"metadata": {"split.count": 3}}, ["3 parts"]),
    "a missing tensor": ({"contents": without("blk.1.ffn_up.weight")}, ["missing: blk.1.ffn_up.weight"]),
    "no embedding": ({"contents": without("token_embd.weight")}, ["missing: token_embd.weight"]),
    "an unexpected tensor": (
        {"contents": changed("blk.0.attn_q.bias", SQUARE[0])},
        ["unexpected: blk.0.attn_q.bias"],
    ),
    "a wrong shape": (
        {"contents": changed("blk.0.ffn_up.weight", SQUARE)},
        ["blk.0.ffn_up.weight is [256, 256], expected [96, 256]"],
    ),
    "a type without dequantisation": (
        {"contents": changed("blk.0.attn_q.weight", SQUARE[:64].astype(np.int32), Kind.I32)},
        ["'blk.0.attn_q.weight' is of type I32", "Q8_0"],
    ),
    "a broken weight": (
        {"contents": changed("output_norm.weight", np.full(256, np.nan, np.float32))},
        ["'output_norm.weight'", "no finite bfloat16"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_no_such_model_is_refused_in_one_sentence_that_says_why(
    tmp_path: Path, case: str
) -> None:
    changes, words = REFUSED[case]
    path = write(tmp_path / "bad.gguf", **changes)
    with pytest.raises(InputError) as refusal:
        convert(path, tmp_path / "new" / "out")
    sentence = str(refusal.value)
    assert [word for word in words if word not in sentence] == []
    assert "\n" not in sentence
    assert not (tmp_path / "new" / "out").exists()


def test_weights_too_large_for_float16_are_refused_rather_than_infinite(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", contents=changed("output_norm.weight", np.full(256, 1e5, np.float32)))
    with pytest.raises(InputError, match=r"'output_norm\.weight' .* float16; try dtype float32"):
        convert(path, tmp_path / "out", "float16")
    assert convert(path, tmp_path / "out", "float32").is_dir()


@pytest.mark.parametrize("share", [0.0, 1e-5, 1e-3, 0.002, 0.004, 0.006, 0.01, 0.5, 0.99, 1 - 1e-7])
def test_a_file_cut_anywhere_is_refused(source: Path, tmp_path: Path, share: float) -> None:
    whole = source.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"cut\.gguf' is (not a|no whole) GGUF file"):
        convert(cut, tmp_path / "out")


def test_a_length_beyond_the_file_is_refused_at_its_end(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "m.gguf", contents={}).read_bytes())
    at = data.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    data[at : at + 8] = (1 << 60).to_bytes(8, "little")
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(InputError, match="no whole GGUF file"):
        convert(tmp_path / "bad.gguf", tmp_path / "out")


def test_what_is_no_gguf_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello world")
    with pytest.raises(InputError, match=r"text\.gguf' is not a GGUF file"):
        convert(tmp_path / "text.gguf", tmp_path / "out")
    for absent in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(InputError, match="cannot be read as a GGUF file"):
            convert(absent, tmp_path / "out")


def test_an_occupied_destination_is_refused_and_an_empty_one_is_filled(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        with pytest.raises(
            InputError, match=f"{name}' is there already; it must be a new or an empty folder"
        ):
            convert(source, tmp_path / name)
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["mine"]
    assert (convert(source, tmp_path / "empty") / "config.json").is_file()


def test_an_unknown_dtype_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dtype is 'int8'; it must be one of float32, bfloat16, float16"):
        convert(source, tmp_path / "out", "int8")


def test_without_the_package_the_run_fails_and_says_what_to_install(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RunError) as failure:
        convert(source, tmp_path / "out")
    assert str(failure.value) == "reading GGUF files needs the gguf package: pip install gguf"


# The first half of the SHA-256 of tensors that transformers 5.23 makes of the same file in bfloat16.
DEMO_TENSORS = {
    "model.embed_tokens.weight": "0c8d76d0178f771e989a41b5965b452b",
    "model.layers.0.self_attn.q_proj.weight": "d0ff302d4d83d5be00ed3005dd0a57b7",
    "model.layers.17.self_attn.k_proj.weight": "5bf2befa9c079391854e01bfd065c54f",
    "model.layers.29.mlp.down_proj.weight": "b351a2d1c5c6084582b59bed0edd6728",
    "model.norm.weight": "b1c3b88d13d30d192c39ca32dfc07aa9",
}


def test_the_demo_models_tensors_are_bit_for_bit_those_of_transformers(demo_folder: Path) -> None:
    with safe_open(demo_folder / "model.safetensors", "pt") as file:
        found = {
            name: hashlib.sha256(file.get_tensor(name).view(torch.uint8).numpy().tobytes()).hexdigest()[:32]
            for name in DEMO_TENSORS
        }
    assert found == DEMO_TENSORS


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("The capital of France is", [504, 3575, 282, 4649, 314]),
        ("Café déjà vu.", [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("<|im_start|>\n<|im_end|>", [1, 198, 2]),
    ],
)
def test_the_demo_model_tokenises_as_smollm2_does(demo_folder: Path, text: str, ids: list[int]) -> None:
    tokenizer = Tokenizer.from_file(str(demo_folder / "tokenizer.json"))
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
