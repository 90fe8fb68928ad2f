"""Requests of a bench: lengths, seed, and which are steered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trimtab import InputError, Mato, Objective
from trimtab.tools.bench.workload import WorkloadConfig

METHOD = Mato((Objective("Be kind.", 0.7), Objective("Be brief.", 0.3)))


@given(share=st.floats(0, 1), count=st.integers(0, 200))
def test_any_prefix_of_the_requests_has_the_steered_share(share: float, count: int) -> None:
    workload = WorkloadConfig(steered_share=share)
    assert sum(workload.is_steered(index) for index in range(count)) == int(count * share)


def test_steered_requests_are_evenly_spaced() -> None:
    workload = WorkloadConfig(steered_share=0.5, input_len=3)
    requests = next(workload.request_batches(6, 100, METHOD))
    assert [request.steering.name for request in requests] == ["base", "mato"] * 3
    rows = [len(request.branch_token_ids or ()) for request in requests]
    assert rows == [1, 3] * 3
    assert workload.num_rows(6, METHOD) == sum(rows)


def test_prompts_have_the_requested_length_and_are_reproducible_by_seed() -> None:
    drawn, again, other = (
        WorkloadConfig(input_len=7, seed=seed).request_batches(3, 50, METHOD) for seed in (1, 1, 2)
    )
    first, second = next(drawn), next(drawn)
    assert first == next(again) != next(other)
    rows = [tuple(ids) for request in first + second for ids in request.branch_token_ids or ()]
    assert len(set(rows)) == len(rows) == 18
    assert all(len(row) == 7 and max(row) < 50 for row in rows)


@pytest.mark.parametrize(
    ("field", "value"), [("input_len", 0), ("output_len", 1), ("steered_share", 1.5), ("steered_share", -0.1)]
)
def test_an_invalid_workload_is_refused_by_field(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{field} is {value}"):
        WorkloadConfig(**{field: value})
