"""What a plan is for: the load, the device, and what is assumed of it."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.config import DTYPES, EngineConfig
from ...engine.utils.fields import config_field, validate_rules, validate_types
from ..common import datasheets


@dataclass(frozen=True)
class PlanConfig:
    """Every field is a flag."""

    model: str = config_field("demo", "'demo', a folder with config.json, or a shape such as llama-3.1-70b")
    dtype: str = config_field("auto", "type of weights and cache; auto takes the checkpoint's", DTYPES)
    gpu: str = config_field(
        "h100", "a data sheet's peaks, or those of this machine's CPU, measured", datasheets.GPU_NAMES
    )
    tensor_parallel_size: int | None = config_field(None, "GPUs that hold one model; none takes the cheapest")
    rps: float = config_field(1.0, "requests a second")
    branches: int = config_field(3, "branches of a request: one more than its objectives")
    prompt: int = config_field(128, "tokens of a branch's prompt")
    output: int = config_field(64, "tokens of an answer")
    shared: int = config_field(
        0, "tokens that a request's prompts begin with in common; whole pages are kept once"
    )
    tpot_ms: float | None = config_field(None, "most milliseconds between two tokens of a request")
    load: float = config_field(0.8, "share of a replica's highest rate that it is to carry")
    efficiency: float = config_field(0.7, "assumed share of the device's peaks that a step reaches")
    all_reduce_us: float = config_field(10.0, "assumed microseconds of a message among GPUs, however short")
    gpu_memory_utilization: float = config_field(
        EngineConfig.gpu_memory_utilization, "share of a device's memory that may be taken"
    )
    max_num_batched_tokens: int = config_field(
        EngineConfig.max_num_batched_tokens, "most tokens computed in one step"
    )
    price: float | None = config_field(
        None, "what a GPU costs an hour; none tells GPU-hours instead of costs"
    )

    def __post_init__(self) -> None:
        validate_types(self)
        validate_rules(
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
