"""The unrolled-loop kernel against its closed form and the torch loop."""

from __future__ import annotations

import pytest
import torch
from trimtab.kernels.steering.closed_form import strength
from trimtab.kernels.steering.closed_form import unrolled_loop as unrolled_loop_reference
from trimtab.kernels.triton.unrolled_loop import unrolled_loop

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AMULET, MATO = (2.0, 2.0, 10.0, 60), (0.5, 1.0, 10.0, 80)


@pytest.mark.parametrize("loop", [AMULET, MATO, (0.3, 1.7, 4.0, 1)])
def test_the_unrolled_loop_matches_the_closed_form_and_the_torch_loop(
    loop: tuple[float, float, float, int],
) -> None:
    generator = torch.Generator().manual_seed(0)
    base, anchor = (4 * torch.randn(3, 1031, generator=generator, dtype=torch.float64) for _ in range(2))
    base, anchor = base.log_softmax(-1), anchor.log_softmax(-1)
    result = unrolled_loop(base.to(DEVICE), anchor.to(DEVICE), *loop).cpu()
    closed, literal = base + strength(*loop) * (anchor - base), unrolled_loop_reference(base, anchor, *loop)
    for expected in (closed, literal):
        difference = result.log_softmax(-1) - expected.log_softmax(-1)
        assert float(difference.abs().max()) <= 1e-11 * strength(*loop)
    single = unrolled_loop(base.float().to(DEVICE), anchor.float().to(DEVICE), *loop).cpu().double()
    assert float((single.log_softmax(-1) - closed.log_softmax(-1)).abs().max()) <= 1e-3


def test_unsupported_inputs_of_the_unrolled_loop_are_refused() -> None:
    x = torch.zeros(2, 41)
    with pytest.raises(ValueError, match="the same shape and dtype"):
        unrolled_loop(x, x[:1], *AMULET)
    with pytest.raises(ValueError, match="must be float32 or float64"):
        unrolled_loop(x.half(), x.half(), *AMULET)
