"""A converted GGUF tokenizer gives the ids of the original tokenizer, of sentencepiece and of llama.cpp."""

from __future__ import annotations

import io
import json
import random
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer
from trimtab.kernels.common.errors import InputError
from trimtab.models.gguf.convert import convert
from trimtab.models.gguf.pre_tokenizer import PRE_TOKENIZERS

from ...helpers.gguf_files import TOKEN_TYPES, TOKENS, random_tensors, write_gguf

if TYPE_CHECKING:
    from collections.abc import Callable

LICENSE = Path(__file__).parents[3] / "LICENSE"
AWKWARD_TEXTS = [
    "",
    " ",
    "\n",
    " \n \n\n  ",
    "\t\ttabs\tand  spaces   end  ",
    "a" * 200,
    " " * 70,
    "one\r\ntwo\rthree\n\n\nfour",
    "It's we'll I'M THEY'RE you'd don't O'Neill ''s 's",
    "def f(x):\n    return x**2 + 1  # squares\n\tif x != 0: pass",
    "3.14159 1,000,000 12345678901234567890 ½ ² Ⅷ ٣٤٥ 10:30",
    "naïve café Ångström Ω≈ç√∫ ﬁ ß ſ's İstanbul",  # noqa: RUF001
    "日本語のテキスト、中文文本。한국어 텍스트",
    "العربية نص من اليمين إلى اليسار עברית",
    "हिन्दी ไทย ភាសាខ្មែរ",
    "👩‍👩‍👧‍👦 🙂👍🏽 🇩🇪 ❤️‍🔥 ☃",
    "\u200b\u200d\ufeff\u00a0\u3000\u2028\u0085x\u202e",
    "\x01\x02\x1f\x7f\x80",
    "<|start|> <|im_start|> <s> </s> <unk> <0x0A> [INST] <think>",
    "▁already ▁▁marked",
    "$%^&*()_+-=[]{}|;:'\",./<>?`~!@#",
    "https://example.org/a?b=c&d=%20#e user@example.org",
    "MixedCASE camelCase snake_case kebab-case HTTPServer2Go",
    "…—–“quotes”‘single’«guillemets»",  # noqa: RUF001
]


def random_texts(count: int, alphabet: str = "ab The l 12\uff19½\n\t\r'.,é日🙂\u00a0\u3000'sLL") -> list[str]:
    chooser = random.Random(0)
    return ["".join(chooser.choices(alphabet, k=30)) for _ in range(count)]


def convert_tokenizer(tmp_path: Path, **metadata: Any) -> Tokenizer:
    path = write_gguf(
        tmp_path / "m.gguf", {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    )
    return Tokenizer.from_file(str(convert(path, tmp_path / "out") / "tokenizer.json"))


def test_byte_level_text_round_trips_and_ids_are_those_of_the_file(tmp_path: Path) -> None:
    tokenizer = convert_tokenizer(tmp_path)
    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(TOKENS)}
    encoding = tokenizer.encode("<|start|> the<think>12")
    assert encoding.tokens == ["<|start|>", "Ġthe", "<think>", "1", "2"]
    assert encoding.ids == [TOKENS.index(token) for token in encoding.tokens]
    for text in random_texts(200):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_control_tokens_are_special_and_user_defined_ones_are_not(tmp_path: Path) -> None:
    tokenizer = convert_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a<|end|>b<think>").ids) == "ab<think>"


def pre_tokenize(tokenizer: Tokenizer, text: str) -> list[str]:
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
        ("qwen35", Qwen3_5Tokenizer()._tokenizer.pre_tokenizer),
    ],
)
def test_pre_tokenization_matches_the_models_original_tokenizer(tmp_path: Path, pre: str, peer: Any) -> None:
    tokenizer = convert_tokenizer(tmp_path, pre=pre)
    for text in random_texts(500):
        assert pre_tokenize(tokenizer, text) == [piece for piece, _ in peer.pre_tokenize_str(text)], text


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
def test_pre_tokenization_follows_tokenizer_ggml_pre(
    tmp_path: Path, pre: str, text: str, right: list[str]
) -> None:
    assert pre_tokenize(convert_tokenizer(tmp_path, pre=pre), text) == right


