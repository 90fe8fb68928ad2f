"""What all tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from trimtab.models.pull import pull_demo

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo model's folder: fetched once a machine, then read from the cache."""
    return pull_demo()
