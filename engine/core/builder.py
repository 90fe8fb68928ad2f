"""How an engine is built: what its settings come to, and from that its processes, its model and its cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError
from ...kernels.steering.state import SteerTable
from ...models import tensor_parallel
from ...models.common import memory
from ...models.llama import dimensions
from ...models.loader.loader import open_model
from ...models.weights.safetensors import torch_dtype
from ..distributed.distributed_info import Place
from ..execution.device import backend_of, device_of
from ..execution.kv_cache_size import pages_of
from ..execution.model_runner import Runner
from ..execution.warmup import warm_up

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ...kernels.backend import Backend, Cache
    from ...models.config import ModelConfig
    from ...models.loader.loader import Opened
    from ..config import EngineConfig
    from ..distributed.process_group import Ranks


@dataclass(frozen=True)
class Blueprint:
    """All that is known of an engine before anything large is made.

    opened: the model but for its weights. length: the longest prompt and answer together. dtype: the type of
    the weights and of the cache.
    """

    config: EngineConfig
    place: Place
    device: torch.device
    backend: Backend
    opened: Opened
    length: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> Blueprint:
        """What these settings come to. Raises InputError when there is no such model, device or length."""
        place = Place.of(config.tensor_parallel_size)
        device = device_of(config.device, place.local, place.beside if place.alone else 1)
        backend = backend_of(config.kernels, device, config.batch_invariant, config.tensor_parallel_size)
        opened = open_model(config.model, config.load_format, config.chat_template, progress, config.dtype)
        length = _max_length(config, opened.config)
        dtype = torch_dtype(opened.config.dtype if config.dtype == "auto" else config.dtype)
        return cls(config, place, device, backend, opened, length, dtype)

    @property
    def vocab(self) -> int:
        """Ids below it have a token."""
        return min(self.opened.tokenizer.vocab_size, self.opened.config.vocab_size)

    def ranks(self) -> Ranks | None:
        """The processes that share the model out; None where one holds it whole."""
        if self.config.tensor_parallel_size == 1:
            return None
        from ..distributed.process_group import Ranks  # noqa: PLC0415 - not every torch can talk to other processes
        from ..distributed.worker_pool import Workers  # noqa: PLC0415

        tensor_parallel.require(self.opened.config, self.config.tensor_parallel_size)
        return Ranks(self.place, self.device, Workers(self.config) if self.place.alone else None)

    def runner(self, ranks: Ranks | None, progress: Callable[[int, int], None] | None = None) -> Runner:
        """The model, or this process's part of it, with its cache. Raises RunError when memory is short."""
        config, backend, device = self.config, self.backend, self.device
        whole = self.opened.config
        part = tensor_parallel.Shards(whole, ranks.peers, dimensions(whole)) if ranks else None
        with memory.enough(device, "give a smaller model or dtype"):
            model = self.opened.load(self.dtype, device, progress, backend.ops, part)
        if device.type == "cpu":
            memory.keep()
        layers = model.config.num_layers
        sizes = (config.block_size, model.config.num_kv_heads, model.config.head_dim)

        def new_cache(pages: int) -> Cache:
            return backend.cache(layers, pages, *sizes, self.dtype, device)

        table = SteerTable(self.vocab, device)
        if part:
            own = part.vocabulary
            table = SteerTable(min(max(self.vocab - own.first, 0), own.width), device, own)
        page = backend.cache.page_bytes(layers, *sizes, self.dtype)
        with memory.enough(device, "lower max_num_batched_tokens or max_num_seqs"):
            pages = pages_of(config, model, backend, new_cache, page, table.shard)
        with memory.enough(device, "lower gpu_memory_utilization or max_num_seqs"):
            if ranks:
                return Runner(model, new_cache, ranks.least(pages), table, backend, ranks.lead)
            return Runner(model, new_cache, pages, table, backend)


def get_ready(runner: Runner, backend: Backend, config: EngineConfig, length: int) -> None:
    """Captures steps that are to be replayed and compiles kernels, so that no request waits for it."""
    if config.enforce_eager:
        return
    with memory.enough(runner.device, "lower gpu_memory_utilization or max_num_seqs, or give enforce_eager"):
        if backend.graphs:
            runner.capture(config.max_num_seqs, length)
        if backend.warm_shapes:
            warm_up(runner, backend.warm_shapes(runner.device, config.max_num_seqs))


def _max_length(config: EngineConfig, shape: ModelConfig) -> int:
    own, asked = shape.context, config.max_model_len
    if asked is not None and asked > own:
        raise InputError(f"max_model_len is {asked}; the model was trained for at most {own}")
    return own if asked is None else asked
