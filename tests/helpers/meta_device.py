"""An engine as on a GPU, without one: its tensors have no numbers, its launches can be noted and not made."""

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

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pytest
    from trimtab.engine import Request
    from trimtab.engine.core.engine_core import Core
    from trimtab.kernels.specs.aot_compile import Build

META = torch.device("meta")


def opened(monkeypatch: pytest.MonkeyPatch, model: str, **fields: Any) -> Core:
    """The core of an engine, whose results stay where they are."""
    monkeypatch.setattr(builder, "device_of", lambda *_: META)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 40)
    monkeypatch.setattr(DummyWeights, "tensor", _empty)
    monkeypatch.setattr(runners, "fetch", lambda tensors: lambda: list(tensors))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    monkeypatch.setattr(aot_compile, "build_of", partial(_built, build=aot_compile.build_of))
    return Engine.from_pretrained(model, kv_cache_memory="1GiB", **fields)._core


def steps(core: Core, requests: Sequence[Request], count: int) -> None:
    """So many steps of all that runs and of these requests, each of which is told some token."""
    for request in requests:
        for group in core.admit(request):
            core.scheduler.add(group)
    for _ in range(count):
        plan = core.scheduler.plan()
        choice = core.runner.launch(plan).land()
        core.scheduler.commit(plan)
        assert (choice is not None) == bool(plan.ready)
        assert choice is None or choice.tokens.device == META
        for group in plan.ready:
            group.tokens.append(9)


def _empty(weights: DummyWeights, name: str) -> torch.Tensor:
    return torch.empty(weights.shapes[name], dtype=torch.bfloat16, device=META)


def _built(function: Any, args: tuple[Any, ...], more: Any, *, build: Callable[..., Build]) -> Build:
    """What is launched takes tensors of the device alone; Triton would not look."""
    given = [value for value in args if isinstance(value, torch.Tensor)]
    assert {tensor.device for tensor in given} == {META}, function
    return build(function, args, more)
