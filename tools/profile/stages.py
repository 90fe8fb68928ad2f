"""Stage timers, patched into an engine while it is profiled; otherwise it runs without instrumentation.

The time of a nested stage counts only for that stage, so that stages add up to the step. Time outside all
stages (preparation of ids, copies, Python between stages) is "rest".
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...engine.engine import Engine
    from ...engine.scheduling.scheduler import SchedulerOutput
    from ...engine.sequence.sequence import SequenceGroup
    from ...models.decoder import DecoderLayer

OTHER = "rest"
STAGES = (
    "plan", "layout", "embed", "norm", "qkv", "rope", "cache", "attention", "output", "mlp", "head", "steer",
    "append", "text", OTHER,
)  # fmt: skip
"""In execution order. cache: the KV cache write, if it is not fused with rope. steer: includes the LM head if
one kernel does both. text: the detokenizer and the rest of the output state."""
LAYER_STAGES = {"qkv_proj": "qkv", "o_proj": "output", "gate_up_proj": "mlp", "down_proj": "mlp"}
OP_STAGES = {"rms_norm": "norm"}
CACHE_STAGES = {"apply_rope": "rope", "write": "cache"}
"""Methods of a KV cache other than attention; not every cache has them."""


class StageTimer:
    """Timer of stages. steps: seconds by stage of each step in which every branch decoded.

    num_rows: rows of such a step. make_range: makes a context manager around each stage, such as a
    profiler's range. on_step: called after each such step.
    """

    def __init__(
        self,
        num_rows: int,
        make_range: Callable[[str], Any] = lambda stage: nullcontext(),
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.steps: list[dict[str, float]] = []
        self._num_rows, self._make_range, self._on_step = num_rows, make_range, on_step
        self._elapsed: defaultdict[str, float] = defaultdict(float)
        self._stack = [OTHER]
        self._last_time = 0.0
        self._all_decode = False

    def wrap(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, timed as `stage`."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._push(stage)
            try:
                with self._make_range(stage):
                    return call(*args, **kwargs)
            finally:
                self._pop()

        return wrapper

    def wrap_schedule(
        self, call: Callable[..., SchedulerOutput | None]
    ) -> Callable[..., SchedulerOutput | None]:
        """The scheduler's `call`, timed as "plan". Its output tells whether every branch decodes."""

        def wrapper(*in_flight: SchedulerOutput) -> SchedulerOutput | None:
            scheduled = call(*in_flight)
            if scheduled is not None:
                self._all_decode = [count for _, _, count in scheduled.scheduled] == [1] * self._num_rows
            return scheduled

        return self.wrap("plan", wrapper)

    def wrap_step(self, call: Callable[[], None]) -> Callable[[], None]:
        """The engine's `step`, which starts and ends the timing of a step."""

        def wrapper() -> None:
            self._elapsed.clear()
            self._last_time = time.perf_counter()
            with self._make_range("step"):
                call()
            self._charge_elapsed()
            if self._all_decode:
                self.steps.append({stage: self._elapsed[stage] for stage in STAGES})
                self._on_step()

        return wrapper

    def _charge_elapsed(self) -> None:
        """Add the time since the last call to the innermost open stage."""
        now = time.perf_counter()
        self._elapsed[self._stack[-1]] += now - self._last_time
        self._last_time = now

    def _push(self, stage: str) -> None:
        self._charge_elapsed()
        self._stack.append(stage)

    def _pop(self) -> None:
        self._charge_elapsed()
        self._stack.pop()


class _TimedProxy:
    """A proxy that times calls and indexing of a value, and forwards other attributes."""

    def __init__(self, timer: StageTimer, stage: str, value: Any) -> None:
        self._timer, self._stage, self._value = timer, stage, value

    def __call__(self, *args: Any) -> Any:
        return self._timer.wrap(self._stage, self._value)(*args)

    def __getitem__(self, index: Any) -> Any:
        return self._timer.wrap(self._stage, self._value.__getitem__)(index)

    def add_residual(self, *args: Any) -> Any:
        return self._timer.wrap(self._stage, self._value.add_residual)(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value, name)


@contextmanager
def instrument(engine: Engine, timer: StageTimer) -> Iterator[None]:
    """Context manager: time the engine's steps with `timer`. Stages inside captured steps are not timed."""
    core = engine._core
    model, cache, runner, scheduler = core.runner.model, core.runner.cache, core.runner, core.scheduler
    timed_ops = {
        op.name: timer.wrap(OP_STAGES[op.name], getattr(model.ops, op.name))
        for op in fields(model.ops)
        if op.name in OP_STAGES
    }
    patches: list[tuple[Any, str, Any]] = [
        (core, "step", timer.wrap_step(core.step)),
        (scheduler, "schedule", timer.wrap_schedule(scheduler.schedule)),
        (scheduler, "schedule_ahead", timer.wrap_schedule(scheduler.schedule_ahead)),
        (scheduler, "mark_computed", timer.wrap("plan", scheduler.mark_computed)),
        (scheduler, "add", _wrap_add(timer, scheduler.add)),
        (cache, "prepare", timer.wrap("layout", cache.prepare)),
        (cache, "forward", timer.wrap("attention", cache.forward)),
        (runner, "sample", timer.wrap("steer", runner.sample)),
        (model, "ops", replace(model.ops, **timed_ops)),
        (model, "_embed_tokens", _TimedProxy(timer, "embed", model._embed_tokens)),
        (model, "lm_head", _TimedProxy(timer, "head", model.lm_head)),
        (model, "_layers", [_instrument_layer(timer, layer) for layer in model._layers]),
        (model._rotary_emb, "cos_sin", timer.wrap("rope", model._rotary_emb.cos_sin)),
    ]
    for name, stage in CACHE_STAGES.items():
        if hasattr(cache, name):
            patches.append((cache, name, timer.wrap(stage, getattr(cache, name))))
    originals = [(owner, name, vars(owner).get(name)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in originals:
            if value is None:
                delattr(owner, name)  # the attribute is the class's
            else:
                setattr(owner, name, value)


def _instrument_layer(timer: StageTimer, layer: DecoderLayer) -> DecoderLayer:
    timed_projections: dict[str, Any] = {
        name: _TimedProxy(timer, stage, getattr(layer, name)) for name, stage in LAYER_STAGES.items()
    }
    return replace(layer, **timed_projections)


def _wrap_add(timer: StageTimer, call: Callable[[SequenceGroup], None]) -> Callable[[SequenceGroup], None]:
    """Time the `append` of each new group and of its output state. The patch is dropped with the group."""

    def add(group: SequenceGroup) -> None:
        vars(group)["append"] = timer.wrap("append", group.append)
        vars(group.output_state)["append"] = timer.wrap("text", group.output_state.append)
        call(group)

    return add
