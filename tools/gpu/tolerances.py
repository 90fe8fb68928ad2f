"""Tolerances for comparing a kernel's results with its reference; also used by the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.steering.layout import RequestLayout
from ...kernels.steering.step import SamplerOutput

ULP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
MAX_ULPS = 4
"""Allowed error in units in the last place of the result's dtype."""
MIN_TOKEN_MATCH = 0.9
"""Fraction of tokens that must equal the reference's; the others may be near ties."""

TOLERANCES = {
    "weights": (1e-4, 1e-5),
    "rewards": (1e-4, 1e-4),
    "strength": (2e-3, 1e-4),
    "kl": (2e-2, 1e-4),
    "logprob": (1e-3, 1e-3),
    "branch_logprobs": (1e-4, 1e-3),
}
"""(rtol, atol) of a steering step's outputs."""


def to_float64(value: Any) -> Any:
    """Convert floating-point tensors to float64, also inside tuples and dataclasses."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(to_float64, value))
    if is_dataclass(value) and not isinstance(value, type | RequestLayout):
        converted = {field.name: to_float64(getattr(value, field.name)) for field in fields(value)}
        return replace(value, **converted)
    return value


def iter_tensors(value: Any) -> Iterator[Tensor]:
    """Yield all tensors of a result or of arguments, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from iter_tensors(item)


def compare_tensors(results: Any, references: Any, expected: Any, atol: float = 1e-5) -> tuple[float, str]:
    """Compare tensor by tensor; return (largest error / tolerance, failure message or "").

    expected: the reference in float64. references: the reference in its dtype. The tolerance is twice the
    error of `references`, plus `MAX_ULPS` roundings and `atol`.
    """
    worst, wrong = 0.0, ""
    for index, (result, reference, truth) in enumerate(
        zip(*map(iter_tensors, (results, references, expected)), strict=True)
    ):
        if result.shape != truth.shape:
            return float("inf"), f"result {index} has shape {tuple(result.shape)}, not {tuple(truth.shape)}"
        if not result.is_floating_point():
            is_equal = float(torch.equal(result, truth.to(result.dtype))) if result.numel() else 1.0
            worst, wrong = (
                (worst, wrong) if is_equal else (float("inf"), f"integers of result {index} differ")
            )
            continue
        ulp = max(ULP[result.dtype], ULP[reference.dtype])
        ratio = _error_ratio(result.double(), reference.double(), truth.double(), ulp, atol)
        worst = max(worst, ratio)
        if not ratio <= 1:
            wrong = wrong or f"the error of result {index} is {ratio:.3g} times the tolerance"
    return worst, wrong


def _error_ratio(result: Tensor, reference: Tensor, truth: Tensor, ulp: float, atol: float) -> float:
    """Largest error / tolerance; infinite if NaNs are not at the same indices."""
    if not result.numel():
        return 0.0
    if not torch.equal(result.isnan(), truth.isnan()):
        return float("inf")
    result, reference, truth = (x.nan_to_num(0.0, 0.0, 0.0) for x in (result, reference, truth))
    magnitude = truth.abs() + truth.abs().mean()
    allowed = 2 * (reference - truth).abs().max() + MAX_ULPS * ulp * magnitude + atol
    return float(((result - truth).abs() / allowed).max())


def compare_sampler_outputs(
    actual: SamplerOutput, expected: SamplerOutput, layout: RequestLayout
) -> tuple[float, str]:
    """As `compare_tensors`, for a steering step: tokens, and the other outputs where tokens are equal."""
    token_matches = actual.tokens == expected.tokens
    match_rate = float(token_matches.float().mean())
    wrong = (
        "" if match_rate >= MIN_TOKEN_MATCH else f"only {match_rate:.0%} of the tokens equal the reference's"
    )
    if bool((actual.failed != expected.failed).any()):
        return float("inf"), "the set of failed requests differs from the reference's"
    worst, row_matches = 0.0, token_matches[layout.request_of_row]
    for name, (rtol, atol) in TOLERANCES.items():
        mask = row_matches if name == "branch_logprobs" else token_matches
        values, expected_values = (getattr(output, name)[mask].double() for output in (actual, expected))
        ratios = (values - expected_values).abs() / (rtol * expected_values.abs() + atol)
        ratio = float(ratios.nan_to_num(0.0).max()) if ratios.numel() else 0.0  # NaN: not computed by both
        worst = max(worst, ratio)
        if not ratio <= 1:
            wrong = wrong or f"the error of {name} is {ratio:.3g} times the tolerance"
    return worst, wrong
