"""What numpy lacks of a GPU's arithmetic; arrays of one shape, or of no dimension, in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Function = Callable[..., Array]

SMALLEST_NORMAL = np.finfo(np.float32).tiny


def flush_to_zero(x: Array) -> Array:
    """float32 in which numbers below the least normal one are zeros."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def bf16_to_f32(bits: Array) -> Array:
    """bfloat16, given by its bits, as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: Array) -> Array:
    """float32 as bfloat16's bits, to the nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def pack_halves(high: Array, low: Array) -> Array:
    """Two numbers of 16 bits in one of 32."""
    return (high.astype(np.uint32) << np.uint32(16)) | low


def fma32(a: Array, b: Array, c: Array) -> Array:
    """Exact in float64 but for the sum, which is rounded there first: a last bit moves once in 2^29."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """A product and what it rounds off (Dekker 1971), a sum and what it does (Knuth): mostly the nearest."""
    product = a * b
    (high_a, low_a), (high_b, low_b) = _dekker_split(a), _dekker_split(b)
    product_error = low_a * low_b - (((product - high_a * high_b) - low_a * high_b) - high_a * low_b)
    total = product + c
    added = total - product
    error = (product - (total - added)) + (c - added) + product_error
    return np.where(np.isfinite(error), total + error, total)


def _dekker_split(x: Array) -> tuple[Array, Array]:
    scaled = 134217729.0 * x
    high = scaled - (scaled - x)
    return high, x - high


def approx_reciprocal(x: Array) -> Array:
    """A float64's as hardware guesses it: the upper 32 bits."""
    bits = np.asarray(1.0 / x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
    return bits.view(np.float64)


def truncated_divide(a: Array, b: Array) -> Array:
    """Toward zero, as C divides."""
    magnitude = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -magnitude, magnitude).astype(a.dtype)


def multiply_high(a: Array, b: Array) -> Array:
    """Of a product; of numbers of at most 32 bits."""
    wide_dtype = np.int64 if a.dtype.kind == "i" else np.uint64
    return ((a.astype(wide_dtype) * b.astype(wide_dtype)) >> wide_dtype(8 * a.itemsize)).astype(a.dtype)


def shift_left(a: Array, amount: Array) -> Array:
    """Shifted; beyond the width nothing is left."""
    width = 8 * a.itemsize
    return np.where(amount < width, a << np.minimum(amount, width - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Array, amount: Array) -> Array:
    """Shifted; beyond the width only the sign is left."""
    width = 8 * a.itemsize
    shifted = a >> np.minimum(amount, width - 1).astype(a.dtype)
    return np.where(amount < width, shifted, shifted >> a.dtype.type(1))


def extract_bits(a: Array, start: Array, length: Array) -> Array:
    """So many bits from `start` on, the last of them the sign where there is one."""
    spare = 8 * a.itemsize - length.astype(np.int64)
    return (a << (spare - start).astype(a.dtype)) >> spare.astype(a.dtype)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """Four of eight bytes, b's after a's; with bit 3 of a choice the byte's sign eight times."""
    source, result = (b.astype(np.uint64) << np.uint64(32)) | a, np.uint32(0)
    for index in range(4):
        choice = (selector >> np.uint32(4 * index)) & np.uint32(15)
        byte = ((source >> (np.uint64(8) * (choice & np.uint32(7)))) & np.uint64(255)).astype(np.uint32)
        byte = np.where(choice & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(255), byte)
        result = result | (byte << np.uint32(8 * index))
    return np.asarray(result)


def popcount(a: Array) -> Array:
    """How many bits are set."""
    bits = np.arange(8 * a.itemsize).astype(a.dtype)
    return ((a[..., None] >> bits) & a.dtype.type(1)).sum(-1).astype(np.uint32)


def round_to_int(x: Array, rounding: Function, dtype: np.dtype[Any], from_f64: bool) -> Array:
    """The nearest that an integer type holds; NaN is 0, but from float64 or in 64 bits the uppermost bit."""
    nan_value = dtype.type(0)
    if from_f64 or dtype.itemsize == 8:
        nan_value = np.array(1 << (8 * dtype.itemsize - 1), f"u{dtype.itemsize}").view(dtype)
    is_nan = np.isnan(x)
    int_min, int_max = np.iinfo(dtype).min, np.iinfo(dtype).max
    x = rounding(np.nan_to_num(x.astype(np.float64), posinf=np.inf, neginf=-np.inf))
    in_range = np.where((x > int_min) & (x < int_max), x, 0.0).astype(dtype)
    clamped = np.where(
        x >= int_max, dtype.type(int_max), np.where(x <= int_min, dtype.type(int_min), in_range)
    )
    return np.where(is_nan, nan_value, clamped)
