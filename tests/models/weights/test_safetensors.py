"""Checkpoint reads the stored tensors, and refuses invalid files with a one-line error."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from trimtab.engine.engine import Engine
from trimtab.kernels.common.errors import InputError
from trimtab.models.config import ModelConfig
from trimtab.models.decoder import Decoder
from trimtab.models.weights.safetensors import Checkpoint

from ...helpers.memory_peak import MIB, peak_memory
from ...helpers.tiny_model import TinyModel, write_json, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = torch.device("cpu")
INDEX, FIRST = "model.safetensors.index.json", "model-00001-of-00003.safetensors"
FILE = "model.safetensors"
HEAD, NORM = "lm_head.weight", "model.norm.weight"


def load_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    shape = ModelConfig.from_folder(folder)
    return Decoder(shape, Checkpoint(folder), dtype, CPU, progress=progress)


def model_scores(folder: Path, dtype: str = "float32") -> torch.Tensor:
    return Engine.from_pretrained(str(folder), dtype=dtype, kv_cache_memory="1MiB").score(IDS)


IDS = [1, 299, 7, 7, 120, 0, 3, 250, 18]


def test_shards_hold_the_same_model_as_one_file(tmp_path: Path) -> None:
    one, three = (
        TinyModel(tied=False).write(tmp_path / "one"),
        TinyModel(tied=False, shards=3).write(tmp_path / "three"),
    )
    assert len(list(three.glob("*.safetensors"))) == 3
    assert torch.equal(model_scores(one), model_scores(three))


def test_tensors_read_equal_the_stored_tensors(tmp_path: Path) -> None:
    tiny = TinyModel(tied=False, shards=3, dtype=torch.bfloat16)
    checkpoint = Checkpoint(tiny.write(tmp_path / "model"))
    tensors = tiny.tensors()
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert set(checkpoint.dtypes.values()) == {"BF16"}
    assert all(torch.equal(checkpoint.get_tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("loaded", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_stored_dtype_is_cast_to_every_requested_dtype(
    stored: torch.dtype, loaded: torch.dtype, tmp_path: Path
) -> None:
    tiny = TinyModel(dtype=stored)
    folder = tiny.write(tmp_path / "stored")
    model, tensors = load_model(folder, loaded), tiny.tensors()
    assert model.dtype == loaded
    assert torch.equal(model._embed_tokens, tensors["model.embed_tokens.weight"])  # cast during lookup
    cast = tmp_path / "cast"
    TinyModel().write(cast)
    write_tensors(cast, {name: tensor.to(loaded).float() for name, tensor in tensors.items()})
    truth = model_scores(cast)
    # same weights; keys, values and possibly activations are rounded to 8 or 11 significant bits
    share = {torch.float32: 0.0, torch.float16: 0.1 / 8, torch.bfloat16: 0.1}[loaded]
    scores = model_scores(folder, str(loaded).removeprefix("torch."))
    assert float((scores - truth).abs().max()) <= share * float(truth.std())
    assert float(truth.std()) > 1


def test_a_checkpoint_may_mix_dtypes(tmp_path: Path) -> None:
    tensors = TinyModel(dtype=torch.bfloat16).tensors()
    folder = TinyModel(dtype=torch.bfloat16).write(tmp_path / "mixed")
    write_tensors(folder, {n: t.float() if "norm" in n else t for n, t in tensors.items()})
    assert torch.equal(
        model_scores(folder), model_scores(TinyModel(dtype=torch.bfloat16).write(tmp_path / "plain"))
    )


def test_reading_all_tensors_allocates_no_extra_memory(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.zeros(8 * MIB, dtype=torch.bfloat16) for index in range(8)}
    write_tensors(tmp_path, tensors, num_shards=2)
    taken = peak_memory(
        "from trimtab.models.weights.safetensors import Checkpoint; torch.zeros(1).aminmax()",
        "checkpoint = Checkpoint(Path(sys.argv[1]))\n"
        "tensors = [checkpoint.get_tensor(name) for name in checkpoint.shapes]",
        tmp_path,
    )
    assert taken < 8 * MIB


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    tiny = TinyModel(tied=False)
    load_model(tiny.write(tmp_path / "model"), progress=lambda done, total: progress.append((done, total)))
    size = sum(tensor.nbytes for tensor in tiny.tensors().values())
    assert {total for _, total in progress} == {size}
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert progress[-1][0] == size


def test_a_stored_tied_lm_head_is_accepted(tmp_path: Path) -> None:
    folder = TinyModel().write(tmp_path / "model")
    truth = model_scores(folder)
    tensors = TinyModel().tensors()
    write_tensors(folder, {**tensors, HEAD: tensors["model.embed_tokens.weight"].clone()})
    assert torch.equal(model_scores(folder), truth)


def test_stored_rotary_frequencies_are_accepted(tmp_path: Path) -> None:
    folder = TinyModel().write(tmp_path / "model")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    write_tensors(folder, {**TinyModel().tensors(), **extra})
    load_model(folder)


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def write_sharded(tmp_path: Path) -> Path:
    return TinyModel(tied=False, shards=3).write(tmp_path / "model")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = TinyModel().write(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert_refused(folder, f"has neither model.safetensors nor {INDEX}")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    (folder / FIRST).unlink()
    assert_refused(folder, f"lacks the shard '{FIRST}'")


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1], ids=str)
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    folder = TinyModel().write(tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])
    assert_refused(folder, "model.safetensors' is truncated or not a safetensors file")


@pytest.mark.parametrize(
    "content",
    [
        (2**62).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (50).to_bytes(8, "little") + b"{}",
        b"PK\x03\x04 this is a zip file",
        b"\x80\x02}q\x00." * 40,
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xff",
    ],
    ids=["exabytes", "all-ones", "header-past-end", "zip", "pickle", "array", "not-utf8"],
)
def test_a_file_in_another_format_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = TinyModel().write(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    assert_refused(folder, "model.safetensors' is truncated or not a safetensors file")


def tensor_entry(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


TWICE = (
    '{"a":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]},'
    '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
)
HEADERS: dict[str, tuple[Any, int]] = {  # header, bytes of data after it
    "an end outside the file": ({"a": tensor_entry([1], 0, 2**50)}, 4),
    "a start outside the file": ({"a": tensor_entry([1], 2**50, 2**50 + 4)}, 4),
    "an end before the start": ({"a": tensor_entry([1], 4, 0)}, 4),
    "two tensors at the same offset": ({"a": tensor_entry([1], 0, 4), "b": tensor_entry([1], 0, 4)}, 4),
    "overlapping tensors": ({"a": tensor_entry([2], 0, 8), "b": tensor_entry([2], 4, 12)}, 12),
    "a gap": ({"a": tensor_entry([1], 0, 4), "b": tensor_entry([1], 8, 12)}, 12),
    "a gap before the first tensor": ({"a": tensor_entry([1], 4, 8)}, 8),
    "trailing data": ({"a": tensor_entry([1], 0, 4)}, 8),
    "exabytes in a row": ({"a": tensor_entry([2**60], 0, 4)}, 4),
    "a product that overflows to 4": ({"a": tensor_entry([2**62 + 1, 4], 0, 16)}, 16),
    "a product that overflows to 0": ({"a": tensor_entry([2**63, 2], 0, 0)}, 0),
    "a size beyond 64 bits": ({"a": tensor_entry([2**70], 0, 4)}, 4),
    "a size below zero": ({"a": tensor_entry([-1], 0, 4)}, 4),
    "a non-integer size": ({"a": tensor_entry([1.0], 0, 4)}, 4),
    "a size too small for its bytes": ({"a": tensor_entry([1], 0, 8)}, 8),
    "an unknown type": ({"a": tensor_entry([1], 0, 4, "F7")}, 4),
    "missing offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "metadata that is not an object": ({"a": tensor_entry([1], 0, 4), "__metadata__": 5}, 4),
    "a duplicate name": (TWICE % (0, 4), 4),
    "a duplicate name at two offsets": (TWICE % (4, 8), 8),
    "a duplicate dtype": ('{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', 4),
    "deep nesting": ('{"a":' * 50_000 + "1" + "}" * 50_000, 0),
    "deep arrays": ("[" * 100_000, 0),
}


def write_header(path: Path, header: Any, data: int) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


@pytest.mark.parametrize("case", HEADERS)
def test_an_invalid_header_is_refused(case: str, tmp_path: Path) -> None:
    folder = TinyModel().write(tmp_path / "model")
    write_header(folder / FILE, *HEADERS[case])
    assert_refused(folder, "model.safetensors' is truncated or not a safetensors file")


LIMITED = """
import resource, sys
from pathlib import Path
from trimtab.kernels.common.errors import InputError
from trimtab.models.weights.safetensors import Checkpoint
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        Checkpoint(folder).validate({})
    except InputError:
        print(folder.name)
