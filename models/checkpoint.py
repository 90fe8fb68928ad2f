"""Safetensors files as one set of named tensors, read one at a time from mapped files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..kernels.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LISTED = 8
"""How many names an error lists before it counts the rest."""


class Checkpoint:
    """The tensors of a model folder: `model.safetensors`, or the shards that its index names.

    Opening reads only headers. `shapes` and `dtypes` (safetensors' names: F32, BF16, …) are by tensor name.
    Raises InputError when a file is missing, truncated or no safetensors, or leaves the folder.
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
                        f"tensor {name!r} is in {path.name!r} and in another file of the checkpoint"
                    )
                view = file.get_slice(name)
                self.shapes[name], self.dtypes[name] = tuple(view.get_shape()), view.get_dtype()
                self._files[name] = file

    def require(self, expected: Mapping[str, tuple[int, ...]], ignored: frozenset[str] = frozenset()) -> None:
        """Raises InputError unless the checkpoint has exactly these tensors, naming what does not fit."""
        missing = [name for name in expected if name not in self.shapes]
        unexpected = [name for name in self.shapes if name not in expected and name not in ignored]
        wrong = [
            f"{name} is {list(self.shapes[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if self.shapes.get(name, shape) != shape
        ]
        odd = [f"{n} is {d}" for n, d in self.dtypes.items() if n in expected and d not in DTYPES]
        problems = [
            f"{title}: {_listed(names)}"
            for title, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of the wrong shape", wrong),
                (f"of a type other than {', '.join(DTYPES)}", odd),
            )
            if names
        ]
        if problems:
            raise InputError(f"the checkpoint does not fit its config.json; {'; '.join(problems)}")

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as stored, on the CPU; its pages come from the mapped file."""
        tensor: torch.Tensor = self._files[name].get_tensor(name)
        return tensor


def _listed(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise InputError(f"{str(folder)!r} has neither {SINGLE} nor {INDEX}")
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{str(index)!r} is no index of shards: {type(error).__name__} {error}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{INDEX} names the shard {name!r}; it must be a file in the same folder")
        if not (folder / name).exists():
            raise InputError(f"{str(folder)!r} lacks the shard {name!r}, which its {INDEX} names")
    return [folder / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{str(path)!r} is truncated or no safetensors file: {error}") from None
