"""How near a kernel's results are to those of its reference, as the kernels' tests ask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels.steering.state import Groups
from ...kernels.steering.step import Choice

ULP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
ROUNDINGS = 4
"""Roundings of the result's type that a number may be away from the truth."""
AGREEING = 0.9
"""The share of tokens that must be the reference's: the rest may be near ties."""

NEAR = {
    "weights": (1e-4, 1e-5),
    "rewards": (1e-4, 1e-4),
    "strength": (2e-3, 1e-4),
    "kl": (2e-2, 1e-4),
    "logprob": (1e-3, 1e-3),
    "branch_logprobs": (1e-4, 1e-3),
}
"""What a steering step tells: the relative error that is allowed, and the least that is whatever the size."""


def widened(value: Any) -> Any:
    """The same arguments in float64, as far as they are tensors, or values made of tensors."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    if is_dataclass(value) and not isinstance(value, type | Groups):
        held = {each.name: widened(getattr(value, each.name)) for each in fields(value)}
        return replace(value, **held)
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a result or of arguments, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)


def difference(got: Any, rough: Any, exact: Any, least: float = 1e-5) -> tuple[float, str]:
    """(the largest error over what is allowed, what is wrong or ""), for tensors one by one.

    exact: the reference in float64. rough: the reference as it is, of which twice the error is allowed, and
    `least` and some roundings more.
    """
    worst, wrong = 0.0, ""
    for index, (ours, single, truth) in enumerate(zip(*map(tensors, (got, rough, exact)), strict=True)):
        if ours.shape != truth.shape:
            return float("inf"), f"result {index} has shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
        if not ours.is_floating_point():
            share = float(torch.equal(ours, truth.to(ours.dtype))) if ours.numel() else 1.0
            worst, wrong = (worst, wrong) if share else (float("inf"), f"integers of result {index} differ")
            continue
        ulp = max(ULP[ours.dtype], ULP[single.dtype])
        ratio = _ratio(ours.double(), single.double(), truth.double(), ulp, least)
        worst = max(worst, ratio)
        if not ratio <= 1:
            wrong = wrong or f"result {index} is {ratio:.3g} times as far off as is allowed"
    return worst, wrong


def _ratio(ours: Tensor, single: Tensor, truth: Tensor, ulp: float, least: float) -> float:
    """The largest error over what is allowed of it; infinite where one is NaN and the other is not."""
    if not ours.numel():
        return 0.0
    if not torch.equal(ours.isnan(), truth.isnan()):
        return float("inf")
    ours, single, truth = (x.nan_to_num(0.0, 0.0, 0.0) for x in (ours, single, truth))
    size = truth.abs() + truth.abs().mean()
    allowed = 2 * (single - truth).abs().max() + ROUNDINGS * ulp * size + least
    return float(((ours - truth).abs() / allowed).max())


def of_choices(got: Choice, truth: Choice, groups: Groups) -> tuple[float, str]:
    """As `difference`, for what a steering step chose: tokens, and the numbers of those that are the same."""
    same = got.tokens == truth.tokens
    agreeing = float(same.float().mean())
    wrong = "" if agreeing >= AGREEING else f"only {agreeing:.0%} of the tokens are the reference's"
    if bool((got.failed != truth.failed).any()):
        return float("inf"), "other requests failed than the reference's"
    worst, rows = 0.0, same[groups.owner]
    for name, (relative, least) in NEAR.items():
        there = rows if name == "branch_logprobs" else same
        ours, exact = (getattr(choice, name)[there].double() for choice in (got, truth))
        ratios = (ours - exact).abs() / (relative * exact.abs() + least)
        ratio = float(ratios.nan_to_num(0.0).max()) if ratios.numel() else 0.0  # NaN: not measured by one
        worst = max(worst, ratio)
        if not ratio <= 1:
            wrong = wrong or f"{name} is {ratio:.3g} times as far off as is allowed"
    return worst, wrong
