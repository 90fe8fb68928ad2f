"""Ahead-of-time compilation of kernels, without a GPU: registers, shared memory and spills.

Launches are recorded instead of executed, so that a kernel is compiled exactly as on a device, with the same
types, constants and alignments. Needs triton without TRITON_INTERPRET, which triton reads at import: an
interpreted function cannot be compiled.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from .spec import KernelSpec

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TRITON_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
ALIGNED = [["tt.divisibility", 16]]
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}
"""Shared memory of a multiprocessor in bytes: NVIDIA's CUDA C++ Programming Guide, AMD's CDNA 3 ISA guide."""
MAX_WARPS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "gfx942": 32}
"""Maximum warps per multiprocessor; on gfx942 wavefronts, eight for each of four SIMD units."""


@dataclass(frozen=True)
class KernelVariant:
    """A jitted function as specialised for one launch.

    types: Triton type names of the run-time parameters. constants: constexprs, and integers equal to 1.
    aligned: parameters divisible by 16. fp_fusion: whether multiply-add may be fused, rounding once.
    """

    function: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str]
    num_warps: int
    num_stages: int
    fp_fusion: bool = True

    @property
    def kernel_name(self) -> str:
        name: str = self.function.__name__
        return name.removesuffix("_kernel")

    @property
    def cache_key(self) -> tuple[Any, ...]:
        """Everything that selects a compiled kernel in Triton."""
        specialization = (*self.types.items(), *self.constants.items())
        return (
            self.kernel_name,
            *specialization,
            self.aligned,
            self.num_warps,
            self.num_stages,
            self.fp_fusion,
        )

    @property
    def label(self) -> str:
        """Short description: the first floating-point type, constants, enabled flags, and warps."""
        float_type = next(
            (type_name for type_name in self.types.values() if "f" in type_name), "integers"
        ).removeprefix("*")
        flags = (
            name if value is True else f"{name}={value}"
            for name, value in self.constants.items()
            if name.isupper() and value is not False
        )
        return ", ".join((float_type, *flags, f"{self.num_warps} warps"))


@dataclass(frozen=True)
class Resources:
    """Resource usage: registers per thread, shared memory bytes per program, spilled bytes per thread.

    occupancy: resident warps as a fraction of a multiprocessor's maximum.
    """

    registers: int
    shared: int
    spills: int
    occupancy: float


def variants_of(spec: KernelSpec) -> list[KernelVariant]:
    """The distinct variants compiled by the launches of all cases."""
    variants: dict[tuple[Any, ...], KernelVariant] = {}
    for case in spec.cases:
        args = case.make_args(torch.device("cpu"), torch.Generator().manual_seed(0))
        with record_launches() as launches:
            spec.launch(*args)
        for variant in launches:
            variants.setdefault(variant.cache_key, variant)
    return list(variants.values())


@contextmanager
def record_launches() -> Iterator[list[KernelVariant]]:
    """Record kernel launches without executing them; their outputs are not written."""
    variants: list[KernelVariant] = []

    def record(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        variants.append(variant_from_launch(function, args, kwargs))

    with patch_launch(record):
        yield variants


@contextmanager
def patch_launch(fn: Callable[..., None]) -> Iterator[None]:
    """Replace kernel launches by fn(jitted function, *args, grid=…, warmup=…, **launch options)."""
    original = JITFunction.run
    JITFunction.run = fn
    try:
        yield
    finally:
        JITFunction.run = original


def bind_arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A launch's arguments by parameter name, together with its launch options."""
    return {**dict(zip(function.arg_names, args, strict=False)), **kwargs}


def variant_from_launch(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> KernelVariant:
    """The variant compiled by a launch; `kwargs` holds keyword arguments and launch options."""
    values = bind_arguments(function, args, kwargs)
    types, constants, aligned = dict[str, str](), dict[str, Any](), set[str]()
    for param in function.params:
        value, specialized = values[param.name], not param.do_not_specialize
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialized):
            constants[param.name] = value
        elif isinstance(value, Tensor):
            types[param.name] = f"*{TRITON_TYPES[value.dtype]}"
            aligned |= {param.name} if value.data_ptr() % 16 == 0 else set()
        elif isinstance(value, float):
            types[param.name] = "fp32"
        else:
            types[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned |= {param.name} if specialized and value % 16 == 0 else set()
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    launch_options = [kwargs.get(name, default) for name, default in options.items()]
    return KernelVariant(function, types, constants, frozenset(aligned), *launch_options)


def compile_variant(variant: KernelVariant, arch: str) -> CompiledKernel:
    """Compile a variant for one of `TARGETS`. Triton caches the result."""
    arg_path = {name: (index,) for index, name in enumerate(variant.function.arg_names)}
    # in parameter order: Triton's cache key depends on the order
    aligned = [name for name in arg_path if name in variant.aligned]
    source = ASTSource(
        fn=variant.function,
        signature={name: variant.types.get(name, "constexpr") for name in variant.function.arg_names},
        constexprs={arg_path[name]: value for name, value in variant.constants.items()},
        attrs={arg_path[name]: ALIGNED for name in aligned},
    )
    # set explicitly: the default of enable_fp_fusion is on in triton 3.9 and off in 3.10
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "enable_fp_fusion": variant.fp_fusion,
    }
    return triton.compile(source, target=TARGETS[arch], options=options)


def compile_resources(variant: KernelVariant, arch: str) -> Resources:
    """Compile a variant for one of `TARGETS` and measure its resource usage."""
    kernel = compile_variant(variant, arch)
    shared = kernel.metadata.shared
    if arch.startswith("sm"):
        registers, spills = _cubin_resources(kernel.asm["cubin"])
    else:
        asm = kernel.asm["amdgcn"]
        registers = int(_match_number(r"\.vgpr_count:\s+(\d+)", asm))
        spills = 4 * int(_match_number(r"\.vgpr_spill_count:\s+(\d+)", asm))
    return Resources(registers, shared, spills, _occupancy(arch, registers, shared, variant.num_warps))


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, from the cuobjdump in triton's wheel."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file], check=True, capture_output=True, text=True
        ).stdout
    stack_bytes, local_bytes = (
        int(_match_number(r"STACK:(\d+)", usage)),
        int(_match_number(r"LOCAL:(\d+)", usage)),
    )
    return int(_match_number(r"REG:(\d+)", usage)), max(stack_bytes, local_bytes)


def _match_number(pattern: str, report: str) -> str:
    match = re.search(pattern, report)
    if match is None:
        raise ValueError(f"no match for {pattern!r} in the compiler's report")
    return match.group(1)


def _occupancy(arch: str, registers: int, shared: int, num_warps: int) -> float:
    """Fraction of a multiprocessor's maximum warps that can be resident.

    NVIDIA: 65,536 registers, allocated in units of 256 per warp; 1 KiB of shared memory reserved per program;
    at most 32 programs. gfx942: 512 registers per lane of each of four SIMD units, in units of 8.
    """
    if arch.startswith("sm"):
        warps_by_registers = 65536 // (256 * math.ceil(32 * registers / 256))
        num_programs = min(32, warps_by_registers // num_warps, SHARED_MEMORY[arch] // (shared + 1024))
    else:
        warps_by_registers = 4 * min(8, 512 // (8 * math.ceil(max(registers, 1) / 8)))
        num_programs = min(warps_by_registers // num_warps, SHARED_MEMORY[arch] // max(shared, 1))
    return min(1.0, num_programs * num_warps / MAX_WARPS[arch])
