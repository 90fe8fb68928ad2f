"""What numpy lacks of a GPU's arithmetic; arrays of one shape, or of no dimension, in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Function = Callable[..., Array]

TINY = np.finfo(np.float32).tiny


def flushed(x: Array) -> Array:
    """float32 in which numbers below the least normal one are zeros."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def widened(bits: Array) -> Array:
    """bfloat16, given by its bits, as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(x: Array) -> Array:
    """float32 as bfloat16's bits, to the nearest, ties to even."""
    bits = x.view(np.uint32)
    found = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, found).astype(np.uint16)


def paired(high: Array, low: Array) -> Array:
    """Two numbers of 16 bits in one of 32."""
    return (high.astype(np.uint32) << np.uint32(16)) | low


def fma32(a: Array, b: Array, c: Array) -> Array:
    """Exact in float64 but for the sum, which is rounded there first: a last bit moves once in 2^29."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """A product and what it rounds off (Dekker 1971), a sum and what it does (Knuth): mostly the nearest."""
    product = a * b
    (high_a, low_a), (high_b, low_b) = _halves(a), _halves(b)
    lost = low_a * low_b - (((product - high_a * high_b) - low_a * high_b) - high_a * low_b)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back) + lost
    return np.where(np.isfinite(error), total + error, total)


def _halves(x: Array) -> tuple[Array, Array]:
    scaled = 134217729.0 * x
    high = scaled - (scaled - x)
    return high, x - high


def rough_reciprocal(x: Array) -> Array:
    """A float64's as hardware guesses it: the upper 32 bits."""
    bits = np.asarray(1.0 / x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
    return bits.view(np.float64)


def quotient(a: Array, b: Array) -> Array:
    """Toward zero, as C divides."""
    found = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -found, found).astype(a.dtype)


def upper_half(a: Array, b: Array) -> Array:
    """Of a product; of numbers of at most 32 bits."""
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return ((a.astype(wide) * b.astype(wide)) >> wide(8 * a.itemsize)).astype(a.dtype)


def left(a: Array, by: Array) -> Array:
    """Shifted; beyond the width nothing is left."""
    width = 8 * a.itemsize
    return np.where(by < width, a << np.minimum(by, width - 1).astype(a.dtype), a.dtype.type(0))


def right(a: Array, by: Array) -> Array:
    """Shifted; beyond the width only the sign is left."""
    width = 8 * a.itemsize
    moved = a >> np.minimum(by, width - 1).astype(a.dtype)
    return np.where(by < width, moved, moved >> a.dtype.type(1))


def field(a: Array, start: Array, length: Array) -> Array:
    """So many bits from `start` on, the last of them the sign where there is one."""
    spare = 8 * a.itemsize - length.astype(np.int64)
    return (a << (spare - start).astype(a.dtype)) >> spare.astype(a.dtype)


def permuted(a: Array, b: Array, chosen: Array) -> Array:
    """Four of eight bytes, b's after a's; with bit 3 of a choice the byte's sign eight times."""
    both, found = (b.astype(np.uint64) << np.uint64(32)) | a, np.uint32(0)
    for place in range(4):
        which = (chosen >> np.uint32(4 * place)) & np.uint32(15)
        byte = ((both >> (np.uint64(8) * (which & np.uint32(7)))) & np.uint64(255)).astype(np.uint32)
        byte = np.where(which & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(255), byte)
        found = found | (byte << np.uint32(8 * place))
    return np.asarray(found)


def ones(a: Array) -> Array:
    """How many bits are set."""
    bits = np.arange(8 * a.itemsize).astype(a.dtype)
    return ((a[..., None] >> bits) & a.dtype.type(1)).sum(-1).astype(np.uint32)


def whole(x: Array, rounding: Function, dtype: np.dtype[Any], double: bool) -> Array:
    """The nearest that an integer type holds; NaN is 0, but from float64 or in 64 bits the uppermost bit."""
    unknown = dtype.type(0)
    if double or dtype.itemsize == 8:
        unknown = np.array(1 << (8 * dtype.itemsize - 1), f"u{dtype.itemsize}").view(dtype)
    lost = np.isnan(x)
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    x = rounding(np.nan_to_num(x.astype(np.float64), posinf=np.inf, neginf=-np.inf))
    inside = np.where((x > least) & (x < most), x, 0.0).astype(dtype)
    found = np.where(x >= most, dtype.type(most), np.where(x <= least, dtype.type(least), inside))
    return np.where(lost, unknown, found)
