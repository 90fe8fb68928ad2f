"""Every architecture and config switch matches transformers in float32, on small random models.

transformers writes the models. Their weights are larger than its initialisation, so that attention is not
flat and every switch has an effect: each case also has the fields that disable its switch, which must change
the log-probabilities.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from trimtab.engine import Base, Engine, Mato, Objective, Request, SamplingParams

from ..helpers.tiny_model import EMBEDDING_ROWS, VOCAB_SIZE, train_tokenizer, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor
    from trimtab.engine import Method
    from trimtab.engine.outputs import Output

TOLERANCE = 1e-4
LENGTHS = (9, 150)
"""Prompt lengths: within every window and original context here, and beyond."""
STEPS = 64
CONTEXT, ORIGINAL = 512, 64
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class ArchitectureCase:
    """A model: its changes to `BASE`, and the further changes that disable the tested switch."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    disabled: dict[str, Any] = field(default_factory=dict)
    shards: int = 1
    transformers_4: bool = False


BASE = {
    "vocab_size": EMBEDDING_ROWS,
    "hidden_size": 36,
    "intermediate_size": 50,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
PLAIN = {"rope_parameters": BASE["rope_parameters"]}


def rope(kind: str, factor: float, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, "factor": factor, **more}}


def llama3(**more: Any) -> dict[str, Any]:
    parameters = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    }
    return rope("llama3", 8.0, **parameters, **more)


def yarn(**more: Any) -> dict[str, Any]:
    return rope("yarn", 8.0, original_max_position_embeddings=ORIGINAL, **more)


SHORT_CONTEXT = {"max_position_embeddings": ORIGINAL}
NINE_HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3}
SEVEN_HEADS = {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 42}
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
NO_WINDOW = {"sliding_window": None}
WINDOW = {"use_sliding_window": True, "sliding_window": 37}
MULTIPLIERS = {
    "embedding_multiplier": 5.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.4,
    "logits_scaling": 0.6,
    "rms_norm_eps": 1e-2,
}
"""With an ε that matters for the norms of a scaled residual stream."""

CASES = {
    "llama": ArchitectureCase("llama"),
    "llama-tied-nine-heads": ArchitectureCase(
        "llama", {**NINE_HEADS, "tie_word_embeddings": True}, transformers_4=True
    ),
    "llama-sharded-seven-heads": ArchitectureCase("llama", SEVEN_HEADS, shards=4),
    "llama-wide-heads": ArchitectureCase(
        "llama", {"head_dim": 14, "num_attention_heads": 3, "num_key_value_heads": 3}
    ),
    "llama-attention-bias": ArchitectureCase("llama", {"attention_bias": True}, NO_BIAS),
    "llama-mlp-bias": ArchitectureCase("llama", {"mlp_bias": True}, NO_BIAS),
    "llama-both-biases": ArchitectureCase(
        "llama", {"attention_bias": True, "mlp_bias": True}, NO_BIAS, transformers_4=True
    ),
    "llama-linear": ArchitectureCase("llama", {**SHORT_CONTEXT, **rope("linear", 8.0)}, PLAIN),
    "llama-linear-old": ArchitectureCase(
        "llama", {**SHORT_CONTEXT, **rope("linear", 2.5 * 2)}, PLAIN, transformers_4=True
    ),
    "llama-llama3": ArchitectureCase("llama", llama3(), PLAIN),
    "llama-llama3-old": ArchitectureCase(
        "llama", {**llama3(), "tie_word_embeddings": True}, PLAIN, shards=3, transformers_4=True
    ),
    "llama-yarn": ArchitectureCase("llama", yarn(), PLAIN),
    "llama-yarn-untruncated": ArchitectureCase(
        "llama", yarn(truncate=False, beta_fast=8, beta_slow=2), PLAIN
    ),
    "llama-yarn-scales": ArchitectureCase(
        "llama", yarn(mscale=1.0, mscale_all_dim=0.5), PLAIN, transformers_4=True
    ),
    "llama-dynamic": ArchitectureCase("llama", {**SHORT_CONTEXT, **rope("dynamic", 8.0)}, PLAIN),
    "mistral": ArchitectureCase("mistral", {"sliding_window": None}),
    "mistral-window": ArchitectureCase("mistral", {"sliding_window": 37}, NO_WINDOW),
    "mistral-window-of-a-block": ArchitectureCase(
        "mistral", {"sliding_window": 16, **SEVEN_HEADS}, NO_WINDOW, transformers_4=True
    ),
    "mistral-window-of-one": ArchitectureCase("mistral", {"sliding_window": 1}, NO_WINDOW),
    "mistral-window-and-yarn": ArchitectureCase("mistral", {"sliding_window": 50, **yarn()}, PLAIN),
    "qwen2": ArchitectureCase("qwen2", {**SEVEN_HEADS, "tie_word_embeddings": True}, shards=2),
    "qwen2-upper-windows": ArchitectureCase(
        "qwen2", {**WINDOW, "max_window_layers": 1}, {"use_sliding_window": False}
    ),
    "qwen2-window-beyond-layers": ArchitectureCase(
        "qwen2", {**WINDOW, "max_window_layers": 3}, transformers_4=True
    ),
    "qwen2-yarn": ArchitectureCase("qwen2", {**yarn(), **NINE_HEADS}, PLAIN, transformers_4=True),
    "qwen2-dynamic": ArchitectureCase(
        "qwen2", {**SHORT_CONTEXT, **rope("dynamic", 4.0)}, PLAIN, transformers_4=True
    ),
    "qwen3": ArchitectureCase("qwen3", {**NINE_HEADS, "head_dim": 10, "tie_word_embeddings": True}),
    "qwen3-bias": ArchitectureCase(
        "qwen3", {"attention_bias": True, "head_dim": 8}, NO_BIAS, shards=3, transformers_4=True
    ),
    "qwen3-chosen-windows": ArchitectureCase(
        "qwen3",
        {**WINDOW, **SEVEN_HEADS, "head_dim": 6, "layer_types": [SLIDING, FULL, SLIDING]},
        {"layer_types": [FULL] * 3},
    ),
    "qwen3-llama3": ArchitectureCase("qwen3", {**llama3(), "head_dim": 12}, PLAIN),
    "granite": ArchitectureCase("granite", {**MULTIPLIERS, "tie_word_embeddings": True}),
    "granite-biases": ArchitectureCase(
        "granite", {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True}, NO_BIAS, transformers_4=True
    ),
    **{
        f"granite-{key}": ArchitectureCase("granite", MULTIPLIERS, {key: 1.0}, shards=2)
        for key in MULTIPLIERS
        if key != "rms_norm_eps"
    },
    "granite-defaults": ArchitectureCase("granite", {**NINE_HEADS, **yarn()}, PLAIN),
}


