"""Safetensors files as one set of named tensors, read one at a time from mapped files."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ...kernels.common.errors import SAID, InputError, cut, quoted, said
from ..common.json_files import readable, regular

if TYPE_CHECKING:
    from collections.abc import Mapping

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LISTED = 8
"""How many names an error lists before it counts the rest."""


class Checkpoint:
    """The tensors of a model folder: `model.safetensors`, or the shards that its index names.

    Opening reads only headers. `shapes` and `dtypes` (safetensors' names: F32, BF16, …) are by tensor name.
    A file of the folder may be a link, as in a cache, but the index may name nothing outside it.
    Raises InputError when a file is missing, truncated or no safetensors, or a shard lies elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        for path in _shards(folder):
            file = _open(path)
            for name in file.keys():  # noqa: SIM118 - a safe_open handle is no dict
                if name in self._files:
                    raise InputError(
                        f"tensor {quoted(name)} is in {path.name!r} and in another file of the checkpoint"
                    )
                view = file.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(view.get_shape()), view.get_dtype()
                self._files[name] = file

    def require(self, expected: Mapping[str, tuple[int, ...]], ignored: frozenset[str] = frozenset()) -> None:
        """Raises InputError unless the checkpoint has exactly these tensors, naming what does not fit."""
        self._refuse_types(expected)
        wrong = [
            f"{name} is {list(self.shapes[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if self.shapes.get(name, shape) != shape
        ]
        problems = [
            f"{title}: {_listed(names)}"
            for title, names in (
                ("missing", [name for name in expected if name not in self.shapes]),
                (
                    "unexpected",
                    [name for name in self.shapes if name not in expected and name not in ignored],
                ),
                ("of the wrong shape", wrong),
            )
            if names
        ]
        if problems:
            raise InputError(f"the checkpoint does not fit its config.json; {'; '.join(problems)}")

    def tensor(self, name: str, part: tuple[slice, ...] | None = None) -> torch.Tensor:
        """The tensor as stored, or a part of it, on the CPU; its pages come from the mapped file.

        Warns, with the name, of a number that is infinite or none.
        """
        file = self._files[name]
        tensor: torch.Tensor = file.get_tensor(name) if part is None else file.get_slice(name)[part]
        if not is_finite(tensor):
            warn_of_infinity(name)
        return tensor

    def _refuse_types(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Quantised checkpoints differ in many ways; their types say it best."""
        odd: dict[str, list[str]] = {}
        for name, dtype in self.dtypes.items():
            if name in expected and dtype not in DTYPES:
                odd.setdefault(dtype, []).append(name)
        if odd:
            stored = "; ".join(f"{dtype} ({_listed(names)})" for dtype, names in odd.items())
            raise InputError(f"the checkpoint stores weights as {stored}; known are {', '.join(DTYPES)}")


def torch_dtype(name: str) -> torch.dtype:
    """The type of that name; InputError for one that no weights are held in."""
    known = DTYPES.values()
    if name not in known:
        raise InputError(f"the checkpoint's dtype is {name!r}; known are {', '.join(known)}, or give dtype")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every number is; in one pass, at the speed of memory, without a copy."""
    return not tensor.numel() or all(math.isfinite(bound) for bound in torch.aminmax(tensor))


def warn_of_infinity(name: str) -> None:
    """Broken weights still load, as in other programs: they may be in a row that is never used."""
    warnings.warn(f"tensor {quoted(name)} has numbers that are infinite or none (NaN)", stacklevel=3)


def _listed(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(map(cut, names[:LISTED])) + (f" and {more} more" if more > 0 else "")


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not os.path.lexists(index):
        if not os.path.lexists(folder / SINGLE):
            raise InputError(f"{str(folder)!r} has neither {SINGLE} nor {INDEX}")
        return [regular(folder / SINGLE)]
    readable(index)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{str(index)!r} is no index of shards: {type(error).__name__} {said(error)}"
        ) from None
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
            raise InputError(
                f"{INDEX} names the shard {quoted(name, SAID)}; it must be a file in the same folder"
            )
        if not os.path.lexists(folder / name):
            raise InputError(f"{str(folder)!r} lacks the shard {quoted(name, SAID)}, which its {INDEX} names")
    return [regular(folder / name) for name in names]


def _open(path: Path) -> Any:
    try:
        handle = safe_open(path, framework="pt", device="cpu")
        _refuse_twins(path)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is truncated or no safetensors file: {said(error)}") from None
    return handle


def _refuse_twins(path: Path) -> None:
    """Raises ValueError for a name that is twice in the header, of which readers take one or the other.

    The library has checked all else: that the header is within the file and its JSON sound, and that the
    tensors fill the file without overlap or hole.
    """

    def unique(pairs: list[tuple[str, Any]]) -> None:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a name is in its header twice")

    with path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=unique)