@pytest.mark.parametrize(("pre", "right"), [("qwen2", "é"), ("smollm", "e\u0301")])
def test_text_is_nfc_normalised_only_for_qwen2(tmp_path: Path, pre: str, right: str) -> None:
    tokenizer = convert_tokenizer(tmp_path, pre=pre)
    assert tokenizer.decode(tokenizer.encode("e\u0301").ids) == right


def test_llama3_ignores_merges_for_a_word_that_is_a_token(tmp_path: Path) -> None:
    tokens, types = [*TOKENS, "cab"], [*TOKEN_TYPES, 1]  # no merge makes "cab"
    contents = random_tensors("F16", vocab=len(tokens))
    tokens_by_pre = {}
    for pre in ("llama-bpe", "gpt-2"):
        changes = {"tokens": tokens, "token_type": types, "pre": pre, "add_bos_token": False}
        path = tmp_path / f"{pre}.gguf"
        write_gguf(path, {f"tokenizer.ggml.{key}": value for key, value in changes.items()}, contents)
        tokens_by_pre[pre] = (
            Tokenizer.from_file(str(convert(path, tmp_path / pre) / "tokenizer.json")).encode("cab").tokens
        )
    assert tokens_by_pre == {"llama-bpe": ["cab"], "gpt-2": ["c", "a", "b"]}


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
def test_bos_and_eos_follow_the_metadata(tmp_path: Path, changes: dict[str, Any], right: list[str]) -> None:
    tokenizer = convert_tokenizer(tmp_path, **changes)
    assert tokenizer.encode("a").tokens == right
    assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids == tokenizer.encode("a").ids


@pytest.fixture(scope="module")
def trained() -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE model, trained with Llama's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            LICENSE.read_text().splitlines() + ["  indented   text", "naïve café 日本"] * 9
        ),
        model_writer=model,
        model_type="bpe",
        vocab_size=1200,
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
        path = write_gguf(folder / "m.gguf", metadata, random_tensors("F16", vocab=trained.vocab_size()))
        return Tokenizer.from_file(str(convert(path, folder / "out") / "tokenizer.json"))

    return build


def without_added_tokens(texts: list[str]) -> list[str]:
    """Texts without added tokens, which sentencepiece handles differently (also the space before them)."""
    return [text for text in texts if text and not any(mark in text for mark in ("[INST]", "<s>", "<unk>"))]


def test_converted_sentencepiece_ids_match_sentencepiece(
    trained: sentencepiece.SentencePieceProcessor, spm: Callable[..., Tokenizer]
) -> None:
    tokenizer = spm()
    texts = (
        without_added_tokens(AWKWARD_TEXTS)
        + random_texts(200)
        + random_texts(300, " theconrails  .ACDlcsid\n")
    )
    texts += ["<0x0A>", "[INST", *LICENSE.read_text().splitlines()[1:60:2]]
    for text in filter(None, texts):
        ids = trained.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert tokenizer.decode(ids) == trained.decode(ids)
    assert tokenizer.encode("the cat").ids == [trained.bos_id(), *trained.encode("the cat")]


def test_a_spelt_out_byte_token_stays_text(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "<0x41>", "<0x4", "<0", "x4", "1>", *"▁<0x41>"]
    path = write_gguf(
        tmp_path / "m.gguf",
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.merges": None,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
            "tokenizer.ggml.token_type": [2, 3, 3, 6] + [1] * (len(tokens) - 4),
        },
        random_tensors(vocab=len(tokens)),
    )
    tokenizer = Tokenizer.from_file(str(convert(path, tmp_path / "out") / "tokenizer.json"))
    assert tokenizer.encode("<0x41>A", add_special_tokens=False).tokens == ["▁", "<0x4", "1>", "<0x41>"]
    assert tokenizer.decode([3]) == "A"


def test_sentencepiece_control_and_user_defined_tokens_are_not_split(
    trained: sentencepiece.SentencePieceProcessor, spm: Callable[..., Tokenizer]
) -> None:
    tokenizer = spm()
    tokens = tokenizer.encode("[INST]the</s>", add_special_tokens=False).tokens
    assert tokens[0] == "[INST]"
    assert tokens[-1] == "</s>"
    assert "[INST]" in tokenizer.decode(tokenizer.encode("[INST]the</s>").ids)
    assert "</s>" not in tokenizer.decode(tokenizer.encode("[INST]the</s>").ids)