def build_reference(case: ArchitectureCase, changes: dict[str, Any]) -> Any:
    """transformers' model of a case, before `randomize`."""
    config = AutoConfig.for_model(case.kind, **{**BASE, **case.fields, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def randomize(model: Any) -> Any:
    """Randomize every weight, including biases and norms, with a standard deviation of 0.1 to 0.3."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        spread = 0.3 if "embed_tokens" in name or "lm_head" in name else 0.1 if weight.dim() == 1 else 0.2
        noise = torch.randn(weight.shape, generator=generator) * spread
        weight.data = 1 + noise if name.endswith("norm.weight") else noise
    model.tie_weights()
    return model


def write_model(case: ArchitectureCase, folder: Path) -> Any:
    """Save a case's model with transformers, and return the model."""
    model = randomize(build_reference(case, {}))
    size = sum(weight.nbytes for weight in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // case.shards + 20_000 if case.shards > 1 else size)
    assert len(list(folder.glob("*.safetensors"))) >= case.shards
    if case.transformers_4:
        write_json(
            folder / "config.json", to_transformers_4(json.loads((folder / "config.json").read_text()))
        )
    train_tokenizer().save(str(folder / "tokenizer.json"))
    return model


def to_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """Rewrite a config.json to the keys of transformers 4."""
    section = config.pop("rope_parameters")
    config["rope_theta"] = section.pop("rope_theta")
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    kind = section.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **section}
    return config


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.inference_mode()
def logprobs(model: Any, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of the next token after each position, [tokens, EMBEDDING_ROWS]."""
    log_probabilities: Tensor = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return log_probabilities


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model_and_engine(name: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Engine]:
    """transformers' model of the case, and an engine that loads its folder."""
    return load_case(CASES[name], tmp_path_factory.mktemp(name))


def load_case(case: ArchitectureCase, folder: Path) -> tuple[Any, Engine]:
    model = write_model(case, folder)
    return model, Engine.from_pretrained(str(folder), kv_cache_memory="8MiB")


def test_log_probabilities_of_a_prompt_are_those_of_transformers(
    model_and_engine: tuple[Any, Engine],
) -> None:
    model, engine = model_and_engine
    for ids in prompts():
        ours, theirs = engine.score(ids), logprobs(model, ids)
        assert float(ours.std()) > 1, "near-uniform log-probabilities would hide errors"
        assert float((ours - theirs).abs().max()) <= TOLERANCE


def test_decoded_tokens_and_their_log_probabilities_are_those_of_transformers(
    name: str, model_and_engine: tuple[Any, Engine]
) -> None:
    """Both prompts in one batch. Dynamic RoPE is compared with static RoPE at the prompt's frequencies."""
    model, engine = model_and_engine
    outputs = engine.generate([greedy([ids]) for ids in prompts()])
    for prompt, output in zip(prompts(), outputs, strict=True):
        assert len(output.token_ids) == STEPS
        plain = with_static_rope(CASES[name], model, len(prompt)) if "dynamic" in name else model
        assert_same(output, plain)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.disabled], indirect=True)
def test_disabling_the_feature_of_a_case_changes_the_log_probabilities(
    name: str, model_and_engine: tuple[Any, Engine]
) -> None:
    case, (model, _) = CASES[name], model_and_engine
    plain = build_reference(case, case.disabled)
    plain.load_state_dict(model.state_dict(), strict=False)
    long = prompts()[1]
    assert float((logprobs(plain, long) - logprobs(model, long)).abs().max()) > 100 * TOLERANCE


def test_under_a_dynamic_rope_requests_with_a_common_prefix_rotate_by_their_own_lengths(
    tmp_path: Path,
) -> None:
    """Batched and sequentially: the requests must not share cached keys."""
    case = CASES["llama-dynamic"]
    model, engine = load_case(case, tmp_path)
    long = prompts()[1]
    alike = [long[:140], long]
    plain = [with_static_rope(case, model, len(prompt)) for prompt in alike]
    together = engine.generate([greedy([prompt]) for prompt in alike])
    after = [engine.generate(greedy([prompt])) for prompt in alike]
    for output, model_at_length in zip([*together, *after], plain * 2, strict=True):
        assert_same(output, model_at_length)


def test_under_a_dynamic_rope_branches_rotate_by_the_requests_longest_prompt(tmp_path: Path) -> None:
    case = CASES["llama-dynamic"]
    model, engine = load_case(case, tmp_path)
    short, long = prompts()
    output = engine.generate(greedy([long[:100], long, short], Mato([Objective("a"), Objective("b")])))
    plain = with_static_rope(case, model, len(long))
    assert output.trace is not None
    branch_logprobs = torch.tensor(output.trace.branch_logprobs)
    for branch, prompt in enumerate(output.branches):
        theirs = answer_logprobs(plain, prompt.prompt_token_ids, output.token_ids)
        chosen = theirs[torch.arange(STEPS), output.token_ids]
        assert float((branch_logprobs[:, branch] - chosen).abs().max()) <= TOLERANCE


def greedy(branches: list[list[int]], steering: Method | None = None) -> Request:
    sampling = SamplingParams(max_tokens=STEPS, ignore_eos=True, logprobs=20)
    return Request(branch_token_ids=branches, steering=steering or Base(), sampling=sampling)


def assert_same(output: Output, model: Any) -> None:
    """The tokens and top log-probabilities of an unsteered answer match transformers."""
    theirs = answer_logprobs(model, output.branches[0].prompt_token_ids, output.token_ids)
    assert output.token_ids == theirs[:, :VOCAB_SIZE].argmax(-1).tolist()
    assert output.logprobs is not None
    for ours, row in zip(output.logprobs, theirs, strict=True):
        assert len(ours.top) == 20
        assert all(abs(value - float(row[token])) <= TOLERANCE for token, value in ours.top.items())


def answer_logprobs(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """transformers' log-probabilities at each token of an answer, [tokens, EMBEDDING_ROWS]."""
    return logprobs(model, prompt + answer[:-1])[len(prompt) - 1 :]


def with_static_rope(case: ArchitectureCase, model: Any, length: int) -> Any:
    """A copy of a dynamic-RoPE model with default RoPE at the frequencies of this prompt length."""
    section, width = (
        model.config.rope_parameters,
        model.config.hidden_size // model.config.num_attention_heads,
    )
    beyond = max(length, ORIGINAL) / ORIGINAL
    growth = (section["factor"] * beyond - (section["factor"] - 1)) ** (width / (width - 2))
    theta = section["rope_theta"] * growth
    plain = build_reference(case, {"rope_parameters": {"rope_type": "default", "rope_theta": theta}})
    plain.load_state_dict(model.state_dict())
    return plain
