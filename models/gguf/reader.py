"""A GGUF file: its metadata as plain values, its tensors by name, read from the mapped file.

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. After the letters GGUF come a version, two
counts, the metadata as key, type and value, the tensors as name, shape, type and offset, and then their data.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...kernels.common.errors import InputError, RunError, cut, quoted, said
from ..common.config_reader import MAX_SIZE

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

MAGIC, VERSIONS = b"GGUF", (2, 3)
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
BOOL, STRING, ARRAY = 7, 8, 9
"""The types of metadata values."""
MAX_DIMENSIONS = 4
ALIGNMENT = 32
"""Tensors begin at multiples of it, unless the file says otherwise."""


def gguf_package() -> ModuleType:
    """The optional `gguf` package. Raises RunError when it is not installed."""
    try:
        import gguf  # noqa: PLC0415 - optional
    except ImportError:
        raise RunError("reading GGUF files needs the gguf package: pip install gguf") from None
    return gguf


@dataclass(frozen=True)
class Stored:
    """A tensor as the file holds it. `kind` is a GGMLQuantizationType, `data` its bytes, [rows, bytes]."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    data: np.ndarray

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the tensor in float32, [rows, columns]; a vector is one row.

        Raises InputError for a type that the `gguf` package cannot dequantise.
        """
        try:
            values = gguf_package().quants.dequantize(self.data[start:stop], self.kind)
        except NotImplementedError:
            raise InputError(
                f"tensor {quoted(self.name)} is of type {self.kind.name}, which the gguf package here cannot "
                "read; a type like Q4_0, Q8_0 or F16 would do"
            ) from None
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))


class GGUFFile:
    """An opened file. `metadata` is by key; numbers in arrays stay in the mapped file until `get` is asked.

    Raises InputError when the file is none, is cut short or damaged; RunError without the `gguf` package.
    """

    def __init__(self, path: Path) -> None:
        package, mapped = gguf_package(), _mapped(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Stored] = {}
        try:
            self._read(_Cursor(mapped, len(MAGIC)), package)
        except (ValueError, OverflowError) as error:
            raise InputError(
                f"{str(path)!r} is no whole GGUF file, it is cut short or damaged: {said(error)}"
            ) from error

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key as plain Python."""
        value = self.metadata.get(key, default)
        return value.tolist() if isinstance(value, np.ndarray) else value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 to MAX_SIZE. Raises InputError for anything else."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
            raise InputError(
                f"the GGUF file's {key} is {quoted(value)}; it must be a whole number from 1 to {MAX_SIZE}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0. Raises InputError for anything else."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise InputError(f"the GGUF file's {key} is {quoted(value)}; it must be a number above 0")
        return float(value)

    def text(self, key: str) -> str:
        """A text, empty when there is none. Raises InputError for anything else."""
        value = self.get(key, "")
        if not isinstance(value, str):
            raise InputError(f"the GGUF file's {key} is {quoted(value)}; it must be a text")
        return value

    def tokens(self) -> list[str]:
        """The vocabulary. Raises InputError when there is none."""
        tokens = self.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
            raise InputError("the GGUF file has no tokenizer.ggml.tokens; it must hold the vocabulary")
        return tokens

    def token_id(self, name: str) -> int | None:
        """The id of a special token such as "bos". Raises InputError when it is beyond the vocabulary."""
        key, last = f"tokenizer.ggml.{name}_token_id", len(self.tokens()) - 1
        value = self.get(key)
        if value is not None and (not isinstance(value, int) or not 0 <= value <= last):
            raise InputError(f"the GGUF file's {key} is {quoted(value)}; it must be from 0 to {last}")
        return value

    def _read(self, cursor: _Cursor, package: ModuleType) -> None:
        version = cursor.number("<I")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}; known are {', '.join(map(str, VERSIONS))}")
        tensors, keys = cursor.number("<Q"), cursor.number("<Q")
        for _ in range(keys):
            key = cursor.string()
            if key in self.metadata:
                raise ValueError(f"the key {quoted(key)} is there twice")
            self.metadata[key] = cursor.value(cursor.number("<I"))
        found = [_Tensor.read(cursor, package) for _ in range(tensors)]
        alignment = self.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {quoted(alignment)}")
        cursor.position += -cursor.position % alignment
        for tensor in found:
            if tensor.name in self.tensors:
                raise ValueError(f"the tensor {quoted(tensor.name)} is there twice")
            self.tensors[tensor.name] = tensor.stored(cursor)


def _mapped(path: Path) -> mmap.mmap:
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read as a GGUF file: {error}") from None
    raise InputError(f"{str(path)!r} is not a GGUF file; such a file begins with the letters GGUF")


@dataclass(frozen=True)
class _Tensor:
    """What the file says of a tensor; the data lie `offset` bytes behind the place where all data begin."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    row_bytes: int
    offset: int

    @classmethod
    def read(cls, cursor: _Cursor, package: ModuleType) -> _Tensor:
        name, count = cursor.string(), cursor.number("<I")
        if not 1 <= count <= MAX_DIMENSIONS:
            raise ValueError(f"the tensor {quoted(name)} has {count} dimensions")
        shape = tuple(cursor.number("<Q") for _ in range(count))[::-1]  # rows before columns
        kind = package.GGMLQuantizationType(cursor.number("<I"))
        block, size = package.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(f"a row of the tensor {quoted(name)} is {shape[-1]}, not in blocks of {block}")
        return cls(name, shape, kind, shape[-1] // block * size, cursor.number("<Q"))

    def stored(self, data: _Cursor) -> Stored:
        rows = math.prod(self.shape[:-1])
        whole = data.bytes_at(data.position + self.offset, rows * self.row_bytes, self.name)
        return Stored(self.name, self.shape, self.kind, whole.reshape(rows, self.row_bytes))


class _Cursor:
    """A place in the mapped file. It raises ValueError rather than read beyond the end."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data, self.position = data, position

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def string(self) -> str:
        return str(self._take(self.number("<Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == BOOL:
            return bool(self._take(1)[0])
        if kind in NUMBERS:
            return self._array(NUMBERS[kind], 1)[0].item()
        if kind != ARRAY:
            raise ValueError(f"a value of the unknown type {kind}")
        inner, count = self.number("<I"), self.number("<Q")
        if inner == STRING:
            return [self.string() for _ in range(count)]
        if inner != BOOL and inner not in NUMBERS:
            raise ValueError(f"an array of the type {inner}")
        return self._array("?" if inner == BOOL else NUMBERS[inner], count)

    def bytes_at(self, position: int, count: int, what: str = "") -> np.ndarray:
        """Bytes of the file, uncopied."""
        if position + count > len(self._data):
            raise ValueError(f"{cut(what) or f'byte {position}'} and what follows are missing")
        return np.frombuffer(self._data, np.uint8, count, position)

    def _array(self, dtype: str, count: int) -> np.ndarray:
        data = self.bytes_at(self.position, count * np.dtype(dtype).itemsize)
        self.position += data.nbytes
        return data.view(dtype)

    def _take(self, count: int) -> bytes:
        taken = self._data[self.position : self.position + count]
        if len(taken) < count:
            raise ValueError(f"byte {self.position} and what follows are missing")
        self.position += count
        return taken
