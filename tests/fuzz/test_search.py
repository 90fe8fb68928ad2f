"""Fuzz search: damaged input works or is refused in a sentence, without a crash, hang or memory blowup."""

from __future__ import annotations

import pytest

from .search_runner import FormatSearch, run_searches
from .targets import TARGETS

FEW, MANY = 30, 1000
"""Inputs of each format."""


@pytest.fixture(scope="module")
def searches() -> dict[str, FormatSearch]:
    return {search.format: search for search in run_searches(TARGETS, 0, FEW)}


@pytest.mark.parametrize("format", TARGETS)
def test_a_damaged_input_works_or_is_refused_in_one_sentence(
    searches: dict[str, FormatSearch], format: str
) -> None:
    search = searches[format]
    assert not search.faults, "\n".join(search.faults[:5])
    assert search.outcomes["refused"] + search.outcomes["works"] == FEW
    assert search.outcomes["refused"], search


@pytest.mark.long
@pytest.mark.parametrize("format", TARGETS)
def test_each_of_a_thousand_damaged_inputs_works_or_is_refused(format: str) -> None:
    (search,) = run_searches([format], FEW, MANY)
    print(search)
    assert not search.faults, "\n".join(search.faults[:5])
    assert search.outcomes["refused"] > MANY // 10, search
    assert search.outcomes["works"] > MANY // 100, search
