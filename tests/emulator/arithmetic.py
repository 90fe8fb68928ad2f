"""Arithmetic PTX instructions as numpy functions, element-wise over threads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import gpu_math
from .gpu_math import Array, Function

PTX_DTYPES: Mapping[str, np.dtype[Any]] = {
    "pred": np.dtype(bool),
    **{f"{kind}{width}": np.dtype(f"u{width // 8}") for width in (8, 16, 32, 64) for kind in "bu"},
    **{f"s{width}": np.dtype(f"i{width // 8}") for width in (8, 16, 32, 64)},
    **{f"f{width}": np.dtype(f"f{width // 8}") for width in (16, 32, 64)},
    **{"bf16": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4")},
}
"""numpy dtypes of the PTX types; bfloat16 and packed pairs as raw bits."""

UNARY: Mapping[str, Function] = {
    "mov": np.array,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: np.reciprocal(np.sqrt(a)),
}
BINARY: Mapping[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
COMPARISONS: Mapping[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
RAW_BIT_TYPES = {"bf16", "bf16x2", "f16x2"}
"""Types with moves, comparisons and conversions only, no arithmetic."""
MODIFIERS = {
    *("rn", "approx", "full", "ftz", "lo", "hi", "wide", "relu"),
    *("rzi", "rmi", "rpi", "rni", *PTX_DTYPES),
    *COMPARISONS,
    *(f"{name}u" for name in COMPARISONS),
    *("num", "nan"),
}
"""Supported modifiers between the name and the type of an instruction."""
ROUNDINGS: Mapping[str, Function] = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}


@dataclass(frozen=True)
class Operation:
    """A numpy function with the PTX types of its sources and its result; see `PTX_DTYPES`."""

    function: Function
    source_types: tuple[str, ...]
    result_type: str


def make_operation(opcode: tuple[str, ...]) -> Operation | None:
    """The operation of an opcode; None if it is not pure arithmetic, or not supported."""
    name, modifiers, ptx_type = opcode[0], opcode[1:-1], opcode[-1]
    if not MODIFIERS.issuperset(modifiers) or (
        ptx_type in RAW_BIT_TYPES and name not in {"mov", "setp", "cvt"}
    ):
        return None
    if name == "setp":
        return Operation(_comparison(modifiers[0], ptx_type), (ptx_type, ptx_type), "pred")
    if name == "cvt":
        return _conversion(opcode)
    if name in {"mul", "mad"} and "wide" in modifiers:
        wide_type = f"{ptx_type[0]}{2 * int(ptx_type[1:])}"
        return Operation(
            _wide_multiply(wide_type), (ptx_type, ptx_type) + (wide_type,) * (name == "mad"), wide_type
        )
    special: dict[str, tuple[Function | None, tuple[str, ...]]] = {
        "mul.hi": (None if ptx_type.endswith("64") else gpu_math.multiply_high, (ptx_type, ptx_type)),
        "min.relu": (lambda a, b: np.maximum(np.minimum(a, b), a.dtype.type(0)), (ptx_type, ptx_type)),
        **dict.fromkeys(
            ("div.s16", "div.u16", "div.s32", "div.u32", "div.s64", "div.u64"),
            (gpu_math.truncated_divide, (ptx_type, ptx_type)),
        ),
        "rcp.approx.ftz.f64": (gpu_math.approx_reciprocal, (ptx_type,)),
        "shl": (gpu_math.shift_left, (ptx_type, "u32")),
        "shr": (gpu_math.shift_right, (ptx_type, "u32")),
        "bfe": (gpu_math.extract_bits, (ptx_type, "u32", "u32")),
        "prmt": (gpu_math.permute_bytes, (ptx_type,) * 3),
        "selp": (lambda a, b, predicate: np.where(predicate, a, b), (ptx_type, ptx_type, "pred")),
        "fma": ({"f32": gpu_math.fma32, "f64": gpu_math.fma64}.get(ptx_type), (ptx_type,) * 3),
        "mad.lo": (lambda a, b, c: a * b + c, (ptx_type,) * 3),
        "popc": (gpu_math.popcount, (ptx_type,)),
    }
    prefixes = (".".join(opcode[:length]) for length in range(len(opcode), 0, -1))
    default = (UNARY.get(name), (ptx_type,)) if name in UNARY else (BINARY.get(name), (ptx_type, ptx_type))
    function, sources = next((special[prefix] for prefix in prefixes if prefix in special), default)
    if function is None:
        return None
    return Operation(_with_ftz(function, modifiers), sources, "u32" if name == "popc" else ptx_type)


def _with_ftz(function: Function, modifiers: tuple[str, ...]) -> Function:
    """With .ftz, flush subnormal inputs and results to zero; float64 has no .ftz."""
    if "ftz" not in modifiers or function is gpu_math.approx_reciprocal:
        return function
    return lambda *sources: gpu_math.flush_to_zero(function(*map(gpu_math.flush_to_zero, sources)))


def _wide_multiply(ptx_type: str) -> Function:
    dtype = PTX_DTYPES[ptx_type]

    def multiply(a: Array, b: Array, *addend: Array) -> Array:
        result = np.multiply(a.astype(dtype), b.astype(dtype))
        return np.add(result, *addend) if addend else result

    return multiply


def _comparison(comparison: str, ptx_type: str) -> Function:
    """Unordered float comparisons (with suffix `u`) are true for NaN, ordered ones false."""
    is_float = ptx_type[0] == "f" or ptx_type == "bf16"

    def compare(a: Array, b: Array) -> Array:
        if ptx_type == "bf16":
            a, b = gpu_math.bf16_to_f32(a), gpu_math.bf16_to_f32(b)
        is_nan = np.isnan(a) | np.isnan(b) if is_float else np.array(False)
        if comparison in {"nan", "num"}:
            return is_nan if comparison == "nan" else ~is_nan
        if comparison in COMPARISONS:
            return COMPARISONS[comparison](a, b) & ~is_nan
        return COMPARISONS[comparison.removesuffix("u")](a, b) | is_nan

    return compare


def _conversion(opcode: tuple[str, ...]) -> Operation:
    result, source = (token for token in opcode if token in PTX_DTYPES)
    rounding = next((ROUNDINGS[part] for part in opcode if part in ROUNDINGS), None)
    scalar_type = {"bf16x2": "bf16", "f16x2": "f16"}.get(result, result)

    def convert(a: Array) -> Array:
        if source == "bf16":
            a = gpu_math.bf16_to_f32(a)
        if scalar_type == "bf16":
            return gpu_math.f32_to_bf16(a.astype(np.float32))
        if rounding is not None and PTX_DTYPES[scalar_type].kind in "iu":
            return gpu_math.round_to_int(a, rounding, PTX_DTYPES[scalar_type], source == "f64")
        return a.astype(PTX_DTYPES[scalar_type])

    if scalar_type == result:
        return Operation(convert, (source,), result)

    def convert_pair(a: Array, b: Array) -> Array:
        return gpu_math.pack_halves(convert(a).view(np.uint16), convert(b).view(np.uint16))

    return Operation(convert_pair, (source, source), result)
