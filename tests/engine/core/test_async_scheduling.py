"""Steps that are launched before anybody knows what the one before them chose, as on a GPU; here on a CPU."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from trimtab.engine import Amulet, Base, Engine, Mato, Objective, Opad, Request, SamplingParams
from trimtab.engine.execution.cuda_graphs import DecodeGraphs
from trimtab.engine.execution.model_runner import plain_tensors
from trimtab.engine.sequence.sequence import Group
from trimtab.kernels.backend import PLAIN

from ...helpers.fake_graph import again
from ...helpers.tiny_model import at_rest

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.engine.execution.in_flight import Flight
    from trimtab.engine.outputs import Output
    from trimtab.engine.scheduling.scheduler import Plan
    from trimtab.kernels.steering.step import Choice

KIND, SHORT = Objective("Be kind."), Objective("Be short.", 2)
FAVOURED = 9
"""A token that is chosen wherever it may be."""


def open_engine(folder: Path, **fields: Any) -> Engine:
    return Engine.from_pretrained(str(folder), kv_cache_memory="1MiB", block_size=16, **fields)


@pytest.fixture
def engine(tiny_folder: Path) -> Engine:
    found = open_engine(tiny_folder)
    found._core.looks_ahead = True
    return found


@pytest.fixture
def reference(tiny_folder: Path) -> Engine:
    return open_engine(tiny_folder)


def watch(engine: Engine) -> list[str]:
    """What is launched and read from now on, in that order; steps whose tokens nobody knows are 'ahead'."""
    runner, events = engine._core.runner, list[str]()
    launch = runner.launch

    def launched(plan: Plan) -> Flight:
        events.append("ahead" if plan.follows else "launch")
        flight = launch(plan)
        land = flight.land

        def landed() -> Choice | None:
            events.append("land")
            return land()

        object.__setattr__(flight, "land", landed)
        return flight

    runner.launch = launched  # type: ignore[method-assign]
    return events


def requests() -> list[Request]:
    """Answers of several lengths, by all that the table of a request keeps between steps."""
    lengths = (3, 30, 9, 40)
    methods = (Amulet([KIND]), Mato([KIND, SHORT], kl_budget=0.2), Opad([SHORT]), Base())
    return [
        Request("Why? " * turn, method, SamplingParams(max_tokens=length, temperature=0.9, seed=turn))
        for turn, (method, length) in enumerate(zip(methods, lengths, strict=True), 1)
    ]


def same(found: list[Output], expected: list[Output]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.error is None
        assert (one.token_ids, one.text, one.trace) == (other.token_ids, other.text, other.trace)


def test_the_next_step_is_launched_before_the_last_ones_choice_is_read(engine: Engine) -> None:
    events = watch(engine)
    engine.generate(Request("Why?", Base(), SamplingParams(max_tokens=5, ignore_eos=True)))
    assert events == ["launch", *["ahead", "land"] * 4, "land"]


def test_answers_are_the_same(engine: Engine, reference: Engine) -> None:
    events = watch(engine)
    same(engine.generate(requests()), reference.generate(requests()))
    assert events.count("ahead") > 30
    assert at_rest(engine)


def test_replayed_steps_follow_one_another(
    tiny_folder: Path, reference: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.engine.core.builder.backend_of", lambda *_: PLAIN)
    engine = open_engine(tiny_folder)
    core = engine._core
    core.looks_ahead = True
    with plain_tensors():
        core.runner.graphs = DecodeGraphs(core.runner.model, core.runner.cache, 12, 512, again)  # type: ignore[arg-type]
    events = watch(engine)
    for one, other in zip(engine.generate(requests()), reference.generate(requests()), strict=True):
        assert (one.error, one.token_ids) == (None, other.token_ids)
    assert events.count("ahead") > 30


def test_what_an_ended_answer_would_have_gone_on_with_is_dropped(engine: Engine, reference: Engine) -> None:
    """One ends by a token that nobody foresaw; its pages and its row go to the next, and another goes on."""
    ending = SamplingParams(
        max_tokens=20, min_tokens=4, logit_bias={FAVOURED: 1e4}, stop_token_ids=(FAVOURED,)
    )
    asked = [
        Request("Why?", Mato([KIND, SHORT]), ending),
        Request("What?", Amulet([KIND]), SamplingParams(max_tokens=30, ignore_eos=True)),
    ]
    later = Request("Who?", Opad([SHORT]), SamplingParams(max_tokens=12, ignore_eos=True))
    found = run(engine, asked, {5: later})
    assert len(found[0].token_ids) == 5  # four that are not the end, which is banned, and the end
    same(found, [reference.generate(request) for request in (*asked, later)])
    assert at_rest(engine)


def run(engine: Engine, asked: list[Request], arriving: dict[int, Request]) -> list[Output]:
    """Answers, in the order in which requests came; `arriving` are added before the step of their number."""
    core, groups = engine._core, list[Group]()

    def add(request: Request) -> None:
        groups.extend(core.admit(request))
        core.scheduler.add(groups[-1])

    for request in asked:
        add(request)
    for step in range(200):
        if step in arriving:
            add(arriving[step])
        if not core.scheduler.idle:
            core.step()
    return [group.output(0.0) for group in groups]


def test_one_that_is_taken_out_leaves_its_place_at_once(engine: Engine, reference: Engine) -> None:
    core = engine._core
    gone, stays = (core.admit(request)[0] for request in requests()[1::2])
    for group in (gone, stays):
        core.scheduler.add(group)
    while len(gone.tokens) < 6:
        core.step()
    core.scheduler.remove(gone)
    (comes,) = core.admit(requests()[2])
    core.scheduler.add(comes)
    while not core.scheduler.idle:
        core.step()
    assert len(gone.tokens) == 6
    same([group.output(0.0) for group in (stays, comes)], reference.generate(requests()[3:1:-1]))
    assert at_rest(engine)


def test_a_step_that_nobody_waits_for_is_forgotten(engine: Engine) -> None:
    core, events = engine._core, watch(engine)
    (group,) = core.admit(requests()[3])
    core.scheduler.add(group)
    core.step()
    assert events[-2:] == ["ahead", "land"]
    core.scheduler.remove(group)
    assert engine.generate(requests()[0]).error is None
    assert events.count("land") == events.count("ahead") + events.count("launch") - 1


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 1.2}, {"presence_penalty": 0.5}, {"frequency_penalty": -0.5}], ids=str
)
def test_a_penalty_waits_for_the_tokens_that_it_is_about(
    engine: Engine, reference: Engine, penalty: dict[str, float]
) -> None:
    asked = Request("Why?", Amulet([KIND]), SamplingParams(max_tokens=8, ignore_eos=True, **penalty))  # type: ignore[arg-type]
    events = watch(engine)
    same([engine.generate(asked)], [reference.generate(asked)])
    assert "ahead" not in events


def test_who_waits_begins_as_soon_as_there_is_room(tiny_folder: Path, reference: Engine) -> None:
    engine = open_engine(tiny_folder, max_num_seqs=1)
    engine._core.looks_ahead = True
    asked = [
        Request("Why?", Base(), SamplingParams(max_tokens=4, ignore_eos=True)),
        Request("What?", Base(), SamplingParams(max_tokens=4, ignore_eos=True)),
    ]
    events = watch(engine)
    same(engine.generate(asked), reference.generate(asked))
    # the last step of the first is known to be its last: the next step is the other's first
    assert events == ["launch", *["ahead", "land"] * 3, "land"] * 2


def test_a_failed_launch_loses_what_ran_and_nothing_else(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, launch = engine._core, engine._core.runner.launch
    left = [3]

    def failing(plan: Plan) -> Flight:
        left[0] -= 1
        if not left[0]:
            raise RuntimeError("no more memory")
        return launch(plan)

    monkeypatch.setattr(core.runner, "launch", failing)
    with pytest.raises(RuntimeError, match="no more memory"):
        engine.generate(requests()[3])
    assert core._next is None
    assert engine.generate(requests()[0]).error is None
    assert at_rest(engine)


def test_an_answer_that_has_ended_is_not_kept_by_the_step_after_it(engine: Engine) -> None:
    core, kept = engine._core, list[weakref.ref[Group]]()
    admit = core.admit

    def noted(request: Request) -> list[Group]:
        groups = admit(request)
        kept.extend(map(weakref.ref, groups))
        return groups

    core.admit = noted  # type: ignore[method-assign]
    ends = SamplingParams(max_tokens=50, logit_bias={FAVOURED: 1e4}, stop_token_ids=(FAVOURED,))
    assert len(engine.generate(Request("Why?", Base(), ends)).token_ids) == 1
    gc.collect()
    assert [group() for group in kept] == [None]


def test_who_leaves_after_a_failed_step_takes_no_others_row(engine: Engine, reference: Engine) -> None:
    """A stream that the step has failed for is read to its end when others have begun."""
    core, launch = engine._core, engine._core.runner.launch

    def asked(seed: int) -> Request:
        sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True)
        return Request("Why? " * seed, Base(), sampling)

    def failing(plan: Plan) -> Flight:
        raise RuntimeError("no more memory")

    one, two = engine.stream(asked(1)), engine.stream(asked(2))
    next(one)
    next(two)
    core.runner.launch = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        list(one)
    core.runner.launch = launch  # type: ignore[method-assign]
    three, four = engine.stream(asked(3)), engine.stream(asked(4))
    next(three)
    next(four)
    list(two)
    five = engine.stream(asked(5))
    next(five)
    assert len({group.row for group in core.scheduler.running}) == 3
    found = [list(stream)[-1].output for stream in (three, four, five)]
    same([output for output in found if output], [reference.generate(asked(seed)) for seed in (3, 4, 5)])
