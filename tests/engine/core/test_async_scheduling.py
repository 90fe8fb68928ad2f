"""Async scheduling, run on a CPU: steps launched before the previous step's tokens are read."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from trimtab.engine import Amulet, Base, Engine, Mato, Objective, Opad, Request, SamplingParams
from trimtab.engine.execution.cuda_graphs import CUDAGraphRunner
from trimtab.engine.execution.model_runner import inference_context
from trimtab.engine.sequence.sequence import SequenceGroup
from trimtab.kernels.backend import REFERENCE_BACKEND

from ...harness import get_core, get_runner, set_async_scheduling
from ...helpers.fake_graph import fake_capture
from ...helpers.tiny_model import is_idle

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.engine.execution.in_flight import InFlightStep
    from trimtab.engine.outputs import Output
    from trimtab.engine.scheduling.scheduler import SchedulerOutput
    from trimtab.kernels.steering.step import SamplerOutput

KIND, SHORT = Objective("Be kind."), Objective("Be short.", 2)
FAVORED_TOKEN = 9
"""A token that is sampled unless banned."""


def open_engine(folder: Path, **fields: Any) -> Engine:
    return Engine.from_pretrained(str(folder), kv_cache_memory="1MiB", block_size=16, **fields)


@pytest.fixture
def engine(tiny_folder: Path) -> Engine:
    engine = open_engine(tiny_folder)
    set_async_scheduling(engine)
    return engine


@pytest.fixture
def reference(tiny_folder: Path) -> Engine:
    return open_engine(tiny_folder)


def record_events(engine: Engine) -> list[str]:
    """Record launches and reads from now on, in order; a step launched on unread tokens is 'ahead'."""
    runner, events = get_runner(engine), list[str]()
    launch = runner.execute

    def record_launch(scheduler_output: SchedulerOutput) -> InFlightStep:
        events.append("ahead" if scheduler_output.prev_index else "execute")
        step = launch(scheduler_output)
        result = step.result

        def record_result() -> SamplerOutput | None:
            events.append("result")
            return result()

        object.__setattr__(step, "result", record_result)
        return step

    runner.execute = record_launch  # type: ignore[method-assign]
    return events


def make_requests() -> list[Request]:
    """Requests of several lengths that cover all steering state kept between steps."""
    lengths = (3, 30, 9, 40)
    methods = (Amulet([KIND]), Mato([KIND, SHORT], kl_budget=0.2), Opad([SHORT]), Base())
    return [
        Request("Why? " * turn, method, SamplingParams(max_tokens=length, temperature=0.9, seed=turn))
        for turn, (method, length) in enumerate(zip(methods, lengths, strict=True), 1)
    ]


def assert_same_outputs(outputs: list[Output], expected: list[Output]) -> None:
    for output, reference in zip(outputs, expected, strict=True):
        assert output.error is None
        assert (output.token_ids, output.text, output.trace) == (
            reference.token_ids,
            reference.text,
            reference.trace,
        )


def test_the_next_step_is_launched_before_the_last_steps_tokens_are_read(engine: Engine) -> None:
    events = record_events(engine)
    engine.generate(Request("Why?", Base(), SamplingParams(max_tokens=5, ignore_eos=True)))
    assert events == ["execute", *["ahead", "result"] * 4, "result"]


def test_async_scheduling_gives_the_same_answers(engine: Engine, reference: Engine) -> None:
    events = record_events(engine)
    assert_same_outputs(engine.generate(make_requests()), reference.generate(make_requests()))
    assert events.count("ahead") > 30
    assert is_idle(engine)


def test_replayed_graph_steps_use_the_previous_steps_tokens(
    tiny_folder: Path, reference: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.engine.core.builder.select_backend", lambda *_: REFERENCE_BACKEND)
    engine = open_engine(tiny_folder)
    core = get_core(engine)
    core.async_scheduling = True
    with inference_context():
        core.runner.cuda_graphs = CUDAGraphRunner(core.runner.model, core.runner.cache, 12, 512, fake_capture)  # type: ignore[arg-type]
    events = record_events(engine)
    for one, other in zip(engine.generate(make_requests()), reference.generate(make_requests()), strict=True):
        assert (one.error, one.token_ids) == (None, other.token_ids)
    assert events.count("ahead") > 30


def test_tokens_computed_after_the_end_of_an_answer_are_dropped(engine: Engine, reference: Engine) -> None:
    """One request ends by a stop token; its blocks and row go to a new one, and another continues."""
    ending = SamplingParams(
        max_tokens=20, min_tokens=4, logit_bias={FAVORED_TOKEN: 1e4}, stop_token_ids=(FAVORED_TOKEN,)
    )
    requests = [
        Request("Why?", Mato([KIND, SHORT]), ending),
        Request("What?", Amulet([KIND]), SamplingParams(max_tokens=30, ignore_eos=True)),
    ]
    later = Request("Who?", Opad([SHORT]), SamplingParams(max_tokens=12, ignore_eos=True))
    outputs = run_with_arrivals(engine, requests, {5: later})
    assert len(outputs[0].token_ids) == 5  # four tokens while the stop token is banned, then the stop token
    assert_same_outputs(outputs, [reference.generate(request) for request in (*requests, later)])
    assert is_idle(engine)


def run_with_arrivals(engine: Engine, requests: list[Request], arrivals: dict[int, Request]) -> list[Output]:
    """Outputs in the order of arrival; `arrivals` maps a step number to the request added before it."""
    core, groups = get_core(engine), list[SequenceGroup]()

    def add(request: Request) -> None:
        groups.extend(core.create_groups(request))
        core.scheduler.add(groups[-1])

    for request in requests:
        add(request)
    for step in range(200):
        if step in arrivals:
            add(arrivals[step])
        if not core.scheduler.idle:
            core.step()
    return [group.make_output(0.0) for group in groups]


def test_a_removed_request_frees_its_row_at_once(engine: Engine, reference: Engine) -> None:
    core = get_core(engine)
    gone, stays = (core.create_groups(request)[0] for request in make_requests()[1::2])
    for group in (gone, stays):
        core.scheduler.add(group)
    while len(gone.output_ids) < 6:
        core.step()
    core.scheduler.remove(gone)
    (comes,) = core.create_groups(make_requests()[2])
    core.scheduler.add(comes)
    while not core.scheduler.idle:
        core.step()
    assert len(gone.output_ids) == 6
    assert_same_outputs(
        [group.make_output(0.0) for group in (stays, comes)], reference.generate(make_requests()[3:1:-1])
    )
    assert is_idle(engine)


def test_a_step_of_removed_requests_is_discarded(engine: Engine) -> None:
    core, events = get_core(engine), record_events(engine)
    (group,) = core.create_groups(make_requests()[3])
    core.scheduler.add(group)
    core.step()
    assert events[-2:] == ["ahead", "result"]
    core.scheduler.remove(group)
    assert engine.generate(make_requests()[0]).error is None
    assert events.count("result") == events.count("ahead") + events.count("execute") - 1


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.2}, {"presence_penalty": 0.5}, {"frequency_penalty": -0.5}], ids=str
)
def test_requests_with_penalties_are_not_scheduled_ahead(
    engine: Engine, reference: Engine, penalty: dict[str, float]
) -> None:
    request = Request("Why?", Amulet([KIND]), SamplingParams(max_tokens=8, ignore_eos=True, **penalty))  # type: ignore[arg-type]
    events = record_events(engine)
    assert_same_outputs([engine.generate(request)], [reference.generate(request)])
    assert "ahead" not in events


def test_a_waiting_request_starts_as_soon_as_there_is_room(tiny_folder: Path, reference: Engine) -> None:
    engine = open_engine(tiny_folder, max_num_seqs=1)
    set_async_scheduling(engine)
    requests = [
        Request("Why?", Base(), SamplingParams(max_tokens=4, ignore_eos=True)),
        Request("What?", Base(), SamplingParams(max_tokens=4, ignore_eos=True)),
    ]
    events = record_events(engine)
    assert_same_outputs(engine.generate(requests), reference.generate(requests))
    # max_tokens tells that a step is the first request's last, so the next step starts the other request
    assert events == ["execute", *["ahead", "result"] * 3, "result"] * 2


def test_a_failed_launch_fails_only_the_running_requests(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, launch = get_core(engine), get_runner(engine).execute
    left = [3]

    def failing(scheduler_output: SchedulerOutput) -> InFlightStep:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("no more memory")
        return launch(scheduler_output)

    monkeypatch.setattr(core.runner, "execute", failing)
    with pytest.raises(RuntimeError, match="no more memory"):
        engine.generate(make_requests()[3])
    assert core._in_flight is None
    assert engine.generate(make_requests()[0]).error is None
    assert is_idle(engine)


def test_a_finished_group_is_not_referenced_by_the_next_step(engine: Engine) -> None:
    core, group_refs = get_core(engine), list[weakref.ref[SequenceGroup]]()
    admit = core.create_groups

    def record_groups(request: Request) -> list[SequenceGroup]:
        groups = admit(request)
        group_refs.extend(map(weakref.ref, groups))
        return groups

    core.create_groups = record_groups  # type: ignore[method-assign]
    ends = SamplingParams(max_tokens=50, logit_bias={FAVORED_TOKEN: 1e4}, stop_token_ids=(FAVORED_TOKEN,))
    assert len(engine.generate(Request("Why?", Base(), ends)).token_ids) == 1
    gc.collect()
    assert [group() for group in group_refs] == [None]


def test_leaving_after_a_failed_step_frees_no_other_requests_row(engine: Engine, reference: Engine) -> None:
    """A stream whose step failed is read to its end after other requests have started."""
    core, launch = get_core(engine), get_runner(engine).execute

    def make_request(seed: int) -> Request:
        sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True)
        return Request("Why? " * seed, Base(), sampling)

    def failing(scheduler_output: SchedulerOutput) -> InFlightStep:
        raise RuntimeError("no more memory")

    one, two = engine.stream(make_request(1)), engine.stream(make_request(2))
    next(one)
    next(two)
    core.runner.execute = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        list(one)
    core.runner.execute = launch  # type: ignore[method-assign]
    three, four = engine.stream(make_request(3)), engine.stream(make_request(4))
    next(three)
    next(four)
    list(two)
    five = engine.stream(make_request(5))
    next(five)
    assert len({group.state_row for group in core.scheduler.running}) == 3
    outputs = [list(stream)[-1].output for stream in (three, four, five)]
    assert_same_outputs(
        [output for output in outputs if output],
        [reference.generate(make_request(seed)) for seed in (3, 4, 5)],
    )