def test_add_space_prefix_false_adds_no_leading_space(spm: Callable[..., Tokenizer]) -> None:
    tokenizer = spm(**{"tokenizer.ggml.add_space_prefix": False})
    assert not tokenizer.encode("the", add_special_tokens=False).tokens[0].startswith("▁")
    assert tokenizer.encode(" the", add_special_tokens=False).tokens[0].startswith("▁")
    assert tokenizer.decode(tokenizer.encode(" the").ids) == " the"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model is 't5'; expected gpt2 or llama"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is None; expected gpt2 or llama"),
        ({"tokenizer.ggml.scores": None}, "tokenizer.ggml.scores is None; it must be a list with one"),
        ({"tokenizer.ggml.scores": [0.0, 1.0]}, "tokenizer.ggml.scores is 2 entries; it must be a list"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "tokenizer.ggml.token_type is 2 entries; it must be a list"),
    ],
)
def test_an_invalid_vocabulary_is_refused(
    spm: Callable[..., Tokenizer], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        spm(**changes)


@pytest.mark.parametrize(
    ("names", "eos_ids", "right"),
    [
        ({}, {}, 1),
        ({3: "<|eot_id|>"}, {}, [1, 3]),
        ({3: "<|eot_id|>", 2: "<|eom_id|>"}, {}, [1, 3, 2]),
        ({1: "<|im_end|>"}, {}, 1),
        ({3: "<|eot_id|>"}, {"tokenizer.ggml.eot_token_id": 2}, [1, 2]),
        ({}, {"tokenizer.ggml.eot_token_id": 3}, [1, 3]),
    ],
)
def test_every_eos_token_is_in_the_generation_config(
    tmp_path: Path, names: dict[int, str], eos_ids: dict[str, int], right: object
) -> None:
    tokens = [names.get(index, token) for index, token in enumerate(TOKENS)]
    folder = convert(
        write_gguf(tmp_path / "m.gguf", {"tokenizer.ggml.tokens": tokens, **eos_ids}), tmp_path / "out"
    )
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == right


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
def test_the_demo_model_tokenizes_as_smollm2(demo_folder: Path, text: str, ids: list[int]) -> None:
    tokenizer = Tokenizer.from_file(str(demo_folder / "tokenizer.json"))
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    """Metadata of a byte-level BPE trained without pre-tokenization, so that every split changes the ids."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|start|>", "<|end|>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*LICENSE.read_text().splitlines(), *AWKWARD_TEXTS, *random_texts(3000)] * 2
    backend.train_from_iterator(texts, trainer)
    bpe = json.loads(backend.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in bpe["merges"]],
    }


def llama_cpp_agrees(pre: str, text: str) -> bool:
    """Whether llama.cpp should agree: it applies no NFC, and for tekken knows letter case only in ASCII."""
    if pre == "tekken":
        return all(c.isascii() or unicodedata.category(c) not in ("Lu", "Ll", "Lt", "Lm", "Mn") for c in text)
    return not pre.startswith("qwen") or unicodedata.is_normalized("NFC", text)


@pytest.mark.parametrize("pre", [*PRE_TOKENIZERS, "sentencepiece", "sentencepiece without a space prefix"])
def test_ids_are_those_of_llama_cpp(
    pre: str, byte_level: dict[str, Any], trained: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    metadata = {**byte_level, "tokenizer.ggml.pre": pre}
    if pre.startswith("sentencepiece"):
        prefix = {"tokenizer.ggml.add_space_prefix": not pre.endswith("without a space prefix")}
        metadata = {**sentencepiece_metadata(trained), **prefix}
    path = write_gguf(
        tmp_path / "m.gguf", metadata, random_tensors("F16", vocab=len(metadata["tokenizer.ggml.tokens"]))
    )
    ours = Tokenizer.from_file(str(convert(path, tmp_path / "out") / "tokenizer.json"))
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    texts = AWKWARD_TEXTS + random_texts(300) + random_texts(100, " theconrails  .ACDlcsid\n")
    texts = [text for text in texts if llama_cpp_agrees(pre, text)]
    for text in texts:
        for special in (False, True):
            right = theirs.tokenize(text.encode(), add_bos=special, special=True)
            assert ours.encode(text, add_special_tokens=special).ids == right, text
    uncut = Tokenizer.from_str(ours.to_str())
    uncut.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if not pre.startswith("sentencepiece"):
        cut = sum(ours.encode(text).ids != uncut.encode(text).ids for text in texts)
        assert cut > len(texts) / 2  # so a wrong pattern would change ids
