"""GPU arithmetic that numpy lacks, on arrays of equal shape or 0-d arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Function = Callable[..., Array]

SMALLEST_NORMAL = np.finfo(np.float32).tiny


def flush_to_zero(x: Array) -> Array:
    """Replace float32 subnormals with zero of the same sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def bf16_to_f32(bits: Array) -> Array:
    """bfloat16 bits to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: Array) -> Array:
    """float32 to bfloat16 bits, rounded to nearest, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def pack_halves(high: Array, low: Array) -> Array:
    """Pack two 16-bit values into 32 bits."""
    return (high.astype(np.uint32) << np.uint32(16)) | low


def fma32(a: Array, b: Array, c: Array) -> Array:
    """FMA via float64: only the sum is rounded twice, which changes the last bit once in 2^29."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """FMA with the rounding errors of product (Dekker 1971) and sum (Knuth): mostly correctly rounded."""
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
    """Hardware estimate of a float64 reciprocal: the upper 32 bits."""
    bits = np.asarray(1.0 / x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
    return bits.view(np.float64)


def truncated_divide(a: Array, b: Array) -> Array:
    """Integer division that truncates toward zero, as in C."""
    magnitude = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -magnitude, magnitude).astype(a.dtype)


def multiply_high(a: Array, b: Array) -> Array:
    """Upper half of the product of integers of at most 32 bits."""
    wide_dtype = np.int64 if a.dtype.kind == "i" else np.uint64
    return ((a.astype(wide_dtype) * b.astype(wide_dtype)) >> wide_dtype(8 * a.itemsize)).astype(a.dtype)


def shift_left(a: Array, amount: Array) -> Array:
    """Left shift; 0 if the amount reaches the width."""
    width = 8 * a.itemsize
    return np.where(amount < width, a << np.minimum(amount, width - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Array, amount: Array) -> Array:
    """Right shift, arithmetic for signed types; only the sign remains if the amount reaches the width."""
    width = 8 * a.itemsize
    shifted = a >> np.minimum(amount, width - 1).astype(a.dtype)
    return np.where(amount < width, shifted, shifted >> a.dtype.type(1))


def extract_bits(a: Array, start: Array, length: Array) -> Array:
    """`length` bits from bit `start` on, sign-extended for signed types."""
    spare = 8 * a.itemsize - length.astype(np.int64)
    return (a << (spare - start).astype(a.dtype)) >> spare.astype(a.dtype)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """prmt: select four of eight bytes, b's after a's; bit 3 of a choice replicates the sign of the byte."""
    source, result = (b.astype(np.uint64) << np.uint64(32)) | a, np.uint32(0)
    for index in range(4):
        choice = (selector >> np.uint32(4 * index)) & np.uint32(15)
        byte = ((source >> (np.uint64(8) * (choice & np.uint32(7)))) & np.uint64(255)).astype(np.uint32)
        byte = np.where(choice & np.uint32(8), (byte >> np.uint32(7)) * np.uint32(255), byte)
        result = result | (byte << np.uint32(8 * index))
    return np.asarray(result)


def popcount(a: Array) -> Array:
    """Number of set bits."""
    bits = np.arange(8 * a.itemsize).astype(a.dtype)
    return ((a[..., None] >> bits) & a.dtype.type(1)).sum(-1).astype(np.uint32)


def round_to_int(x: Array, rounding: Function, dtype: np.dtype[Any], from_f64: bool) -> Array:
    """Round and clamp to an integer dtype; NaN becomes 0, from float64 or to 64 bits the top bit."""
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
