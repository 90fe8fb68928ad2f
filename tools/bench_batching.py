"""How fast many branches decode at once, beside one after another, their matrix products alone, and vLLM.

    python -m trimtab.tools.bench_batching [--model demo] [--tokens 64] [--rounds 5]
    OTHER/bin/python tools/bench_batching.py --engine vllm --model FOLDER      (an environment that has vLLM)

Rows are branches: the plain runs decode that many prompts that have nothing in common, the steered ones 16
requests of three branches. Every round runs all contestants in turn; medians, lowest and highest are printed.
The last line is JSON. Both engines compute every prompt anew.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS = (1, 4, 16, 48)
REQUESTS = 16
QUESTION = (
    "What happens if an earthworm is cut in {} parts? Answer at length and kindly, with examples, "
    "so that a child can follow it."
)

Contestants = dict[str, tuple[int, "Callable[[], Any]"]]
"""By name: the tokens that a run decodes over all its rows, and the run."""


def main() -> None:
    """Runs the benchmark and prints it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("trimtab", "vllm"), default="trimtab")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    contestants = (_vllm if args.engine == "vllm" else _trimtab)(args.model, args.dtype, args.tokens)
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(args.rounds + 1):
        for name, (tokens, call) in contestants.items():
            start = time.perf_counter()
            call()
            if index:  # the first round warms up
                rates[name].append(tokens / (time.perf_counter() - start))
    for name, values in rates.items():
        print(f"{name:<44} {_spread(values)} rows · tokens a second")
    if args.engine == "trimtab":
        both = zip(rates[f"{REQUESTS} requests x 3 at once"], rates["one after another"], strict=True)
        print(f"{'at once / one after another':<44} {_spread([a / b for a, b in both])}")
        step, products = _step(args.model, args.dtype)
        print(f"a step at 48 rows {step:.1f} ms, its products alone {products:.1f} ms: {step / products:.2f}")
    print(json.dumps({**vars(args), "rates": rates}))


def _trimtab(model: str, dtype: str, tokens: int) -> Contestants:
    from trimtab import Engine, Mato, Objective, Request, SamplingParams  # noqa: PLC0415

    engine = Engine.from_pretrained(model, dtype=dtype, enable_prefix_caching=False)
    wishes = (
        Objective("Your answer should be uplifting.", 0.7),
        Objective("Your answer should be one short sentence.", 0.3),
    )
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)

    def plain(rows: int) -> Callable[[], Any]:
        requests = [Request(QUESTION.format(i), sampling=params, trace=False) for i in range(rows)]
        return lambda: engine.generate(requests)

    steered = [Request(QUESTION.format(i), Mato(wishes), params) for i in range(REQUESTS)]
    count = 3 * REQUESTS * tokens
    return {
        **{f"{rows} plain at once": (rows * tokens, plain(rows)) for rows in ROWS},
        f"{REQUESTS} requests x 3 at once": (count, lambda: engine.generate(steered)),
        "one after another": (count, lambda: [engine.generate(request) for request in steered]),
    }


def _vllm(model: str, dtype: str, tokens: int) -> Contestants:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]  # noqa: PLC0415

    llm = LLM(
        os.path.expanduser(model),
        dtype=dtype,
        max_model_len=2048,
        max_num_seqs=64,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    def plain(rows: int) -> Callable[[], Any]:
        prompts = [[{"role": "user", "content": QUESTION.format(i)}] for i in range(rows)]
        return lambda: llm.chat(prompts, params, use_tqdm=False)

    return {f"{rows} plain at once": (rows * tokens, plain(rows)) for rows in ROWS}


def _step(model: str, dtype: str) -> tuple[float, float]:
    """Milliseconds of a decoding step of 16 requests of three branches, and of its matrix products alone."""
    import torch  # noqa: PLC0415
    from trimtab import Engine, Mato, Objective, Request, SamplingParams  # noqa: PLC0415

    engine = Engine.from_pretrained(model, dtype=dtype)
    core, wishes = engine._core, (Objective("Be kind."), Objective("Be short."))
    llama = core.runner.model
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    for index in range(REQUESTS):
        for group in core.admit(Request(QUESTION.format(index), Mato(wishes), params)):
            core.scheduler.add(group)
    for _ in range(20):
        core.step()

    def products() -> None:
        with torch.inference_mode():
            x = torch.randn(3 * REQUESTS, core.model_config.hidden_size).to(llama._arithmetic)
            query = torch.randn(3 * REQUESTS, core.model_config.num_heads * core.model_config.head_dim)
            query = query.to(llama._arithmetic)
            for layer in llama._layers:
                layer.qkv(x)
                layer.output.add_to(x, query)
                layer.down.add_to(x, layer.gate_up(x))
            llama.logits(x.to(llama._head.dtype))

    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(20):
        for call, found in zip((core.step, products), times, strict=True):
            start = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
