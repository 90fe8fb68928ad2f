"""Fake CUDA graph capture for machines without a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def fake_capture(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A fake captured step: each replay writes its result to the same tensor."""
    hidden = step()

    def replay() -> torch.Tensor:
        hidden.copy_(step())
        return hidden

    return replay
