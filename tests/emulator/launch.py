"""PTX emulator: compile Triton launches for a GPU and execute the PTX with numpy.

    launch -> ptx          compile a launch, and parse its PTX into basic blocks
    machine                runs the blocks for all threads of many programs at once
      arithmetic           instructions of single threads
      warps, tensor_cores  warp-level instructions; tensor-core products
      memory               tensors of the launch, checked for bounds, alignment and races; shared memory

Triton's interpreter runs the source; this runs the compiled code: bfloat16 tensor-core products, layouts,
vector accesses, shared memory. Instructions that no kernel here uses raise NotImplementedError.

Memory is always in order and copies complete immediately, so that missing barriers or waits go undetected.
Time is not modelled.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from trimtab.kernels.specs.aot_compile import (
    KernelVariant,
    bind_arguments,
    compile_variant,
    patch_launch,
    variant_from_launch,
)

from .machine import Machine
from .memory import PROGRAM_MASK, GlobalMemory, MemoryFaultError
from .ptx import Kernel, parse_kernel

MAX_THREADS = 1 << 13
"""Threads emulated at a time, so that their registers stay in the CPU cache."""


class Emulator:
    """Kernels of one architecture, each compiled and parsed once.

    instructions: number of warp instructions executed, by kernel. launches: number of launches, by kernel.
    """

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.instructions, self.launches = Counter[str](), Counter[str]()
        self.kernels = dict[tuple[Any, ...], tuple[Kernel, int]]()

    def launch(
        self, kernel_function: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any
    ) -> None:
        values = bind_arguments(kernel_function, args, kwargs)
        variant = variant_from_launch(kernel_function, args, kwargs)
        kernel, shared = self._kernel(variant)
        tensors = GlobalMemory([value for value in values.values() if isinstance(value, Tensor)])
        param_bits = [
            _param_bits(values[name]) for name in kernel_function.arg_names if name in variant.types
        ]
        param_bits += [0] * (len(kernel.params) - len(param_bits))  # the compiler's scratch memory: empty
        grid_size = tuple(grid(values) if callable(grid) else grid)
        grid_size += (1,) * (3 - len(grid_size))
        programs = np.array(list(itertools.product(*map(range, reversed(grid_size)))))[:, ::-1]
        assert len(programs) <= PROGRAM_MASK, "too many programs"
        programs_at_once = max(1, MAX_THREADS // kernel.threads)
        self.launches[variant.kernel_name] += 1
        try:
            for first in range(0, len(programs), programs_at_once):
                batch, params = (
                    programs[first : first + programs_at_once],
                    dict(zip(kernel.params, param_bits, strict=True)),
                )
                machine = Machine(kernel, tensors, params, grid_size, batch, first, shared)
                machine.run()
                self.instructions[variant.kernel_name] += machine.num_issued
            tensors.check_races()
        except MemoryFaultError as fault:
            raise MemoryFaultError(f"{variant.kernel_name} {variant.label}: {fault}") from None

    def _kernel(self, variant: KernelVariant) -> tuple[Kernel, int]:
        compiled_kernel = self.kernels.get(variant.cache_key)
        if compiled_kernel is None:
            code = compile_variant(variant, self.arch)
            compiled_kernel = self.kernels[variant.cache_key] = (
                parse_kernel(code.asm["ptx"]),
                code.metadata.shared,
            )
        return compiled_kernel


def _param_bits(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return int(np.float32(value).view(np.uint32)) if isinstance(value, float) else int(value)


@contextmanager
def emulate(arch: str) -> Iterator[Emulator]:
    """Within the context, run kernel launches as compiled for `arch`, on the memory of this process."""
    emulator = Emulator(arch)

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        emulator.launch(kernel, *args, **kwargs)

    with patch_launch(launch):
        yield emulator
