"""Memory-mapped GGUF reader: metadata as Python values, tensors by name.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. The magic GGUF is followed by the version, the
numbers of tensors and metadata keys, the metadata (key, type, value), the tensor infos (name, shape, type,
offset), and the tensor data.
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
"""Further types of metadata values."""
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
"""Tensor data start at multiples of general.alignment; this is its default."""


def import_gguf() -> ModuleType:
    """Import the optional `gguf` package. Raises RunError when it is not installed."""
    try:
        import gguf  # noqa: PLC0415 - optional
    except ImportError:
        raise RunError("reading GGUF files needs the gguf package: pip install gguf") from None
    return gguf


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as stored. `ggml_type` is a GGMLQuantizationType, `data` its bytes, [rows, bytes]."""

    name: str
    shape: tuple[int, ...]
    ggml_type: Any
    data: np.ndarray

    def dequantize_rows(self, start: int, stop: int) -> torch.Tensor:
        """Dequantise rows to float32, [rows, columns]; a vector is one row.

        Raises InputError for a type that the `gguf` package cannot dequantise.
        """
        try:
            values = import_gguf().quants.dequantize(self.data[start:stop], self.ggml_type)
        except NotImplementedError:
            raise InputError(
                f"tensor {short_repr(self.name)} is of type {self.ggml_type.name}, which the installed "
                "gguf package cannot dequantise; use a type such as Q4_0, Q8_0 or F16"
            ) from None
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))


class GGUFFile:
    """An open GGUF file. Arrays of numbers in `metadata` are views of the mapped file; `get` returns lists.

    Raises InputError when the file is not GGUF, truncated or corrupt; RunError without the `gguf` package.
    """

    def __init__(self, path: Path) -> None:
        package, mapped = import_gguf(), _open_mmap(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            self._parse(_Cursor(mapped, len(MAGIC)), package)
        except (ValueError, OverflowError) as error:
            raise InputError(
                f"{str(path)!r} is a truncated or corrupt GGUF file: {error_text(error)}"
            ) from error

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a metadata key as a Python object."""
        value = self.metadata.get(key, default)
        return value.tolist() if isinstance(value, np.ndarray) else value

    def get_size(self, key: str, default: int | None = None) -> int:
        """An integer from 1 to MAX_SIZE. Raises InputError for any other value."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
            raise InputError(
                f"the GGUF file's {key} is {short_repr(value)}; it must be an integer from 1 to {MAX_SIZE}"
            )
        return value

    def get_float(self, key: str, default: float | None = None) -> float:
        """A finite number above 0. Raises InputError for any other value."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise InputError(f"the GGUF file's {key} is {short_repr(value)}; it must be a number above 0")
        return float(value)

    def get_str(self, key: str) -> str:
        """A string, empty when the key is absent. Raises InputError for any other type."""
        value = self.get(key, "")
        if not isinstance(value, str):
            raise InputError(f"the GGUF file's {key} is {short_repr(value)}; it must be a string")
        return value

    def get_tokens(self) -> list[str]:
        """The vocabulary. Raises InputError when it is missing or empty."""
        tokens = self.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
            raise InputError(
                "the GGUF file has no vocabulary; tokenizer.ggml.tokens must be a list of tokens"
            )
        return tokens

    def get_token_id(self, name: str) -> int | None:
        """The id of a special token such as "bos", or None. Raises InputError when it is out of range."""
        key, max_id = f"tokenizer.ggml.{name}_token_id", len(self.get_tokens()) - 1
        value = self.get(key)
        if value is not None and (not isinstance(value, int) or not 0 <= value <= max_id):
            raise InputError(f"the GGUF file's {key} is {short_repr(value)}; it must be from 0 to {max_id}")
        return value

    def _parse(self, cursor: _Cursor, package: ModuleType) -> None:
        version = cursor.read_number("<I")
        if version not in SUPPORTED_VERSIONS:
            raise ValueError(
                f"its version is {version}; expected one of {', '.join(map(str, SUPPORTED_VERSIONS))}"
            )
        num_tensors, num_keys = cursor.read_number("<Q"), cursor.read_number("<Q")
        for _ in range(num_keys):
            key = cursor.read_string()
            if key in self.metadata:
                raise ValueError(f"duplicate key {short_repr(key)}")
            self.metadata[key] = cursor.read_value(cursor.read_number("<I"))
        tensor_infos = [_TensorInfo.from_cursor(cursor, package) for _ in range(num_tensors)]
        alignment = self.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {short_repr(alignment)}; it must be a positive integer")
        cursor.position += -cursor.position % alignment
        for info in tensor_infos:
            if info.name in self.tensors:
                raise ValueError(f"duplicate tensor {short_repr(info.name)}")
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
    raise InputError(f"{str(path)!r} is not a GGUF file; expected the magic bytes GGUF")


@dataclass(frozen=True)
class _TensorInfo:
    """A tensor info of the header; `offset` is in bytes from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]
    ggml_type: Any
    row_bytes: int
    offset: int

    @classmethod
    def from_cursor(cls, cursor: _Cursor, package: ModuleType) -> _TensorInfo:
        name, num_dims = cursor.read_string(), cursor.read_number("<I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise ValueError(f"tensor {short_repr(name)} has {num_dims} dimensions; expected 1 to {MAX_DIMS}")
        shape = tuple(cursor.read_number("<Q") for _ in range(num_dims))[::-1]  # rows before columns
        ggml_type = package.GGMLQuantizationType(cursor.read_number("<I"))
        block_size, type_size = package.GGML_QUANT_SIZES[ggml_type]
        if shape[-1] % block_size:
            raise ValueError(
                f"tensor {short_repr(name)} has rows of {shape[-1]}; expected a multiple of {block_size}"
            )
        return cls(name, shape, ggml_type, shape[-1] // block_size * type_size, cursor.read_number("<Q"))

    def to_tensor(self, cursor: _Cursor) -> GGUFTensor:
        num_rows = math.prod(self.shape[:-1])
        data = cursor.view_bytes(cursor.position + self.offset, num_rows * self.row_bytes, self.name)
        return GGUFTensor(self.name, self.shape, self.ggml_type, data.reshape(num_rows, self.row_bytes))


class _Cursor:
    """A read position in the mapped file. Reads beyond the end raise ValueError."""

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
            raise ValueError(f"unknown value type {value_type}")
        item_type, count = self.read_number("<I"), self.read_number("<Q")
        if item_type == STRING:
            return [self.read_string() for _ in range(count)]
        if item_type != BOOL and item_type not in NUMPY_DTYPES:
            raise ValueError(f"unsupported array item type {item_type}")
        return self._read_array("?" if item_type == BOOL else NUMPY_DTYPES[item_type], count)

    def view_bytes(self, position: int, count: int, label: str = "") -> np.ndarray:
        """A zero-copy view of bytes of the file. `label` names them in the error."""
        if position + count > len(self._data):
            raise ValueError(
                f"it ends before the end of {truncate(label) or f'the array at byte {position}'}"
            )
        return np.frombuffer(self._data, np.uint8, count, position)

    def _read_array(self, dtype: str, count: int) -> np.ndarray:
        data = self.view_bytes(self.position, count * np.dtype(dtype).itemsize)
        self.position += data.nbytes
        return data.view(dtype)

    def _read_bytes(self, count: int) -> bytes:
        data = self._data[self.position : self.position + count]
        if len(data) < count:
            raise ValueError(f"it ends before byte {self.position + count}")
        self.position += count
        return data
