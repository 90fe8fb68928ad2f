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

from ...kernels.common.errors import InputError, RunError, error_text, short_repr, truncate
from ..common.config_reader import MAX_SIZE

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

MAGIC, SUPPORTED_VERSIONS = b"GGUF", (2, 3)
NUMPY_DTYPES = {
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
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
"""Tensors begin at multiples of it, unless the file says otherwise."""


def import_gguf() -> ModuleType:
    """The optional `gguf` package. Raises RunError when it is not installed."""
    try:
        import gguf  # noqa: PLC0415 - optional
    except ImportError:
        raise RunError("reading GGUF files needs the gguf package: pip install gguf") from None
    return gguf


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as the file holds it. `ggml_type` is a GGMLQuantizationType, `data` its bytes, [rows,
    bytes].
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: Any
    data: np.ndarray

    def dequantize_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the tensor in float32, [rows, columns]; a vector is one row.

        Raises InputError for a type that the `gguf` package cannot dequantise.
        """
        try:
            values = import_gguf().quants.dequantize(self.data[start:stop], self.ggml_type)
        except NotImplementedError:
            raise InputError(
                f"tensor {short_repr(self.name)} is of type {self.ggml_type.name}, which the gguf package "
                f"here cannot "
                "read; a type like Q4_0, Q8_0 or F16 would do"
            ) from None
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))


class GGUFFile:
    """An opened file. `metadata` is by key; numbers in arrays stay in the mapped file until `get` is asked.

    Raises InputError when the file is none, is cut short or damaged; RunError without the `gguf` package.
    """

    def __init__(self, path: Path) -> None:
        package, mapped = import_gguf(), _open_mmap(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._parse(_Cursor(mapped, len(MAGIC)), package)
        except (ValueError, OverflowError) as error:
            raise InputError(
                f"{str(path)!r} is a corrupt GGUF file, cut short or damaged: {error_text(error)}"
            ) from error

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key as plain Python."""
        value = self.metadata.get(key, default)
        return value.tolist() if isinstance(value, np.ndarray) else value

    def get_size(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 to MAX_SIZE. Raises InputError for anything else."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
            raise InputError(
                f"the GGUF file's {key} is {short_repr(value)}; it must be a whole number from 1 to "
                f"{MAX_SIZE}"
            )
        return value

    def get_float(self, key: str, default: float | None = None) -> float:
        """A finite number above 0. Raises InputError for anything else."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise InputError(f"the GGUF file's {key} is {short_repr(value)}; it must be a number above 0")
        return float(value)

    def get_str(self, key: str) -> str:
        """A text, empty when there is none. Raises InputError for anything else."""
        value = self.get(key, "")
        if not isinstance(value, str):
            raise InputError(f"the GGUF file's {key} is {short_repr(value)}; it must be a text")
        return value

    def get_tokens(self) -> list[str]:
        """The vocabulary. Raises InputError when there is none."""
        tokens = self.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
            raise InputError("the GGUF file has no tokenizer.ggml.tokens; it must hold the vocabulary")
        return tokens

    def get_token_id(self, name: str) -> int | None:
        """The id of a special token such as "bos". Raises InputError when it is beyond the vocabulary."""
        key, max_id = f"tokenizer.ggml.{name}_token_id", len(self.get_tokens()) - 1
        value = self.get(key)
        if value is not None and (not isinstance(value, int) or not 0 <= value <= max_id):
            raise InputError(f"the GGUF file's {key} is {short_repr(value)}; it must be from 0 to {max_id}")
        return value

    def _parse(self, cursor: _Cursor, package: ModuleType) -> None:
        version = cursor.read_number("<I")
        if version not in SUPPORTED_VERSIONS:
            raise ValueError(f"its version is {version}; known are {', '.join(map(str, SUPPORTED_VERSIONS))}")
        num_tensors, num_keys = cursor.read_number("<Q"), cursor.read_number("<Q")
        for _ in range(num_keys):
            key = cursor.read_string()
            if key in self.metadata:
                raise ValueError(f"the key {short_repr(key)} is there twice")
            self.metadata[key] = cursor.read_value(cursor.read_number("<I"))
        tensor_infos = [_TensorInfo.from_cursor(cursor, package) for _ in range(num_tensors)]
        alignment = self.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {short_repr(alignment)}")
        cursor.position += -cursor.position % alignment
        for info in tensor_infos:
            if info.name in self.tensors:
                raise ValueError(f"the tensor {short_repr(info.name)} is there twice")
            self.tensors[info.name] = info.to_tensor(cursor)


def _open_mmap(path: Path) -> mmap.mmap:
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} cannot be read as a GGUF file: {error}") from None
    raise InputError(f"{str(path)!r} is not a GGUF file; such a file begins with the letters GGUF")


@dataclass(frozen=True)
class _TensorInfo:
    """What the file says of a tensor; the data lie `offset` bytes behind the place where all data begin."""

    name: str
    shape: tuple[int, ...]
    ggml_type: Any
    row_bytes: int
    offset: int

    @classmethod
    def from_cursor(cls, cursor: _Cursor, package: ModuleType) -> _TensorInfo:
        name, num_dims = cursor.read_string(), cursor.read_number("<I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise ValueError(f"the tensor {short_repr(name)} has {num_dims} dimensions")
        shape = tuple(cursor.read_number("<Q") for _ in range(num_dims))[::-1]  # rows before columns
        ggml_type = package.GGMLQuantizationType(cursor.read_number("<I"))
        block_size, type_size = package.GGML_QUANT_SIZES[ggml_type]
        if shape[-1] % block_size:
            raise ValueError(
                f"a row of the tensor {short_repr(name)} is {shape[-1]}, not in blocks of {block_size}"
            )
        return cls(name, shape, ggml_type, shape[-1] // block_size * type_size, cursor.read_number("<Q"))

    def to_tensor(self, cursor: _Cursor) -> GGUFTensor:
        num_rows = math.prod(self.shape[:-1])
        data = cursor.view_bytes(cursor.position + self.offset, num_rows * self.row_bytes, self.name)
        return GGUFTensor(self.name, self.shape, self.ggml_type, data.reshape(num_rows, self.row_bytes))


class _Cursor:
    """A place in the mapped file. It raises ValueError rather than read beyond the end."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data, self.position = data, position

    def read_number(self, fmt: str) -> int:
        return int(struct.unpack(fmt, self._read_bytes(struct.calcsize(fmt)))[0])

    def read_string(self) -> str:
        return str(self._read_bytes(self.read_number("<Q")), "utf-8")

    def read_value(self, value_type: int) -> Any:
        if value_type == STRING:
            return self.read_string()
        if value_type == BOOL:
            return bool(self._read_bytes(1)[0])
        if value_type in NUMPY_DTYPES:
            return self._read_array(NUMPY_DTYPES[value_type], 1)[0].item()
        if value_type != ARRAY:
            raise ValueError(f"a value of the unknown type {value_type}")
        item_type, count = self.read_number("<I"), self.read_number("<Q")
        if item_type == STRING:
            return [self.read_string() for _ in range(count)]
        if item_type != BOOL and item_type not in NUMPY_DTYPES:
            raise ValueError(f"an array of the type {item_type}")
        return self._read_array("?" if item_type == BOOL else NUMPY_DTYPES[item_type], count)

    def view_bytes(self, position: int, count: int, label: str = "") -> np.ndarray:
        """Bytes of the file, uncopied."""
        if position + count > len(self._data):
            raise ValueError(f"{truncate(label) or f'byte {position}'} and what follows are missing")
        return np.frombuffer(self._data, np.uint8, count, position)

    def _read_array(self, dtype: str, count: int) -> np.ndarray:
        data = self.view_bytes(self.position, count * np.dtype(dtype).itemsize)
        self.position += data.nbytes
        return data.view(dtype)

    def _read_bytes(self, count: int) -> bytes:
        data = self._data[self.position : self.position + count]
        if len(data) < count:
            raise ValueError(f"byte {self.position} and what follows are missing")
        self.position += count
        return data