"""


def test_corrupt_files_do_not_cause_large_allocations(tmp_path: Path) -> None:
    for case, (header, data) in HEADERS.items():
        (tmp_path / case).mkdir()
        write_header(tmp_path / case / FILE, header, data)
    (tmp_path / "a header of exabytes").mkdir()
    (tmp_path / "a header of exabytes" / FILE).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    (tmp_path / "an endless index").mkdir()
    with (tmp_path / "an endless index" / INDEX).open("wb") as index:
        index.truncate(1 << 40)
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], check=True, stdout=subprocess.PIPE, text=True
    )
    assert ended.stdout.splitlines() == sorted([*HEADERS, "a header of exabytes", "an endless index"])


@pytest.mark.parametrize("shape", [[0, 2**60], [2**60, 0], [0]], ids=str)
def test_an_empty_tensor_has_the_wrong_shape(shape: list[int], tmp_path: Path) -> None:
    folder = TinyModel().write(tmp_path / "model")
    write_header(folder / FILE, {NORM: tensor_entry(shape, 0, 0)}, 0)
    assert_refused(folder, f"of the wrong shape: {NORM} is {shape}, expected [36]")


def replace_with(path: Path, kind: str, tmp_path: Path) -> None:
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "a shard"])
def test_folders_pipes_and_dangling_links_are_refused(kind: str, name: str, tmp_path: Path) -> None:
    folder = TinyModel(tied=False, shards=1 if name == FILE else 3).write(tmp_path / "model")
    path = folder / (FIRST if name == "a shard" else name)
    replace_with(path, kind, tmp_path)
    assert_refused(folder, f"{str(path)!r} is not a regular file or a link to one")


def test_files_may_be_symbolic_links(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    truth = model_scores(folder)
    (tmp_path / "blobs").mkdir()
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        target = path.rename(tmp_path / "blobs" / f"{path.name}.blob")
        path.symlink_to(target)
    assert torch.equal(model_scores(folder), truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_non_finite_weight_loads_with_a_warning_that_names_it(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny = TinyModel(dtype=dtype)
    folder, tensors = tiny.write(tmp_path / "model"), tiny.tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] = value
    write_tensors(folder, tensors)
    message = r"^tensor 'model\.layers\.1\.mlp\.up_proj\.weight' has infinite or NaN values$"
    with pytest.warns(UserWarning, match=message) as warned:
        load_model(folder)
    assert len(warned) == 1


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(tmp_path: Path) -> None:
    folder = TinyModel().write(tmp_path / "model")
    tensors = TinyModel().tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    tensors[NORM] = torch.zeros(35)
    write_tensors(folder, tensors)
    assert_refused(
        folder,
        "the checkpoint does not match its config.json; missing: model.layers.1.mlp.up_proj.weight; "
        "unexpected: model.layers.9.mlp.up_proj.weight; "
        "of the wrong shape: model.norm.weight is [35], expected [36]",
    )


def test_an_untied_model_without_lm_head_is_refused(tmp_path: Path) -> None:
    folder = TinyModel(tied=False).write(tmp_path / "model")
    write_tensors(folder, TinyModel().tensors())
    assert_refused(folder, f"missing: {HEAD}")


def test_a_long_list_of_missing_tensors_is_abbreviated_with_a_count(tmp_path: Path) -> None:
    folder = TinyModel(layers=3).write(tmp_path / "model")
    write_tensors(folder, TinyModel(layers=1).tensors())
    assert_refused(folder, " and 10 more")


OTHER_TYPES = {"F64": torch.float64, "I8": torch.int8, "I64": torch.int64, "BOOL": torch.bool}
OTHER_TYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_an_unsupported_dtype_is_refused_with_the_tensor_name(name: str, tmp_path: Path) -> None:
    folder = TinyModel().write(tmp_path / "model")
    write_tensors(folder, {**TinyModel().tensors(), NORM: torch.ones(36).to(OTHER_TYPES[name])})
    assert_refused(
        folder, f"the checkpoint stores weights as {name} ({NORM}); expected one of F32, F16, BF16"
    )


def test_an_fp8_checkpoint_is_refused_by_dtype_rather_than_by_its_scale_tensors(tmp_path: Path) -> None:
    folder = TinyModel().write(tmp_path / "model")
    tensors = TinyModel().tensors()
    for name in [name for name in tensors if "proj" in name]:
        tensors[f"{name}_scale"] = torch.ones(1)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    write_tensors(folder, tensors)
    assert_refused(folder, "the checkpoint stores weights as F8_E4M3 (model.layers.")
    assert_refused(folder, " and 6 more); expected one of F32, F16, BF16")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "sub/model.safetensors", "", "..", ".", "a\0b", "\ud800"]
)
def test_an_index_with_invalid_or_outside_paths_is_refused(name: str, tmp_path: Path) -> None:
    save_file(TinyModel().tensors(), tmp_path / "model.safetensors")
    folder = TinyModel(shards=3).write(tmp_path / "model")
    (folder / "sub").mkdir()
    save_file(TinyModel().tensors(), folder / "sub" / "model.safetensors")
    write_json(folder / INDEX, {"weight_map": dict.fromkeys(TinyModel().tensors(), name)})
    with pytest.raises(InputError):
        Checkpoint(folder)


def test_an_index_with_an_absolute_path_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    save_file(TinyModel().tensors(), elsewhere)
    folder = TinyModel(shards=3).write(tmp_path / "model")
    write_json(folder / INDEX, {"weight_map": dict.fromkeys(TinyModel().tensors(), str(elsewhere))})
    assert_refused(folder, f"names the shard {str(elsewhere)!r}; it must be a file in the same folder")


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1, "b": "c"}}',
        '{"weight_map": {"a": [1]}}',
        "[" * 100_000,
    ],
    ids=["cut", "array", "empty", "list", "mixed", "nested", "too-deep"],
)
def test_an_invalid_index_is_refused(index: str, tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    (folder / INDEX).write_text(index, encoding="utf-8")
    assert_refused(folder, f"{INDEX}' is not a shard index")


def test_an_index_with_non_string_file_names_is_refused(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    write_json(folder / INDEX, {"weight_map": {"a": 5}})
    assert_refused(folder, "names the shard 5; it must be a file in the same folder")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    tensors = TinyModel(tied=False).tensors()
    names = list(tensors)
    twice = {name: tensors[name] for name in [*names[0::3], names[1]]}
    save_file(twice, folder / FIRST)
    assert_refused(folder, f"tensor {names[1]!r} is in ")


def test_a_shard_without_a_tensor_of_the_index_is_refused(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    tensors = TinyModel(tied=False).tensors()
    save_file({name: tensors[name] for name in list(tensors)[3::3]}, folder / FIRST)
    assert_refused(folder, "missing: model.embed_tokens.weight")
