"""Build an engine from its config: processes, model, KV cache and steering state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError
from ...kernels.steering.state import SteeringState
from ...models import tensor_parallel
from ...models.common import memory
from ...models.decoder import param_dims
from ...models.loader.loader import load_bundle
from ...models.weights.safetensors import torch_dtype
from ..distributed.distributed_info import DistributedInfo
from ..execution.device import resolve_device, select_backend
from ..execution.kv_cache_size import compute_num_kv_blocks
from ..execution.model_runner import ModelRunner
from ..execution.warmup import warm_up

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ...kernels.backend import Backend, KVCache
    from ...models.config import ModelConfig
    from ...models.loader.loader import ModelBundle
    from ..config import EngineConfig
    from ..distributed.process_group import TensorParallelGroup


@dataclass(frozen=True)
class EngineBuilder:
    """The resolved settings of an engine, before weights and KV cache are allocated.

    bundle: the model without its weights. max_model_len: maximum tokens of prompt and answer together. dtype:
    of the weights and of the KV cache.
    """

    config: EngineConfig
    dist_info: DistributedInfo
    device: torch.device
    backend: Backend
    bundle: ModelBundle
    max_model_len: int
    dtype: torch.dtype

    @classmethod
    def from_config(
        cls, config: EngineConfig, progress: Callable[[int, int], None] | None = None
    ) -> EngineBuilder:
        """Resolve a config. Raises InputError for an unknown model or device or a max_model_len too large."""
        dist_info = DistributedInfo.from_env(config.tensor_parallel_size)
        device = resolve_device(
            config.device, dist_info.local_rank, dist_info.local_world_size if dist_info.spawns_workers else 1
        )
        backend = select_backend(config.kernels, device, config.batch_invariant, config.tensor_parallel_size)
        bundle = load_bundle(config.model, config.load_format, config.chat_template, progress, config.dtype)
        max_model_len = _resolve_max_model_len(config, bundle.config)
        dtype = torch_dtype(bundle.config.dtype if config.dtype == "auto" else config.dtype)
        return cls(config, dist_info, device, backend, bundle, max_model_len, dtype)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that both the tokenizer and the model have."""
        return min(self.bundle.tokenizer.vocab_size, self.bundle.config.vocab_size)

    def build_tp_group(self) -> TensorParallelGroup | None:
        """The tensor-parallel process group; None for a single process."""
        if self.config.tensor_parallel_size == 1:
            return None
        from ..distributed.process_group import TensorParallelGroup  # noqa: PLC0415 - some torch builds lack distributed
        from ..distributed.worker_pool import WorkerPool  # noqa: PLC0415

        tensor_parallel.validate_tp_size(self.bundle.config, self.config.tensor_parallel_size)
        return TensorParallelGroup(
            self.dist_info, self.device, WorkerPool(self.config) if self.dist_info.spawns_workers else None
        )

    def build_runner(
        self, tp_group: TensorParallelGroup | None, progress: Callable[[int, int], None] | None = None
    ) -> ModelRunner:
        """Load the model, or its shard, and make the KV cache. Raises RunError when out of memory."""
        config, backend, device = self.config, self.backend, self.device
        full_config = self.bundle.config
        sharding = (
            tensor_parallel.TPSharding(full_config, tp_group.communicator, param_dims(full_config))
            if tp_group
            else None
        )
        with memory.oom_as_error(device, "choose a smaller model or dtype"):
            model = self.bundle.load_model(self.dtype, device, progress, backend.ops, sharding)
        if device.type == "cpu":
            memory.tune_malloc()
        num_layers = model.config.num_layers
        cache_shape = (config.block_size, model.config.num_kv_heads, model.config.head_dim)

        def make_cache(num_blocks: int) -> KVCache:
            return backend.cache_cls(num_layers, num_blocks, *cache_shape, self.dtype, device)

        steering_state = SteeringState(self.vocab_size, device)
        if sharding:
            vocab_shard = sharding.vocab_shard
            steering_state = SteeringState(
                min(max(self.vocab_size - vocab_shard.vocab_start, 0), vocab_shard.shard_size),
                device,
                vocab_shard,
            )
        block_bytes = backend.cache_cls.block_bytes(num_layers, *cache_shape, self.dtype)
        with memory.oom_as_error(device, "lower max_num_batched_tokens or max_num_seqs"):
            num_blocks = compute_num_kv_blocks(
                config, model, backend, make_cache, block_bytes, steering_state.shard
            )
        with memory.oom_as_error(device, "lower gpu_memory_utilization or max_num_seqs"):
            if tp_group:
                return ModelRunner(
                    model,
                    make_cache,
                    tp_group.all_reduce_min(num_blocks),
                    steering_state,
                    backend,
                    tp_group.broadcast_step,
                )
            return ModelRunner(model, make_cache, num_blocks, steering_state, backend)


def warm_up_and_capture(
    runner: ModelRunner, backend: Backend, config: EngineConfig, max_model_len: int
) -> None:
    """Capture CUDA graphs and compile kernels, so that no request waits for them."""
    if config.enforce_eager:
        return
    with memory.oom_as_error(
        runner.device, "lower gpu_memory_utilization or max_num_seqs, or set enforce_eager"
    ):
        if backend.cuda_graphs:
            runner.capture_graphs(config.max_num_seqs, max_model_len)
        if backend.warmup_shapes:
            warm_up(runner, backend.warmup_shapes(runner.device, config.max_num_seqs))


def _resolve_max_model_len(config: EngineConfig, model_config: ModelConfig) -> int:
    model_max, requested = model_config.context_length, config.max_model_len
    if requested is not None and requested > model_max:
        raise InputError(f"max_model_len is {requested}; the model was trained for at most {model_max}")
    return model_max if requested is None else requested
