"""Compare decoding of small models on the device with float32 decoding on the CPU."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ...engine.engine import Engine
from ...engine.methods.base import Method
from ...engine.methods.builtin import (
    Amulet,
    Base,
    ContextSteering,
    Guidance,
    LinearAlignment,
    Mato,
    Mixture,
    Opad,
    Prompt,
)
from ...engine.methods.objective import Objective
from ...engine.request import Request
from ...engine.sampling_params import SamplingParams
from . import tiny_models
from .compare_outputs import NUM_LOGPROBS, compare_outputs, compare_untraced
from .open_engine import open_engine

if TYPE_CHECKING:
    from pathlib import Path

    from ...engine.outputs import Output
    from .report import CheckReport

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1.0}
"""Allowed error in nats of a branch's log-probability of a token, by model dtype. On a CPU that rounds every
activation to bfloat16 the largest error is 0.4, and the mean 0.09."""
SMALL_CACHE: dict[str, Any] = {"kv_cache_memory": "64MiB", "block_size": 16}
"""KV cache options for small models."""
ALONE_STRIDE = 3
"""Every third request is also decoded alone."""
ONE, TWO, THREE = Objective("1"), Objective("2", 2.0), Objective("3", 0.5)
METHODS: tuple[Method, ...] = (
    Base(),
    Prompt((ONE,)),
    LinearAlignment((ONE,)),
    ContextSteering((ONE, TWO), strength=0.5),
    Guidance((ONE,), guidance_scale=1.5, kl_budget=0.3),
    Opad((ONE,)),
    Amulet((ONE,), kl_budget=0.2),
    Mato((ONE, TWO)),
    Mato((ONE, TWO, THREE), kl_budget=0.2),
    Mixture((ONE, TWO)),
)


@dataclass(frozen=True)
class DecodePlan:
    """What to decode: model size and kinds, methods, longest prompt, tokens per answer, dtypes."""

    size: tiny_models.ModelSize
    kinds: tuple[str, ...]
    methods: tuple[Method, ...]
    max_prompt_len: int
    max_tokens: int
    dtypes: tuple[torch.dtype, ...]


FULL_PLAN = DecodePlan(
    tiny_models.SMALL_MODEL, tuple(tiny_models.MODEL_KINDS), METHODS, 300, 24, (torch.bfloat16, torch.float32)
)
TINY_PLAN = DecodePlan(
    tiny_models.TINY_MODEL, ("mistral",), (Mato((ONE, TWO), kl_budget=0.2),), 20, 2, (torch.float32,)
)


def check_decode(report: CheckReport, device: str, plan: DecodePlan, folder: Path) -> None:
    """Record a row per check and model; in dtypes other than the first, only for the first model."""
    for dtype in plan.dtypes:
        for kind in plan.kinds if dtype == plan.dtypes[0] else plan.kinds[:1]:
            name = f"{kind} in {str(dtype).removeprefix('torch.')}"
            if report.should_skip("decode", name):
                continue
            with report.record("decode", f"{name}: CPU reference") as row:
                model_path = str(tiny_models.write_model(folder / f"{kind}-{dtype}", kind, plan.size, dtype))
                references = generate_outputs(model_path, plan, "cpu", dtype="float32", kernels="torch")
                row["answers"] = len(references)
            if not report.rows[-1].get("wrong"):
                _check_model(report, name, model_path, device, plan, dtype, references)


def _check_model(
    report: CheckReport,
    name: str,
    model_path: str,
    device: str,
    plan: DecodePlan,
    dtype: torch.dtype,
    references: list[Output],
) -> None:
    batch, tolerance = make_requests(plan), TOLERANCE[dtype]
    with report.record("decode", f"{name}: as on the CPU in float32") as row:
        engine = open_engine(model_path, device, kernels="triton", **SMALL_CACHE)
        outputs = engine.generate(batch)
        row.update(compare_outputs(outputs, references, tolerance))
        row["captured_sizes"] = engine.stats.captured
    if "captured_sizes" not in row:
        return  # opening the engine failed
    with report.record("decode", f"{name}: alone against batched") as row:
        row.update(
            compare_outputs(
                [engine.generate(one) for one in batch[::ALONE_STRIDE]], outputs[::ALONE_STRIDE], tolerance
            )
        )
    with report.record("decode", f"{name}: without trace and logprobs") as row:
        greedy = slice(len(plan.methods))  # trace and logprobs decide which sampling kernels run
        row.update(
            compare_untraced(
                [engine.generate(strip_logprobs(one)) for one in batch[greedy]], references[greedy], tolerance
            )
        )
    with report.record("decode", f"{name}: without async scheduling") as row:
        engine._core.async_scheduling = False
        row.update(compare_outputs(engine.generate(batch), outputs, tolerance))
    with report.record("decode", f"{name}: scores of a prompt") as row:
        ids = make_prompt(0, 0, min(plan.max_prompt_len, 100), plan.size.vocab_size)
        expected_scores = open_engine(
            model_path, "cpu", dtype="float32", kernels="torch", **SMALL_CACHE
        ).score(ids)
        errors = (engine.score(ids) - expected_scores).abs()
        row.update(largest=float(errors.max()), mean=float(errors.mean()))
        # mean over the vocabulary: errors of unlikely tokens are larger than those of chosen ones
        row["wrong"] = (
            "" if row["mean"] <= tolerance else f"the mean error of the scores exceeds {tolerance:g}"
        )
    for label, options in (
        ("without CUDA graphs", {"kernels": "triton", "captured": False}),
        ("with torch kernels", {"kernels": "torch"}),
    ):
        with report.record("decode", f"{name}: {label}") as row:
            row.update(
                compare_outputs(generate_outputs(model_path, plan, device, **options), references, tolerance)
            )


def check_served(report: CheckReport, device: str, plan: DecodePlan, folder: Path) -> None:
    """Record a row: an engine opened to serve compiles no kernel after its start.

    Needs its own process: kernels already launched by another engine would not be compiled again.
    """
    name = "no kernel is compiled after start"
    if report.should_skip("served", name):
        return
    with report.record("served", name) as row:
        model_path = str(tiny_models.write_model(folder / "served", plan.kinds[0], plan.size, plan.dtypes[0]))
        start = time.monotonic()
        engine = Engine.from_pretrained(model_path, device=device, kernels="triton", **SMALL_CACHE)
        row["start_seconds"] = time.monotonic() - start
        engine.generate(make_requests(plan))
        row["late_compiles"] = num_late = engine.stats.late_compiles
        row["wrong"] = f"{num_late} kernels were compiled after start" if num_late else ""


def generate_outputs(model_path: str, plan: DecodePlan, device: str, **fields: Any) -> list[Output]:
    """The outputs of a new engine for all requests, decoded in one batch."""
    return open_engine(model_path, device, **SMALL_CACHE, **fields).generate(make_requests(plan))


def make_requests(plan: DecodePlan) -> list[Request]:
    """Requests of every method, greedy and sampled, and one with logit edits; prompts of many lengths."""
    greedy: dict[str, Any] = {"max_tokens": plan.max_tokens, "ignore_eos": True, "logprobs": NUM_LOGPROBS}
    sampled = greedy | {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
    edited = greedy | {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {5: 1.0}}
    cases: list[tuple[Method, dict[str, Any]]] = [(method, greedy) for method in plan.methods]
    cases += [(method, sampled | {"seed": seed}) for seed, method in enumerate(plan.methods)]
    requests = []
    for index, (method, sampling) in enumerate((*cases, (Base(), edited))):
        branches = range(1 + len(method.branch_objectives()))
        lengths = [1 + (37 * index + 61 * branch) % plan.max_prompt_len for branch in branches]
        ids = [
            make_prompt(index, branch, length, plan.size.vocab_size) for branch, length in enumerate(lengths)
        ]
        requests.append(Request(branch_token_ids=ids, steering=method, sampling=SamplingParams(**sampling)))
    return requests


def strip_logprobs(request: Request) -> Request:
    """Copy the request without trace and log-probabilities."""
    return replace(request, trace=False, sampling=replace(request.sampling, logprobs=None))


def make_prompt(index: int, branch: int, length: int, vocab_size: int) -> list[int]:
    """Token ids that differ between requests and between branches."""
    return [(13 + 31 * index + 101 * branch + 7 * i * i) % vocab_size for i in range(length)]
