"""Kernels compiled ahead of time, without a GPU: what a launch compiles, and what its machine code takes.

Launches are recorded instead of made, so that what is compiled here is what a device compiles, with the same
types, constants and alignments. Needs triton, not interpreting (TRITON_INTERPRET is decided as it is
imported, and an interpreted function cannot be compiled).
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
TYPES = {
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
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}
"""Shared memory of a multiprocessor, bytes: NVIDIA's CUDA C++ Programming Guide, AMD's CDNA 3 ISA guide."""
WARPS = {"sm_80": 64, "sm_90": 64, "sm_100": 64, "gfx942": 32}
"""Warps that a multiprocessor holds at most; on gfx942 wavefronts, eight for each of four units."""


@dataclass(frozen=True)
class Build:
    """A jitted function as one launch has it compiled.

    types: the run-time parameters, as triton spells types. constants: constexprs, and integers that are 1.
    aligned: parameters that 16 divides. fusion: whether a product and a sum may be rounded as one.
    """

    function: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: frozenset[str]
    warps: int
    stages: int
    fusion: bool = True

    @property
    def kernel(self) -> str:
        name: str = self.function.__name__
        return name.removesuffix("_kernel")

    @property
    def variant(self) -> tuple[Any, ...]:
        """What Triton tells one compiled kernel from another by."""
        known = (*self.types.items(), *self.constants.items())
        return (self.kernel, *known, self.aligned, self.warps, self.stages, self.fusion)

    @property
    def name(self) -> str:
        """What sets it apart: the type of its first numbers, its constants, and the switches that are on."""
        numbers = next((kind for kind in self.types.values() if "f" in kind), "integers").removeprefix("*")
        switches = (
            name if value is True else f"{name}={value}"
            for name, value in self.constants.items()
            if name.isupper() and value is not False
        )
        return ", ".join((numbers, *switches, f"{self.warps} warps"))


@dataclass(frozen=True)
class Resources:
    """What compiled code takes: registers a thread, bytes of shared memory a program, bytes spilled a thread.

    occupancy: the share of a multiprocessor's warps that run at once.
    """

    registers: int
    shared: int
    spills: int
    occupancy: float


def builds_of(spec: KernelSpec) -> list[Build]:
    """What the launches of all cases compile, each once."""
    found: dict[tuple[Any, ...], Build] = {}
    for case in spec.cases:
        arguments = case.make(torch.device("cpu"), torch.Generator().manual_seed(0))
        with recorded() as builds:
            spec.launch(*arguments)
        for build in builds:
            found.setdefault(build.variant, build)
    return list(found.values())


@contextmanager
def recorded() -> Iterator[list[Build]]:
    """Within, launches are noted and not made; what they would write stays as it is."""
    builds: list[Build] = []

    def note(function: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        builds.append(build_of(function, args, more))

    with instead_of_launches(note):
        yield builds


@contextmanager
def instead_of_launches(run: Callable[..., None]) -> Iterator[None]:
    """Within, launches call this: the function, its arguments, `grid`, `warmup`, how it is launched."""
    launch = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = launch


def arguments_of(function: Any, args: tuple[Any, ...], more: dict[str, Any]) -> dict[str, Any]:
    """A launch's arguments by their names, and how it is launched."""
    return {**dict(zip(function.arg_names, args, strict=False)), **more}


def build_of(function: Any, args: tuple[Any, ...], more: dict[str, Any]) -> Build:
    """What a launch with these arguments compiles; `more` are those by name, and how it is launched."""
    values = arguments_of(function, args, more)
    types, constants, aligned = dict[str, str](), dict[str, Any](), set[str]()
    for param in function.params:
        value, free = values[param.name], not param.do_not_specialize
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1 and free):
            constants[param.name] = value
        elif isinstance(value, Tensor):
            types[param.name] = f"*{TYPES[value.dtype]}"
            aligned |= {param.name} if value.data_ptr() % 16 == 0 else set()
        elif isinstance(value, float):
            types[param.name] = "fp32"
        else:
            types[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned |= {param.name} if free and value % 16 == 0 else set()
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    said = [more.get(name, usual) for name, usual in options.items()]
    return Build(function, types, constants, frozenset(aligned), *said)


def compiled(build: Build, arch: str) -> CompiledKernel:
    """Machine code for one of `TARGETS`. Triton keeps what it compiled in its own cache."""
    place = {name: (index,) for index, name in enumerate(build.function.arg_names)}
    aligned = [name for name in place if name in build.aligned]  # in order: the cache knows code by its text
    source = ASTSource(
        fn=build.function,
        signature={name: build.types.get(name, "constexpr") for name in build.function.arg_names},
        constexprs={place[name]: value for name, value in build.constants.items()},
        attrs={place[name]: ALIGNED for name in aligned},
    )
    # contraction is on in triton 3.9 unless it is said, and off in 3.10
    options = {"num_warps": build.warps, "num_stages": build.stages, "enable_fp_fusion": build.fusion}
    return triton.compile(source, target=TARGETS[arch], options=options)


def compile_for(build: Build, arch: str) -> Resources:
    """What the code for one of `TARGETS` takes."""
    code = compiled(build, arch)
    shared = code.metadata.shared
    if arch.startswith("sm"):
        registers, spills = _cubin(code.asm["cubin"])
    else:
        text = code.asm["amdgcn"]
        registers = int(_number(r"\.vgpr_count:\s+(\d+)", text))
        spills = 4 * int(_number(r"\.vgpr_spill_count:\s+(\d+)", text))
    return Resources(registers, shared, spills, _occupancy(arch, registers, shared, build.warps))


def _cubin(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, by cuobjdump, which triton's wheel holds."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        said = subprocess.run(
            [tool, "--dump-resource-usage", file], check=True, capture_output=True, text=True
        ).stdout
    stack, local = int(_number(r"STACK:(\d+)", said)), int(_number(r"LOCAL:(\d+)", said))
    return int(_number(r"REG:(\d+)", said)), max(stack, local)


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern!r}")
    return found.group(1)


def _occupancy(arch: str, registers: int, shared: int, warps: int) -> float:
    """The share of a multiprocessor's warps that programs of this size fill.

    NVIDIA: 65,536 registers in lots of 256 a warp, 1 KiB of shared memory a program besides its own, 32
    programs. gfx942: 512 registers a lane of each of four units, in lots of 8.
    """
    if arch.startswith("sm"):
        by_registers = 65536 // (256 * math.ceil(32 * registers / 256))
        programs = min(32, by_registers // warps, SHARED[arch] // (shared + 1024))
    else:
        by_registers = 4 * min(8, 512 // (8 * math.ceil(max(registers, 1) / 8)))
        programs = min(by_registers // warps, SHARED[arch] // max(shared, 1))
    return min(1.0, programs * warps / WARPS[arch])
