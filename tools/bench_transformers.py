"""How fast trimtab decodes beside transformers, on the same weights, in one run.

    python -m trimtab.tools.bench_transformers [--model demo] [--tokens 64] [--rounds 7]

Every round runs all contestants once, in turn, so that a drift of the machine touches all of them; a ratio
is taken within each round, and its median, lowest and highest are printed. Beside transformers
whole calls are timed, prompt included; trimtab beside itself is compared while decoding, from the first token
to the last. The last line is JSON. Needs transformers.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..engine import Base, Mato, Objective, Request, SamplingParams
from ..engine.core import torch_dtype
from ..engine.engine import Engine
from ..engine.output import Output
from ..models.source import resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..engine.methods import Method

QUESTION = "What happens if an earthworm is cut in half?"
WISHES = (
    Objective("Your answer should be uplifting.", 0.7),
    Objective("Your answer should be one short sentence.", 0.3),
)
RATIOS = (
    ("trimtab base", "transformers plain"),
    ("trimtab mato", "transformers guidance"),
    ("trimtab mato", "trimtab base"),
    ("trimtab mato sampled", "trimtab mato"),
    ("trimtab mato kl_budget=0.2", "trimtab mato"),
)
"""What is compared: contestant / contestant, as tokens per second."""


def main() -> None:
    """Runs the benchmark and prints it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    contestants = {
        **_trimtab(args.model, args.dtype, args.tokens),
        **_transformers(args.model, args.dtype, args.tokens),
    }
    whole: dict[str, list[float]] = {name: [] for name in contestants}
    decoding: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(args.rounds + 1):
        for name, call in contestants.items():
            start = time.perf_counter()
            result = call()
            if index:  # the first round warms up
                whole[name].append(args.tokens / (time.perf_counter() - start))
                if isinstance(result, Output):
                    decoding[name].append(result.timings.tokens_per_second)
    for name, values in whole.items():
        print(
            f"{name:<28} {_spread(values)} tok/s"
            + (f", decoding {_spread(decoding[name])}" if decoding[name] else "")
        )
    ratios = {}
    for a, b in RATIOS:
        rates = decoding if decoding[a] and decoding[b] else whole
        ratios[f"{a} / {b}"] = [x / y for x, y in zip(rates[a], rates[b], strict=True)]
        print(f"{a + ' / ' + b:<54} {_spread(ratios[f'{a} / {b}'])}")
    print(json.dumps({**vars(args), **_machine(), "whole": whole, "decoding": decoding, "ratios": ratios}))


def _trimtab(model: str, dtype: str, tokens: int) -> dict[str, Callable[[], Any]]:
    engine = Engine.from_pretrained(model, dtype=dtype)

    def call(method: Method, **sampling: Any) -> Callable[[], Any]:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, **sampling)
        return lambda: engine.generate(Request(QUESTION, method, params))

    return {
        "trimtab base": call(Base()),
        "trimtab mato": call(Mato(WISHES)),
        "trimtab mato sampled": call(Mato(WISHES), temperature=0.8, top_p=0.95, seed=1),
        "trimtab mato kl_budget=0.2": call(Mato(WISHES, kl_budget=0.2)),
    }


def _transformers(model: str, dtype: str, tokens: int) -> dict[str, Callable[[], Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    folder: Path = resolve(model)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    peer: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype(dtype))

    def ids(system: str) -> torch.Tensor:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": QUESTION}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        encoded: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        return encoded

    base, wished = ids("You are a helpful assistant."), ids(f"You are a helpful assistant. {WISHES[0].text}")
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}

    def call(prompt: torch.Tensor, **more: Any) -> Callable[[], Any]:
        return lambda: peer.generate(prompt, attention_mask=torch.ones_like(prompt), **options, **more)

    return {
        "transformers plain": call(base),
        "transformers guidance": call(wished, guidance_scale=1.9347, negative_prompt_ids=base),
    }


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):6.2f} ({min(values):.2f} to {max(values):.2f})"


def _machine() -> dict[str, Any]:
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


if __name__ == "__main__":
    main()
