"""Check batch_invariant: small models decoded in several ways give bitwise equal results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...engine.engine import Engine
from .decode import ALONE_STRIDE, SMALL_CACHE, DecodePlan, make_requests
from .open_engine import open_engine
from .tiny_models import write_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ...engine.outputs import Output
    from .report import CheckReport

CHUNKED_PREFILL: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 24}
"""Prefill in chunks, and decode in smaller batches."""


def check_invariance(report: CheckReport, device: str, plan: DecodePlan, folder: Path) -> None:
    """Record a row per model in the plan's first dtype, and one without batch_invariant for comparison."""
    dtype = plan.dtypes[0]
    for kind in plan.kinds:
        model_path = str(write_model(folder / f"{kind}-invariant", kind, plan.size, dtype))
        for batch_invariant in (True, False) if kind == plan.kinds[0] else (True,):
            mode = "" if batch_invariant else ", without batch_invariant"
            name = f"{kind} in {str(dtype).removeprefix('torch.')}{mode}"
            if report.should_skip("invariance", name):
                continue
            with report.record("invariance", name) as row:
                match_counts = count_matches(model_path, device, plan, batch_invariant)
                row.update(
                    {way: f"{same} of {asked} the same" for way, (same, asked) in match_counts.items()}
                )
                differ = [way for way, (same, asked) in match_counts.items() if same < asked]
                # in the interpreter, numpy multiplies, and rounding depends on a row's position in a tile
                strict = batch_invariant and device != "cpu"
                row["wrong"] = f"numbers differ {' and '.join(differ)}" if strict and differ else ""


def count_matches(
    model_path: str, device: str, plan: DecodePlan, batch_invariant: bool
) -> dict[str, tuple[int, int]]:
    """For each way to decode the requests: (answers equal to the batched ones, answers compared)."""

    def open_variant(**fields: Any) -> Engine:
        return open_engine(
            model_path, device, kernels="triton", batch_invariant=batch_invariant, **SMALL_CACHE, **fields
        )

    batch, default_engine = make_requests(plan), open_variant()
    references = default_engine.generate(batch)
    one_by_one = [default_engine.generate(request) for request in batch[::ALONE_STRIDE]]
    return {
        "alone": (count_equal(one_by_one, references[::ALONE_STRIDE]), len(one_by_one)),
        "again": (count_equal(default_engine.generate(batch), references), len(batch)),
        "in pieces": (count_equal(open_variant(**CHUNKED_PREFILL).generate(batch), references), len(batch)),
        "uncaptured": (count_equal(open_variant(captured=False).generate(batch), references), len(batch)),
    }


def count_equal(outputs: Sequence[Output], references: Sequence[Output]) -> int:
    """Count the outputs whose tokens, traces and log-probabilities are all equal."""

    def comparable(output: Output) -> tuple[Any, ...]:
        return output.error, output.token_ids, output.trace, output.logprobs

    return sum(
        comparable(one) == comparable(other) and not one.error
        for one, other in zip(outputs, references, strict=True)
    )
