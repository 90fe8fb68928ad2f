"""Size of the KV cache: from the config, or from the GPU memory left by a profiling run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ...kernels.attention_metadata import SequenceChunk
from ...kernels.common.errors import InputError, RunError
from ...kernels.distributed.vocab_parallel import UNSHARDED, UnshardedVocab
from ...kernels.steering.coefficients import SteeringCoefficients
from ...kernels.steering.layout import RequestLayout
from ...kernels.steering.sampling import RowSampling
from ...kernels.steering.state import SteeringState
from ...models.common import memory
from ...models.forward import forward
from ..config import EngineConfig, parse_bytes
from .model_runner import inference_context

if TYPE_CHECKING:
    from ...kernels.backend import Backend, KVCache
    from ...models.decoder import Decoder

TRUNCATED_SAMPLING = RowSampling(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01)


def compute_num_kv_blocks(
    config: EngineConfig,
    model: Decoder,
    backend: Backend,
    make_cache: Callable[[int], KVCache],
    block_bytes: int,
    shard: UnshardedVocab = UNSHARDED,
) -> int:
    """Number of KV blocks of `block_bytes` bytes. Raises InputError or RunError if not even one fits."""
    if config.kv_cache_memory != "auto" or model.device.type == "cpu":
        return _configured_num_blocks(config, block_bytes, model.device)
    with inference_context(), torch.cuda.device(model.device):
        peak = _measure_peak(lambda: profile_run(config, model, backend, make_cache, shard), model.device)
    free, total = torch.cuda.mem_get_info(model.device)
    available = int(total * config.gpu_memory_utilization) - (total - free) - peak
    if available < block_bytes:
        setting = f"gpu_memory_utilization is {config.gpu_memory_utilization:g}"
        raise RunError(
            f"{setting}, too small for one KV block of {memory.format_gib(block_bytes)}: "
            f"{model.device} has "
            f"{memory.format_gib(free)} free, and the largest step takes {memory.format_gib(peak)}"
        )
    return available // block_bytes


def _configured_num_blocks(config: EngineConfig, block_bytes: int, device: torch.device) -> int:
    num_blocks = parse_bytes(config.kv_cache_memory) // block_bytes
    if not num_blocks:
        raise InputError(
            f"kv_cache_memory is {config.kv_cache_memory!r}; one KV block takes {block_bytes} bytes"
        )
    if device.type != "cpu":  # a CPU allocates memory at first use
        memory.require_free(num_blocks * block_bytes, "the KV cache", device)
    return num_blocks


def profile_run(
    config: EngineConfig,
    model: Decoder,
    backend: Backend,
    make_cache: Callable[[int], KVCache],
    shard: UnshardedVocab = UNSHARDED,
) -> None:
    """Run the largest possible step on a temporary cache: a long prefill and decoding branches.

    Every row samples a token of its own request, with truncation, trace and top log-probabilities.
    """
    num_seqs, num_tokens, block_size = config.max_num_seqs, config.max_num_batched_tokens, config.block_size
    chunk_lens = [num_tokens - num_seqs + 1, *[1] * (num_seqs - 1)]
    block_table = list(range(-(-chunk_lens[0] // block_size)))
    steering_state = SteeringState(model.config.vocab_size, model.device, shard)
    cache = make_cache(len(block_table))
    chunks = [SequenceChunk(0, count, block_table) for count in chunk_lens]
    hidden = forward(model, chunks, [0] * num_tokens, [num_tokens] * num_tokens, cache)
    for row in range(num_seqs):
        steering_state.add_request(row, SteeringCoefficients(), (), TRUNCATED_SAMPLING)
    layout = RequestLayout.from_branches([(row, [0]) for row in range(num_seqs)], model.device)
    backend.sample(model.lm_head, hidden[-num_seqs:], layout, steering_state, None, trace=True, top=True)


def _measure_peak(fn: Callable[[], None], device: torch.device) -> int:
    """Peak device memory of a call in bytes, above what is allocated before it."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    baseline = torch.cuda.memory_allocated(device)
    fn()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - baseline
    torch.cuda.empty_cache()
    return peak
