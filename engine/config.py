"""Engine configuration: model, dtype, device, memory and batch limits."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

from .utils.fields import config_field, invalid_value, validate_rules, validate_types

KERNELS = ("auto", "torch", "triton")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
DEVICE_PATTERN = r"auto|cpu|cuda(:\d{1,3})?"
MAX_SEQS, MAX_TENSOR_PARALLEL_SIZE = 1 << 16, 1 << 10
MAX_BYTES = 1 << 63
DEFAULT_CPU_CACHE = "2GiB"
"""Default size of the KV cache on a CPU."""


@dataclass(frozen=True)
class EngineConfig:
    """The engine's settings, named as in vLLM. Every field is a command-line flag of the same name."""

    model: str = config_field("demo", "'demo', a folder with config.json and safetensors, or a .gguf file")
    dtype: str = config_field("auto", "type of the weights; auto takes the checkpoint's", DTYPES)
    device: str = config_field("auto", "cpu, cuda or cuda:N; auto takes a GPU if torch finds one")
    max_model_len: int | None = config_field(
        None, "maximum tokens of prompt and answer together; none takes the model's"
    )
    max_num_seqs: int = config_field(48, "maximum number of branches decoded at once")
    max_num_batched_tokens: int = config_field(2048, "maximum number of tokens computed in one step")
    max_waiting: int = config_field(1024, "maximum number of answers waiting in a service; more are refused")
    kv_cache_memory: str | int = config_field(
        "auto",
        f"memory for the KV cache, such as 4GiB; auto takes {DEFAULT_CPU_CACHE} on a CPU and "
        f"the remaining memory of a GPU",
    )
    gpu_memory_utilization: float = config_field(
        0.9, "share of a GPU's memory that weights, the largest step and the KV cache may take together"
    )
    block_size: int = config_field(64, "tokens per block of the KV cache; a multiple of 16")
    tensor_parallel_size: int = config_field(
        1, "processes that the model is sharded over, each with a GPU or a share of the cores and a KV cache"
    )
    enable_prefix_caching: bool = config_field(True, "reuse the KV cache of requests with the same prefix")
    enforce_eager: bool = config_field(
        False,
        "capture no CUDA graphs and compile each kernel at its first use: faster start, slower decoding",
    )
    batch_invariant: bool = config_field(
        False,
        "bit-identical log-probabilities for any batch and any chunking of prompts; always so on a CPU, "
        "slower decoding on a GPU",
    )
    load_format: str = config_field(
        "auto", "dummy makes random weights; the model may then be a shape such as llama-3.1-8b", LOAD_FORMATS
    )
    served_model_name: str | None = config_field(
        None, "model name in the API of a service; none takes that of model"
    )
    kernels: str = config_field(
        "auto",
        "kernel backend; auto takes triton on a GPU and torch on a CPU, where triton is interpreted",
        KERNELS,
    )
    seed: int | None = config_field(
        None, "seed for drawing the seeds of requests that set none; none draws a new one at each start"
    )
    chat_template: str | None = config_field(
        None, "a Jinja chat template or its file, instead of the model's"
    )

    def __post_init__(self) -> None:
        for name in ("model", "chat_template"):
            if isinstance(path := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(path))
        validate_types(self)
        validate_rules(
            self,
            ("device", bool(re.fullmatch(DEVICE_PATTERN, self.device)), "auto, cpu, cuda or cuda:N"),
            ("gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "above 0 and at most 1"),
            ("max_model_len", self.max_model_len is None or self.max_model_len >= 1, "an integer ≥ 1"),
            ("max_num_seqs", 1 <= self.max_num_seqs <= MAX_SEQS, f"an integer from 1 to {MAX_SEQS}"),
            (
                "max_num_batched_tokens",
                self.max_num_batched_tokens >= self.max_num_seqs,
                f"at least max_num_seqs ({self.max_num_seqs}), so that every branch can take a step",
            ),
            ("max_waiting", self.max_waiting >= 1, "an integer ≥ 1"),
            (
                "tensor_parallel_size",
                1 <= self.tensor_parallel_size <= MAX_TENSOR_PARALLEL_SIZE,
                f"an integer from 1 to {MAX_TENSOR_PARALLEL_SIZE}",
            ),
            ("block_size", self.block_size >= 16 and self.block_size % 16 == 0, "a multiple of 16"),
        )
        parse_bytes(self.kv_cache_memory)


def parse_bytes(size: str | int) -> int:
    """`"512MiB"` → 536870912. Units: none or B, KiB, MiB, GiB, TiB (also K, M, G, T, KB, …: the same).

    An int counts bytes, "auto" is the default of a CPU. Raises InputError for anything else.
    """
    size = DEFAULT_CPU_CACHE if size == "auto" else size
    value = size if isinstance(size, int) else _parse_size(size.strip())
    if not 1 <= value < MAX_BYTES:
        raise invalid_value("kv_cache_memory", size, "a size of memory such as 512MiB or 4GiB")
    return int(value)


def _parse_size(text: str) -> float:
    number = text.rstrip("KMGTiBkmgtb")
    unit = text[len(number) :].upper().rstrip("B").rstrip("I")
    try:
        return float(number) * 1024.0 ** ("", "K", "M", "G", "T").index(unit)
    except ValueError:
        return math.nan
