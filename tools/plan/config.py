"""Settings of a plan: the load, the device and the assumptions."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.config import DTYPES, EngineConfig
from ...engine.utils.fields import config_field, validate_rules, validate_types
from ..common import datasheets


@dataclass(frozen=True)
class PlanConfig:
    """Settings of a plan. Every field is a flag."""

    model: str = config_field("demo", "'demo', a folder with config.json, or a shape such as llama-3.1-70b")
    dtype: str = config_field("auto", "type of weights and KV cache; auto takes the checkpoint's", DTYPES)
    gpu: str = config_field(
        "h100", "device: a GPU by its data sheet, or this machine's CPU, measured", datasheets.GPU_NAMES
    )
    tensor_parallel_size: int | None = config_field(None, "GPUs per replica; none takes the fewest in total")
    rps: float = config_field(1.0, "requests per second")
    branches: int = config_field(3, "branches of a request: one more than its objectives")
    prompt: int = config_field(128, "tokens of a branch's prompt")
    output: int = config_field(64, "tokens of an answer")
    shared: int = config_field(
        0, "tokens of the prefix that a request's branches share; full blocks of it are cached once"
    )
    tpot_ms: float | None = config_field(None, "maximum milliseconds between two tokens of a request")
    load: float = config_field(0.8, "fraction of a replica's maximum rate to use")
    efficiency: float = config_field(0.7, "assumed fraction of the device's peaks that a step reaches")
    all_reduce_us: float = config_field(10.0, "assumed latency of a message between GPUs, microseconds")
    gpu_memory_utilization: float = config_field(
        EngineConfig.gpu_memory_utilization, "fraction of a device's memory to use"
    )
    max_num_batched_tokens: int = config_field(
        EngineConfig.max_num_batched_tokens, "maximum tokens computed in one step"
    )
    price: float | None = config_field(None, "price of a GPU-hour; none prints GPU-hours only")

    def __post_init__(self) -> None:
        validate_types(self)
        validate_rules(
            self,
            ("rps", 0 < self.rps < float("inf"), "a number above 0"),
            ("branches", self.branches >= 1, "an integer ≥ 1"),
            ("prompt", self.prompt >= 1, "an integer ≥ 1"),
            ("output", self.output >= 1, "an integer ≥ 1"),
            ("shared", 0 <= self.shared < self.prompt, f"from 0 to less than prompt ({self.prompt})"),
            ("tpot_ms", self.tpot_ms is None or self.tpot_ms > 0, "a number above 0"),
            ("load", 0 < self.load <= 1, "above 0 and at most 1"),
            ("efficiency", 0 < self.efficiency <= 1, "above 0 and at most 1"),
            ("all_reduce_us", self.all_reduce_us >= 0, "a number ≥ 0"),
            ("gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "above 0 and at most 1"),
            ("max_num_batched_tokens", self.max_num_batched_tokens >= 1, "an integer ≥ 1"),
            ("price", self.price is None or self.price >= 0, "a number ≥ 0"),
        )
