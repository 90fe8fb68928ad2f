"""Small models decoded in several ways: with batch_invariant all give the same numbers to the last bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...engine.engine import Engine
from .decode import ALONE, SMALL, Plan, requests
from .open_engine import opened
from .tiny_models import write

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ...engine.outputs import Output
    from .report import Report

PIECES: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 24}
"""Prompts are cut, and fewer rows are decoded at once."""


def check(report: Report, device: str, plan: Plan, folder: Path) -> None:
    """A row for each model in the plan's first type; and for the first model as it is without, to compare."""
    dtype = plan.dtypes[0]
    for kind in plan.kinds:
        where = str(write(folder / f"{kind}-invariant", kind, plan.size, dtype))
        for on in (True, False) if kind == plan.kinds[0] else (True,):
            name = f"{kind} in {str(dtype).removeprefix('torch.')}{'' if on else ', without batch_invariant'}"
            if report.leaves_out("invariance", name):
                continue
            with report.part("invariance", name) as row:
                ways = counted(where, device, plan, on)
                row.update({way: f"{same} of {asked} the same" for way, (same, asked) in ways.items()})
                differ = [way for way, (same, asked) in ways.items() if same < asked]
                # interpreted, products are numpy's, which rounds a row by its place in a tile
                sure = on and device != "cpu"
                row["wrong"] = f"numbers differ {' and '.join(differ)}" if sure and differ else ""


def counted(where: str, device: str, plan: Plan, on: bool) -> dict[str, tuple[int, int]]:
    """For each way to decode the requests: how many answers are those of all together, and of how many."""

    def engine(**fields: Any) -> Engine:
        return opened(where, device, kernels="triton", batch_invariant=on, **SMALL, **fields)

    asked, first = requests(plan), engine()
    found = first.generate(asked)
    one_by_one = [first.generate(request) for request in asked[::ALONE]]
    return {
        "alone": (equal(one_by_one, found[::ALONE]), len(one_by_one)),
        "again": (equal(first.generate(asked), found), len(asked)),
        "in pieces": (equal(engine(**PIECES).generate(asked), found), len(asked)),
        "uncaptured": (equal(engine(captured=False).generate(asked), found), len(asked)),
    }


def equal(some: Sequence[Output], others: Sequence[Output]) -> int:
    """How many answers have the same tokens and the same numbers, all of them."""

    def told(output: Output) -> tuple[Any, ...]:
        return output.error, output.token_ids, output.trace, output.logprobs

    return sum(told(one) == told(other) and not one.error for one, other in zip(some, others, strict=True))
