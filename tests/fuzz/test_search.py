"""Whatever strangers give works, or is refused in a sentence: no crash, no hang, no memory beyond measure."""

from __future__ import annotations

import pytest

from .search_runner import FormatSearch, run_searches
from .targets import TARGETS

FEW, MANY = 30, 1000
"""Inputs of each format."""


@pytest.fixture(scope="module")
def searches() -> dict[str, FormatSearch]:
    return {found.format: found for found in run_searches(TARGETS, 0, FEW)}


@pytest.mark.parametrize("format", TARGETS)
def test_a_damaged_input_works_or_is_refused_in_one_sentence(
    searches: dict[str, FormatSearch], format: str
) -> None:
    found = searches[format]
    assert not found.faults, "\n".join(found.faults[:5])
    assert found.outcomes["refused"] + found.outcomes["works"] == FEW
    assert found.outcomes["refused"], found


@pytest.mark.long
@pytest.mark.parametrize("format", TARGETS)
def test_each_of_a_thousand_damaged_inputs_works_or_is_refused(format: str) -> None:
    (found,) = run_searches([format], FEW, MANY)
    print(found)
    assert not found.faults, "\n".join(found.faults[:5])
    assert found.outcomes["refused"] > MANY // 10, found
    assert found.outcomes["works"] > MANY // 100, found
