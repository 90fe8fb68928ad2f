"""GGUFFile reads what the gguf package writes, and refuses corrupt files with a one-line error."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trimtab.kernels.common.errors import InputError
from trimtab.models.gguf.reader import GGUFFile

from ...helpers.gguf_files import write_gguf


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    extra = {"some.bools": [True, False], "some.floats": [0.5, -1.0], "some.count": -7 & 0xFFFFFFFF}
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", extra)


def test_metadata_and_tensors_match_the_gguf_packages_reader(source: Path) -> None:
    ours, theirs = GGUFFile(source), gguf.GGUFReader(source)
    ignored = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")
    right = {key: field.contents() for key, field in theirs.fields.items() if key not in ignored}
    assert {key: ours.get(key) for key in ours.metadata} == right
    assert ours.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        stored = ours.tensors[tensor.name]
        assert stored.shape == tuple(reversed(tensor.shape.tolist()))
        assert stored.ggml_type == tensor.tensor_type
        assert stored.data.tobytes() == tensor.data.tobytes()


def test_every_value_type_is_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values: dict[str, Any] = {
        "uint8": 200,
        "int8": -100,
        "uint16": 60_000,
        "int16": -30_000,
        "uint32": 4_000_000_000,
        "int32": -2_000_000_000,
        "uint64": 1 << 63,
        "int64": -(1 << 62),
        "float32": 0.25,
        "float64": 1e300,
        "bool": True,
    }
    for name, value in values.items():
        getattr(writer, f"add_{name}")(name, value)
    writer.add_array("texts", ["é", "", "日本"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    assert {name: file.get(name) for name in values} == values
    assert file.get("texts") == ["é", "", "日本"]


def test_a_custom_alignment_is_used(tmp_path: Path, source: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(256)
    writer.add_tensor("a", np.arange(3, dtype=np.float32))
    writer.add_tensor("b", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.tensors["a"].dequantize_rows(0, 1).tolist() == [[0, 1, 2]]
    assert file.tensors["b"].dequantize_rows(1, 2).tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("share", [0.0, 1e-5, 1e-3, 0.002, 0.004, 0.006, 0.01, 0.5, 0.99, 1 - 1e-7])
def test_a_truncated_file_is_refused(source: Path, tmp_path: Path, share: float) -> None:
    content = source.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"cut\.gguf' is (not a|a truncated or corrupt) GGUF file"):
        GGUFFile(cut)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_file_with_changed_bytes_is_read_or_refused_with_an_input_error(
    source: Path, data: st.DataObject
) -> None:
    content = bytearray(source.read_bytes())
    header = content.index(b"output_norm.weight") + 200
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, header))
        new = data.draw(st.binary(min_size=1, max_size=8))
        content[at : at + len(new)] = new
    path = source.parent / "changed.gguf"
    path.write_bytes(content)
    with suppress(InputError):
        assert all(stored.data.nbytes < len(content) for stored in GGUFFile(path).tensors.values())


def make_header(tensors: int, keys: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def encode_text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def encode_tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0, name: str = "t") -> bytes:
    return encode_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 1 << 60
DAMAGED: dict[str, tuple[bytes, str]] = {
    "an old version": (make_header(0, 0, version=1), "its version is 1; expected one of 2, 3"),
    "another byte order": (make_header(0, 0, version=3 << 24), "its version is 50331648"),
    "more keys than the file holds": (make_header(0, HUGE), "it ends before byte"),
    "more tensors than the file holds": (make_header(HUGE, 0), "it ends before byte"),
    "a key beyond the end": (make_header(0, 1, struct.pack("<Q", HUGE) + b"abc"), "it ends before byte"),
    "an array beyond the end": (
        make_header(0, 1, encode_text("k") + struct.pack("<IIQ", 9, 4, HUGE)),
        "it ends before the end of the array",
    ),
    "strings beyond the end": (
        make_header(0, 1, encode_text("k") + struct.pack("<IIQ", 9, 8, HUGE)),
        "it ends before byte",
    ),
    "an array of arrays": (
        make_header(0, 1, encode_text("k") + struct.pack("<IIQ", 9, 9, 1)),
        "unsupported array item type 9",
    ),
    "an unknown type": (make_header(0, 1, encode_text("k") + struct.pack("<I", 77)), "unknown value type 77"),
    "invalid UTF-8": (make_header(0, 1, struct.pack("<Q", 2) + b"\xff\xfe"), "codec can't decode"),
    "a duplicate key": (
        make_header(0, 2, 2 * (encode_text("k") + struct.pack("<II", 4, 1))),
        "duplicate key 'k'",
    ),
    "a duplicate tensor": (
        make_header(2, 0, 2 * encode_tensor((1,)) + bytes(64)),
        "duplicate tensor 't'",
    ),
    "no dimensions": (make_header(1, 0, encode_tensor(())), "'t' has 0 dimensions"),
    "many dimensions": (make_header(1, 0, encode_tensor((1,) * 99)), "'t' has 99 dimensions"),
    "a row of exabytes": (
        make_header(1, 0, encode_tensor((HUGE,)) + bytes(64)),
        "it ends before the end of t",
    ),
    "a size that overflows 64 bits": (
        make_header(1, 0, encode_tensor((HUGE, HUGE, HUGE)) + bytes(64)),
        "it ends before the end of t",
    ),
    "no columns in many rows": (make_header(1, 0, encode_tensor((0, HUGE, HUGE)) + bytes(64)), "corrupt"),
    "an offset beyond the end": (
        make_header(1, 0, encode_tensor((1,), offset=HUGE) + bytes(64)),
        "it ends before the end of t",
    ),
    "a partial quantisation block": (
        make_header(1, 0, encode_tensor((33,), kind=8) + bytes(64)),
        "'t' has rows of 33; expected a multiple of 32",
    ),
    "an unknown tensor type": (
        make_header(1, 0, encode_tensor((1,), kind=250) + bytes(64)),
        "250 is not a valid",
    ),
    "a zero alignment": (
        make_header(0, 1, encode_text("general.alignment") + struct.pack("<II", 4, 0)),
        "alignment is 0; it must be a positive integer",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_corrupt_file_is_refused_with_the_reason_in_one_line(tmp_path: Path, case: str) -> None:
    content, message = DAMAGED[case]
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(InputError) as refusal:
        GGUFFile(tmp_path / "bad.gguf")
    sentence = str(refusal.value)
    assert "bad.gguf' is a truncated or corrupt GGUF file: " in sentence
    assert message in sentence
    assert "\n" not in sentence


def test_other_files_are_refused_with_their_path(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello world")
    with pytest.raises(InputError, match=r"text\.gguf' is not a GGUF file"):
        GGUFFile(tmp_path / "text.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    for other in (tmp_path / "none.gguf", tmp_path, tmp_path / "pipe.gguf", Path("nul\0.gguf")):
        with pytest.raises(InputError, match="cannot be read as a GGUF file"):
            GGUFFile(other)


def test_number_arrays_of_a_large_vocabulary_stay_memory_mapped(tmp_path: Path) -> None:
    tokens = [f"token {index}" for index in range(50_000)]
    path = write_gguf(
        tmp_path / "m.gguf", {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * 50_000}
    )
    file = GGUFFile(path)
    assert file.get_tokens() == tokens
    assert isinstance(file.metadata["tokenizer.ggml.token_type"], np.ndarray)
    assert not file.metadata["tokenizer.ggml.token_type"].flags.owndata
