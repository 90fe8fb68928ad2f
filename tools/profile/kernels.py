"""`trimtab profile kernels`: resources of the Triton kernels on each GPU, from their compiled code."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ...engine.utils.json import dumps
from ...kernels.common.errors import InputError
from ..cli.terminal import is_tty
from ..common.datasheets import DATA_SHEETS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from ..cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Compile every kernel for every target, a few seconds each the first time, and print its resources."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise InputError("TRITON_INTERPRET is 1, so kernels are interpreted, not compiled; unset it")
    kernels, cases = _kernel_rows(), _case_rows()
    if args.json:
        print(dumps({"kernels": kernels, "cases": cases}))
        return 0
    console = Console(width=None if is_tty() else 160)
    console.print(_make_table("Compiled code, per thread and program", kernels))
    console.print(_make_table("Minimum time at the peak memory bandwidth, microseconds", cases))
    return 0


def _kernel_rows() -> list[dict[str, Any]]:
    """A row for each kernel, build and target."""
    try:
        from ...kernels.specs.aot_compile import TARGETS, compile_resources, variants_of  # noqa: PLC0415
        from ...kernels.specs.registry import SPECS  # noqa: PLC0415 - imports triton, which some machines lack
    except ModuleNotFoundError as error:
        raise InputError(f"profiling kernels needs the package {error.name}; install it first") from None
    return [
        {
            "kernel": f"{spec.name}.{build.kernel_name}",
            "build": build.label,
            "arch": arch,
            **vars(compile_resources(build, arch)),
        }
        for spec in SPECS
        for build in variants_of(spec)
        for arch in TARGETS
    ]


def _case_rows() -> list[dict[str, Any]]:
    """A row for each benchmark shape: the bytes that must move, and the minimum time for that."""
    from ...kernels.specs.registry import SPECS  # noqa: PLC0415

    return [
        {
            "kernel": spec.name,
            "case": case.name,
            "bytes": case.bytes,
            **{gpu.name: round(1e6 * case.bytes / gpu.bandwidth, 2) for gpu in DATA_SHEETS.values()},
        }
        for spec in SPECS
        for case in spec.cases
    ]


def _make_table(title: str, rows: Iterable[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for index, row in enumerate(rows):
        if index == 0:
            for name, value in row.items():
                table.add_column(name, justify="left" if isinstance(value, str) else "right")
        table.add_row(*(f"{v:.0%}" if name == "occupancy" else str(v) for name, v in row.items()))
    return table
