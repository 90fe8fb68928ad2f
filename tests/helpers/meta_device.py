"""An engine on the meta device, to run the GPU code path without a GPU and record its kernel launches."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from trimtab.engine import Engine
from trimtab.engine.core import builder
from trimtab.engine.execution import model_runner as runners
from trimtab.kernels.specs import aot_compile
from trimtab.models.common import memory
from trimtab.models.weights.dummy import DummyWeights

from ..harness import get_core

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest
    from trimtab.engine import Request
    from trimtab.engine.core.engine_core import EngineCore
    from trimtab.kernels.specs.aot_compile import KernelVariant

META = torch.device("meta")


def make_core(monkeypatch: pytest.MonkeyPatch, model: str, **fields: Any) -> EngineCore:
    """The core of an engine on the meta device; results are not copied to the host."""
    monkeypatch.setattr(builder, "resolve_device", lambda *_: META)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 40)
    monkeypatch.setattr(DummyWeights, "get_tensor", _empty_tensor)
    monkeypatch.setattr(runners, "to_host_async", lambda tensors: lambda: list(tensors))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    monkeypatch.setattr(
        aot_compile,
        "variant_from_launch",
        partial(_checked_variant, variant_of=aot_compile.variant_from_launch),
    )
    return get_core(Engine.from_pretrained(model, kv_cache_memory="1GiB", **fields))


def run_steps(core: EngineCore, requests: Sequence[Request], num_steps: int) -> None:
    """Add the requests and run `num_steps` steps; every sampled token is replaced by token 9."""
    for request in requests:
        for group in core.create_groups(request):
            core.scheduler.add(group)
    for _ in range(num_steps):
        scheduler_output = core.scheduler.schedule()
        sampled = core.runner.execute(scheduler_output).result()
        core.scheduler.mark_computed(scheduler_output)
        assert (sampled is not None) == bool(scheduler_output.to_sample)
        assert sampled is None or sampled.tokens.device == META
        for group in scheduler_output.to_sample:
            group.output_ids.append(9)


def _empty_tensor(weights: DummyWeights, name: str) -> torch.Tensor:
    return torch.empty(weights.shapes[name], dtype=torch.bfloat16, device=META)


def _checked_variant(
    kernel: Any, args: tuple[Any, ...], kwargs: Any, *, variant_of: Callable[..., KernelVariant]
) -> KernelVariant:
    """Assert that all tensor arguments are on the meta device, which Triton does not check."""
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    assert {tensor.device for tensor in tensors} == {META}, kernel
    return variant_of(kernel, args, kwargs)
