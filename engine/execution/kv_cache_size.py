"""How many pages the KV cache gets: what was asked for, or what a GPU has left beside the largest step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ...kernels.attention_metadata import Segment
from ...kernels.common.errors import InputError, RunError
from ...kernels.distributed.vocab_parallel import WHOLE, Whole
from ...kernels.steering.coefficients import Program
from ...kernels.steering.state import Draw, Groups, SteerTable
from ...models.common import memory
from ...models.forward import forward
from ..config import EngineConfig, parse_bytes
from .model_runner import plain_tensors

if TYPE_CHECKING:
    from ...kernels.backend import Backend, Cache
    from ...models.llama import Llama

FILTERED = Draw(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01)


def pages_of(
    config: EngineConfig,
    model: Llama,
    backend: Backend,
    new_cache: Callable[[int], Cache],
    page: int,
    shard: Whole = WHOLE,
) -> int:
    """The pages, each of `page` bytes. Raises InputError for less than one, RunError when memory is short."""
    if config.kv_cache_memory != "auto" or model.device.type == "cpu":
        return _asked(config, page, model.device)
    with plain_tensors(), torch.cuda.device(model.device):
        largest = _peak(lambda: rehearse(config, model, backend, new_cache, shard), model.device)
    free, total = torch.cuda.mem_get_info(model.device)
    room = int(total * config.gpu_memory_utilization) - (total - free) - largest
    if room < page:
        share = f"gpu_memory_utilization is {config.gpu_memory_utilization:g}"
        raise RunError(
            f"{share}, which leaves the KV cache no page of {memory.gib(page)}: {model.device} has "
            f"{memory.gib(free)} free, and the largest step takes {memory.gib(largest)}"
        )
    return room // page


def _asked(config: EngineConfig, page: int, device: torch.device) -> int:
    pages = parse_bytes(config.kv_cache_memory) // page
    if not pages:
        raise InputError(
            f"kv_cache_memory is {config.kv_cache_memory!r}; one page of this model takes {page} bytes"
        )
    if device.type != "cpu":  # a CPU's is only taken as it is used
        memory.require(pages * page, "the KV cache", device)
    return pages


def rehearse(
    config: EngineConfig,
    model: Llama,
    backend: Backend,
    new_cache: Callable[[int], Cache],
    shard: Whole = WHOLE,
) -> None:
    """The largest step there may be, on a cache of its own: a long prompt beside branches that decode.

    All choose a token, each with scores of its own that are filtered and reported.
    """
    rows, tokens, block = config.max_num_seqs, config.max_num_batched_tokens, config.block_size
    counts = [tokens - rows + 1, *[1] * (rows - 1)]
    pages = list(range(-(-counts[0] // block)))
    table = SteerTable(model.config.vocab_size, model.device, shard)
    cache = new_cache(len(pages))
    segments = [Segment(0, count, pages) for count in counts]
    hidden = forward(model, segments, [0] * tokens, [tokens] * tokens, cache)
    for row in range(rows):
        table.admit(row, Program(), (), FILTERED)
    groups = Groups.of([(row, [0]) for row in range(rows)], model.device)
    backend.choose(model.head, hidden[-rows:], groups, table, None, trace=True, top=True)


def _peak(call: Callable[[], None], device: torch.device) -> int:
    """Bytes of the device that a call takes at most, all of which it gives back."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    found = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return found
