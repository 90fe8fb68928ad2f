"""What a plan is for: the load, the device, and what is assumed of it."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.config import DTYPES, EngineConfig
from ...engine.utils.fields import check_fields, option, require_fields
from ..common import datasheets


@dataclass(frozen=True)
class Asked:
    """Every field is a flag."""

    model: str = option("demo", "'demo', a folder with config.json, or a shape such as llama-3.1-70b")
    dtype: str = option("auto", "type of weights and cache; auto takes the checkpoint's", DTYPES)
    gpu: str = option(
        "h100", "a data sheet's peaks, or those of this machine's CPU, measured", datasheets.NAMES
    )
    tensor_parallel_size: int | None = option(None, "GPUs that hold one model; none takes the cheapest")
    rps: float = option(1.0, "requests a second")
    branches: int = option(3, "branches of a request: one more than its wishes")
    prompt: int = option(128, "tokens of a branch's prompt")
    output: int = option(64, "tokens of an answer")
    shared: int = option(0, "tokens that a request's prompts begin with in common; whole pages are kept once")
    tpot_ms: float | None = option(None, "most milliseconds between two tokens of a request")
    load: float = option(0.8, "share of a replica's highest rate that it is to carry")
    efficiency: float = option(0.7, "assumed share of the device's peaks that a step reaches")
    all_reduce_us: float = option(10.0, "assumed microseconds of a message among GPUs, however short")
    gpu_memory_utilization: float = option(
        EngineConfig.gpu_memory_utilization, "share of a device's memory that may be taken"
    )
    max_num_batched_tokens: int = option(
        EngineConfig.max_num_batched_tokens, "most tokens computed in one step"
    )
    price: float | None = option(None, "what a GPU costs an hour; none tells GPU-hours instead of costs")

    def __post_init__(self) -> None:
        check_fields(self)
        require_fields(
            self,
            ("rps", 0 < self.rps < float("inf"), "a number above 0"),
            ("branches", self.branches >= 1, "a whole number ≥ 1"),
            ("prompt", self.prompt >= 1, "a whole number ≥ 1"),
            ("output", self.output >= 1, "a whole number ≥ 1"),
            ("shared", 0 <= self.shared < self.prompt, f"from 0 to less than prompt ({self.prompt})"),
            ("tpot_ms", self.tpot_ms is None or self.tpot_ms > 0, "a number above 0"),
            ("load", 0 < self.load <= 1, "above 0 and at most 1"),
            ("efficiency", 0 < self.efficiency <= 1, "above 0 and at most 1"),
            ("all_reduce_us", self.all_reduce_us >= 0, "a number ≥ 0"),
            ("gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "above 0 and at most 1"),
            ("max_num_batched_tokens", self.max_num_batched_tokens >= 1, "a whole number ≥ 1"),
            ("price", self.price is None or self.price >= 0, "a number ≥ 0"),
        )
