"""Memory-mapped safetensors checkpoints, single-file or sharded."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ...kernels.common.errors import MAX_ERROR_TEXT, InputError, error_text, short_repr, truncate
from ..common.json_files import require_file, require_small_file

if TYPE_CHECKING:
    from collections.abc import Mapping

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MAX_LISTED_NAMES = 8
"""Maximum names in an error; further ones are only counted."""


class Checkpoint:
    """The tensors of a model folder: `model.safetensors`, or the shards listed in its index.

    Opening reads only headers. `shapes` and `dtypes` (safetensors' names: F32, BF16, …) are by tensor name.
    A file may be a symbolic link, as in a cache, but the index must not name files outside the folder.
    Raises InputError when a file is missing, truncated, not in safetensors format, or outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        for path in _find_shard_files(folder):
            file = _open_safetensors(path)
            for name in file.keys():  # noqa: SIM118 - a safe_open handle is not a dict
                if name in self._files:
                    raise InputError(
                        f"tensor {short_repr(name)} is in {path.name!r} and in another file of the checkpoint"
                    )
                tensor_slice = file.get_slice(name)
                self.shapes[name], self.dtypes[name] = (
                    tuple(tensor_slice.get_shape()),
                    tensor_slice.get_dtype(),
                )
                self._files[name] = file

    def validate(
        self, expected: Mapping[str, tuple[int, ...]], ignored: frozenset[str] = frozenset()
    ) -> None:
        """Raises InputError, listing the differences, unless the checkpoint has exactly these tensors."""
        self._reject_dtypes(expected)
        mismatched = [
            f"{name} is {list(self.shapes[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if self.shapes.get(name, shape) != shape
        ]
        problems = [
            f"{title}: {_format_names(names)}"
            for title, names in (
                ("missing", [name for name in expected if name not in self.shapes]),
                (
                    "unexpected",
                    [name for name in self.shapes if name not in expected and name not in ignored],
                ),
                ("of the wrong shape", mismatched),
            )
            if names
        ]
        if problems:
            raise InputError(f"the checkpoint does not match its config.json; {'; '.join(problems)}")

    def get_tensor(self, name: str, slices: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The tensor as stored, or slices of it, memory-mapped on the CPU.

        Warns, with the name, when a value is infinite or NaN.
        """
        file = self._files[name]
        tensor: torch.Tensor = file.get_tensor(name) if slices is None else file.get_slice(name)[slices]
        if not is_finite(tensor):
            warn_non_finite(name)
        return tensor

    def _reject_dtypes(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Checked before names and shapes, since the dtypes best explain why a quantised checkpoint fails."""
        unsupported: dict[str, list[str]] = {}
        for name, dtype in self.dtypes.items():
            if name in expected and dtype not in DTYPES:
                unsupported.setdefault(dtype, []).append(name)
        if unsupported:
            listing = "; ".join(f"{dtype} ({_format_names(names)})" for dtype, names in unsupported.items())
            raise InputError(
                f"the checkpoint stores weights as {listing}; expected one of {', '.join(DTYPES)}"
            )


def torch_dtype(name: str) -> torch.dtype:
    """The torch.dtype of that name. Raises InputError for one that weights cannot be loaded in."""
    supported = DTYPES.values()
    if name not in supported:
        raise InputError(
            f"the checkpoint's dtype is {name!r}; expected one of {', '.join(supported)}, or set dtype"
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite, in one memory-bound pass without a copy."""
    return not tensor.numel() or all(math.isfinite(bound) for bound in torch.aminmax(tensor))


def warn_non_finite(name: str) -> None:
    """Warn only: the weights still load, as in other programs, since the affected row may never be used."""
    warnings.warn(f"tensor {short_repr(name)} has infinite or NaN values", stacklevel=3)


def _format_names(names: list[str]) -> str:
    num_more = len(names) - MAX_LISTED_NAMES
    return ", ".join(map(truncate, names[:MAX_LISTED_NAMES])) + (
        f" and {num_more} more" if num_more > 0 else ""
    )


def _find_shard_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not os.path.lexists(index):
        if not os.path.lexists(folder / SINGLE_FILE):
            raise InputError(f"{str(folder)!r} has neither {SINGLE_FILE} nor {INDEX_FILE}")
        return [require_file(folder / SINGLE_FILE)]
    require_small_file(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{str(index)!r} is not a shard index: {type(error).__name__} {error_text(error)}"
        ) from None
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
            raise InputError(
                f"{INDEX_FILE} names the shard {short_repr(name, MAX_ERROR_TEXT)}; it must be a file in "
                f"the same folder"
            )
        if not os.path.lexists(folder / name):
            raise InputError(
                f"{str(folder)!r} lacks the shard {short_repr(name, MAX_ERROR_TEXT)}, which its "
                f"{INDEX_FILE} names"
            )
    return [require_file(folder / name) for name in names]


def _open_safetensors(path: Path) -> Any:
    try:
        handle = safe_open(path, framework="pt", device="cpu")
        _reject_duplicate_names(path)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{str(path)!r} is truncated or not a safetensors file: {error_text(error)}"
        ) from None
    return handle


def _reject_duplicate_names(path: Path) -> None:
    """Raises ValueError for a duplicate name in the header, of which readers may use either entry.

    The library checks the rest: that the header is within the file and valid JSON, and that the tensors fill
    the file without overlaps or gaps.
    """

    def check_unique(pairs: list[tuple[str, Any]]) -> None:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("its header has a duplicate name")

    with path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=check_unique)
