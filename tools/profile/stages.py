"""The stages of a step, marked from outside: an engine runs unmarked until it is profiled.

What a stage calls of another counts for that other alone, so that the stages of a step add up to it. What is
marked nowhere (the rows' ids, copies, the way from one stage to the next) is "rest".
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
    from ...engine.scheduling.scheduler import Plan
    from ...engine.sequence.sequence import Group
    from ...models.llama import Layer

REST = "rest"
STAGES = (
    "plan", "layout", "embed", "norm", "qkv", "rope", "cache", "attention", "output", "mlp", "head", "steer",
    "append", "text", REST,
)  # fmt: skip
"""In a step's order: cache is the write to it where that is no part of rope, steer has the head's product
where one kernel does both, text is the detokeniser and all that an answer keeps."""
LAYER = {"qkv": "qkv", "output": "output", "gate_up": "mlp", "down": "mlp"}
OPS = {"rms_norm": "norm"}
CACHE = {"turn": "rope", "store": "cache"}
"""What a cache does besides attention, where it does it apart."""


class Stages:
    """The clock of the stages. steps: seconds by stage of each step in which every branch decoded.

    rows: of such a step. range: given a stage, what stands around it besides, such as a profiler's range.
    ended: called after each such step.
    """

    def __init__(
        self,
        rows: int,
        range: Callable[[str], Any] = lambda stage: nullcontext(),
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.steps: list[dict[str, float]] = []
        self._rows, self._range, self._ended = rows, range, ended
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._within = [REST]
        self._since = 0.0
        self._decodes = False

    def of(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def timed(*args: Any, **named: Any) -> Any:
            self._enter(stage)
            try:
                with self._range(stage):
                    return call(*args, **named)
            finally:
                self._leave()

        return timed

    def plan(self, call: Callable[..., Plan | None]) -> Callable[..., Plan | None]:
        """The scheduler's, which says whether every branch decodes."""

        def planned(*before: Plan) -> Plan | None:
            plan = call(*before)
            if plan is not None:
                self._decodes = [count for _, _, count in plan.shares] == [1] * self._rows
            return plan

        return self.of("plan", planned)

    def step(self, call: Callable[[], None]) -> Callable[[], None]:
        """The engine's step."""

        def stepped() -> None:
            self._spent.clear()
            self._since = time.perf_counter()
            with self._range("step"):
                call()
            self._turn()
            if self._decodes:
                self.steps.append({stage: self._spent[stage] for stage in STAGES})
                self._ended()

        return stepped

    def _turn(self) -> None:
        """What has passed belongs to the stage that is open."""
        now = time.perf_counter()
        self._spent[self._within[-1]] += now - self._since
        self._since = now

    def _enter(self, stage: str) -> None:
        self._turn()
        self._within.append(stage)

    def _leave(self) -> None:
        self._turn()
        self._within.pop()


class _Marked:
    """A value whose calls and look-ups are timed; all else is the value's own."""

    def __init__(self, stages: Stages, stage: str, value: Any) -> None:
        self._stages, self._stage, self._value = stages, stage, value

    def __call__(self, *args: Any) -> Any:
        return self._stages.of(self._stage, self._value)(*args)

    def __getitem__(self, at: Any) -> Any:
        return self._stages.of(self._stage, self._value.__getitem__)(at)

    def add_to(self, *args: Any) -> Any:
        return self._stages.of(self._stage, self._value.add_to)(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._value, name)


@contextmanager
def marked(engine: Engine, stages: Stages) -> Iterator[None]:
    """Within, the engine's steps are timed by `stages`. Steps that were captured are not looked into."""
    core = engine._core
    model, cache, runner, scheduler = core.runner.model, core.runner.cache, core.runner, core.scheduler
    ops = {
        op.name: stages.of(OPS[op.name], getattr(model.ops, op.name))
        for op in fields(model.ops)
        if op.name in OPS
    }
    new: list[tuple[Any, str, Any]] = [
        (core, "step", stages.step(core.step)),
        (scheduler, "plan", stages.plan(scheduler.plan)),
        (scheduler, "ahead", stages.plan(scheduler.ahead)),
        (scheduler, "commit", stages.of("plan", scheduler.commit)),
        (scheduler, "add", _adding(stages, scheduler.add)),
        (cache, "begin", stages.of("layout", cache.begin)),
        (cache, "attend", stages.of("attention", cache.attend)),
        (runner, "choose", stages.of("steer", runner.choose)),
        (model, "ops", replace(model.ops, **ops)),
        (model, "_embedding", _Marked(stages, "embed", model._embedding)),
        (model, "head", _Marked(stages, "head", model.head)),
        (model, "_layers", [_marked_layer(stages, layer) for layer in model._layers]),
        (model._rotary, "at", stages.of("rope", model._rotary.at)),
    ]
    for name, stage in CACHE.items():
        if hasattr(cache, name):
            new.append((cache, name, stages.of(stage, getattr(cache, name))))
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in new]
    for owner, name, value in new:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is None:
                delattr(owner, name)  # it was the class's own
            else:
                setattr(owner, name, value)


def _marked_layer(stages: Stages, layer: Layer) -> Layer:
    products: dict[str, Any] = {
        name: _Marked(stages, stage, getattr(layer, name)) for name, stage in LAYER.items()
    }
    return replace(layer, **products)


def _adding(stages: Stages, call: Callable[[Group], None]) -> Callable[[Group], None]:
    """As requests come, what takes their tokens is marked too: nobody keeps a group after its end."""

    def add(group: Group) -> None:
        vars(group)["append"] = stages.of("append", group.append)
        vars(group.answer)["append"] = stages.of("text", group.answer.append)
        call(group)

    return add
