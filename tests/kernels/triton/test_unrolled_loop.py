"""The published loop as one launch gives what its closed form and its literal reference give."""

from __future__ import annotations

import pytest
import torch
from trimtab.kernels.steering.closed_form import literal_loop, strength
from trimtab.kernels.triton.unrolled_loop import iterate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AMULET, MATO = (2.0, 2.0, 10.0, 60), (0.5, 1.0, 10.0, 80)


@pytest.mark.parametrize("loop", [AMULET, MATO, (0.3, 1.7, 4.0, 1)])
def test_iterating_is_the_closed_form_and_the_literal_loop(loop: tuple[float, float, float, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    base, anchor = (4 * torch.randn(3, 1031, generator=generator, dtype=torch.float64) for _ in range(2))
    base, anchor = base.log_softmax(-1), anchor.log_softmax(-1)
    found = iterate(base.to(DEVICE), anchor.to(DEVICE), *loop).cpu()
    closed, literal = base + strength(*loop) * (anchor - base), literal_loop(base, anchor, *loop)
    for expected in (closed, literal):
        difference = found.log_softmax(-1) - expected.log_softmax(-1)
        assert float(difference.abs().max()) <= 1e-11 * strength(*loop)
    single = iterate(base.float().to(DEVICE), anchor.float().to(DEVICE), *loop).cpu().double()
    assert float((single.log_softmax(-1) - closed.log_softmax(-1)).abs().max()) <= 1e-3


def test_what_cannot_be_iterated_is_refused() -> None:
    x = torch.zeros(2, 41)
    with pytest.raises(ValueError, match="one shape and one type"):
        iterate(x, x[:1], *AMULET)
    with pytest.raises(ValueError, match="must be float32 or float64"):
        iterate(x.half(), x.half(), *AMULET)
