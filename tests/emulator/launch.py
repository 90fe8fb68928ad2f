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
from trimtab.kernels.specs.aot_compile import Build, arguments_of, build_of, compiled, instead_of_launches

from .machine import Machine
from .memory import MOST, FaultError, Tensors
from .ptx import Kernel, read

LANES = 1 << 13
"""Threads at a time: their registers stay in a core's cache."""


class Emulator:
    """Kernels of one architecture, each compiled and read once.

    issued: by kernel, instructions that warps carried out. launches: by kernel, how many.
    """

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.issued, self.launches = Counter[str](), Counter[str]()
        self.kernels = dict[tuple[Any, ...], tuple[Kernel, int]]()

    def launch(self, function: Any, *args: Any, grid: Any, warmup: bool = False, **more: Any) -> None:
        values = arguments_of(function, args, more)
        build = build_of(function, args, more)
        kernel, shared = self._kernel(build)
        tensors = Tensors([value for value in values.values() if isinstance(value, Tensor)])
        said = [_bits(values[name]) for name in function.arg_names if name in build.types]
        said += [0] * (len(kernel.params) - len(said))  # the compiler's own scratch memory: none
        size = tuple(grid(values) if callable(grid) else grid)
        size += (1,) * (3 - len(size))
        programs = np.array(list(itertools.product(*map(range, reversed(size)))))[:, ::-1]
        assert len(programs) <= MOST, "more programs than are told apart"
        lot = max(1, LANES // kernel.threads)
        self.launches[build.kernel] += 1
        try:
            for first in range(0, len(programs), lot):
                part, params = programs[first : first + lot], dict(zip(kernel.params, said, strict=True))
                machine = Machine(kernel, tensors, params, size, part, first, shared)
                machine.run()
                self.issued[build.kernel] += machine.issued
            tensors.settle()
        except FaultError as fault:
            raise FaultError(f"{build.kernel} {build.name}: {fault}") from None

    def _kernel(self, build: Build) -> tuple[Kernel, int]:
        found = self.kernels.get(build.variant)
        if found is None:
            code = compiled(build, self.arch)
            found = self.kernels[build.variant] = read(code.asm["ptx"]), code.metadata.shared
        return found


def _bits(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return int(np.float32(value).view(np.uint32)) if isinstance(value, float) else int(value)


@contextmanager
def emulated(arch: str) -> Iterator[Emulator]:
    """Within, kernels are launched on this process's memory, as machine code of that architecture."""
    emulator = Emulator(arch)

    def run(function: Any, *args: Any, **more: Any) -> None:
        emulator.launch(function, *args, **more)

    with instead_of_launches(run):
        yield emulator
