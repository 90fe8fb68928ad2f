"""Launches that are compiled as for a GPU and carried out here.

    launch -> ptx       a launch is compiled as for a GPU; its text is read into blocks of instructions
    machine             runs the blocks for all threads of many programs at once
      arithmetic        what one thread does by itself
      warps, matrices   what the threads of a warp do together; tensor cores
      memory            the tensors of the launch, with bounds, alignment and races checked; shared memory

Triton's interpreter runs the source; this runs what the compiler made of it: bfloat16 products of tensor
cores, layouts, vectors, shared memory. Instructions that no kernel here uses are not known: they raise.

Memory is always in order and copies are done at once, so that a barrier or a wait that the compiler forgot is
not missed here. Nothing is learned of time.
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
"""Threads at a time: their registers stay in a core's cache."""


class Emulator:
    """Kernels of one architecture, each compiled and read once.

    instructions: by kernel, instructions that warps carried out. launches: by kernel, how many.
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
        param_bits += [0] * (len(kernel.params) - len(param_bits))  # the compiler's own scratch memory: none
        grid_size = tuple(grid(values) if callable(grid) else grid)
        grid_size += (1,) * (3 - len(grid_size))
        programs = np.array(list(itertools.product(*map(range, reversed(grid_size)))))[:, ::-1]
        assert len(programs) <= PROGRAM_MASK, "more programs than are told apart"
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
    """Within, kernels are launched on this process's memory, as machine code of that architecture."""
    emulator = Emulator(arch)

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        emulator.launch(kernel, *args, **kwargs)

    with patch_launch(launch):
        yield emulator
