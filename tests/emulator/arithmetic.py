"""What one thread does by itself: which function of its numbers an instruction is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import gpu_math
from .gpu_math import Array, Function

TYPES: Mapping[str, np.dtype[Any]] = {
    "pred": np.dtype(bool),
    **{f"{kind}{width}": np.dtype(f"u{width // 8}") for width in (8, 16, 32, 64) for kind in "bu"},
    **{f"s{width}": np.dtype(f"i{width // 8}") for width in (8, 16, 32, 64)},
    **{f"f{width}": np.dtype(f"f{width // 8}") for width in (16, 32, 64)},
    **{"bf16": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4")},
}
"""How numpy holds what PTX calls a type; bfloat16, and two numbers in one, by their bits."""

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
COMPARED: Mapping[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
BY_BITS = {"bf16", "bf16x2", "f16x2"}
"""Of these there are comparisons and conversions here, and no arithmetic."""
MODES = {
    *("rn", "approx", "full", "ftz", "lo", "hi", "wide", "relu"),
    *("rzi", "rmi", "rpi", "rni", *TYPES),
    *COMPARED,
    *(f"{how}u" for how in COMPARED),
    *("num", "nan"),
}
"""What may stand between an instruction's name and its type; with anything else it is not known."""
ROUNDED: Mapping[str, Function] = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}


@dataclass(frozen=True)
class Operation:
    """sources: the types of what it takes. result: the type of what it gives. See `TYPES`."""

    function: Function
    sources: tuple[str, ...]
    result: str


def operation(opcode: tuple[str, ...]) -> Operation | None:
    """None: threads do it together, or with memory; or it is not known."""
    name, modes, kind = opcode[0], opcode[1:-1], opcode[-1]
    if not MODES.issuperset(modes) or (kind in BY_BITS and name not in {"mov", "setp", "cvt"}):
        return None
    if name == "setp":
        return Operation(_compared(modes[0], kind), (kind, kind), "pred")
    if name == "cvt":
        return _converted(opcode)
    if name in {"mul", "mad"} and "wide" in modes:
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        return Operation(_wide(wide), (kind, kind) + (wide,) * (name == "mad"), wide)
    special: dict[str, tuple[Function | None, tuple[str, ...]]] = {
        "mul.hi": (None if kind.endswith("64") else gpu_math.upper_half, (kind, kind)),
        "min.relu": (lambda a, b: np.maximum(np.minimum(a, b), a.dtype.type(0)), (kind, kind)),
        **dict.fromkeys(
            ("div.s16", "div.u16", "div.s32", "div.u32", "div.s64", "div.u64"),
            (gpu_math.quotient, (kind, kind)),
        ),
        "rcp.approx.ftz.f64": (gpu_math.rough_reciprocal, (kind,)),
        "shl": (gpu_math.left, (kind, "u32")),
        "shr": (gpu_math.right, (kind, "u32")),
        "bfe": (gpu_math.field, (kind, "u32", "u32")),
        "prmt": (gpu_math.permuted, (kind,) * 3),
        "selp": (lambda a, b, chosen: np.where(chosen, a, b), (kind, kind, "pred")),
        "fma": ({"f32": gpu_math.fma32, "f64": gpu_math.fma64}.get(kind), (kind,) * 3),
        "mad.lo": (lambda a, b, c: a * b + c, (kind,) * 3),
        "popc": (gpu_math.ones, (kind,)),
    }
    starts = (".".join(opcode[:length]) for length in range(len(opcode), 0, -1))
    plain = (UNARY.get(name), (kind,)) if name in UNARY else (BINARY.get(name), (kind, kind))
    function, sources = next((special[start] for start in starts if start in special), plain)
    if function is None:
        return None
    return Operation(_flushing(function, modes), sources, "u32" if name == "popc" else kind)


def _flushing(function: Function, modes: tuple[str, ...]) -> Function:
    """With .ftz what it takes and what it gives is flushed; of float64 there is no such."""
    if "ftz" not in modes or function is gpu_math.rough_reciprocal:
        return function
    return lambda *numbers: gpu_math.flushed(function(*map(gpu_math.flushed, numbers)))


def _wide(wide: str) -> Function:
    dtype = TYPES[wide]

    def product(a: Array, b: Array, *added: Array) -> Array:
        found = np.multiply(a.astype(dtype), b.astype(dtype))
        return np.add(found, *added) if added else found

    return product


def _compared(how: str, kind: str) -> Function:
    """Of floats, one with a `u` holds for NaN too, and one without does not."""
    floats = kind[0] == "f" or kind == "bf16"

    def compared(a: Array, b: Array) -> Array:
        if kind == "bf16":
            a, b = gpu_math.widened(a), gpu_math.widened(b)
        unknown = np.isnan(a) | np.isnan(b) if floats else np.array(False)
        if how in {"nan", "num"}:
            return unknown if how == "nan" else ~unknown
        if how in COMPARED:
            return COMPARED[how](a, b) & ~unknown
        return COMPARED[how.removesuffix("u")](a, b) | unknown

    return compared


def _converted(opcode: tuple[str, ...]) -> Operation:
    result, source = (part for part in opcode if part in TYPES)
    rounding = next((ROUNDED[part] for part in opcode if part in ROUNDED), None)
    single = {"bf16x2": "bf16", "f16x2": "f16"}.get(result, result)

    def one(a: Array) -> Array:
        if source == "bf16":
            a = gpu_math.widened(a)
        if single == "bf16":
            return gpu_math.narrowed(a.astype(np.float32))
        if rounding is not None and TYPES[single].kind in "iu":
            return gpu_math.whole(a, rounding, TYPES[single], source == "f64")
        return a.astype(TYPES[single])

    if single == result:
        return Operation(one, (source,), result)

    def both(a: Array, b: Array) -> Array:
        return gpu_math.paired(one(a).view(np.uint16), one(b).view(np.uint16))

    return Operation(both, (source, source), result)
