"""These tests launch kernels, on a GPU or interpreted: Triton is told so before it is imported.

Without either they are not collected; `tools/test` runs them in a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

LAUNCHING = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if LAUNCHING else ["test_*.py"]


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors are filled with NaN, and those of integers with their largest value."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
