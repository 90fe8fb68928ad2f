from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from trimtab.kernels.attention import Batch, PagedKV, Segment
from trimtab.kernels.errors import InputError
from trimtab.models.checkpoint import Checkpoint
from trimtab.models.config import ModelConfig
from trimtab.models.llama import Llama

from ..tiny import Tiny, write_json, write_tensors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = torch.device("cpu")
INDEX, FIRST = "model.safetensors.index.json", "model-00001-of-00003.safetensors"
HEAD, NORM = "lm_head.weight", "model.norm.weight"


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None,
) -> Llama:
    shape = ModelConfig.from_folder(folder)
    return Llama(shape, Checkpoint(folder), dtype, CPU, progress=progress)


def scores(model: Llama, token_ids: list[int]) -> torch.Tensor:
    shape = model.config
    cache = PagedKV(shape.num_layers, 1, len(token_ids), shape.num_kv_heads, shape.head_dim)
    batch = Batch.of([Segment(0, 0, len(token_ids), [0], True)], cache.block_size)
    cache.begin(batch)
    with torch.inference_mode():
        return model.logits(model.forward(torch.tensor(token_ids), batch.positions, cache))


IDS = [1, 299, 7, 7, 120, 0, 3, 250, 18]


def test_shards_hold_the_same_model_as_one_file(tmp_path: Path) -> None:
    one, three = (
        Tiny(tied=False).write(tmp_path / "one"),
        Tiny(tied=False, shards=3).write(tmp_path / "three"),
    )
    assert len(list(three.glob("*.safetensors"))) == 3
    assert torch.equal(scores(load(one), IDS), scores(load(three), IDS))


def test_tensors_come_back_as_they_were_stored(tmp_path: Path) -> None:
    tiny = Tiny(tied=False, shards=3, dtype=torch.bfloat16)
    checkpoint = Checkpoint(tiny.write(tmp_path / "model"))
    tensors = tiny.tensors()
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert set(checkpoint.dtypes.values()) == {"BF16"}
    assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("held", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_stored_type_is_cast_to_every_type_that_is_asked(
    stored: torch.dtype, held: torch.dtype, tmp_path: Path
) -> None:
    tiny = Tiny(dtype=stored)
    model = load(tiny.write(tmp_path / "stored"), held)
    assert model.dtype == held
    cast = tmp_path / "cast"
    Tiny().write(cast)
    write_tensors(cast, {name: tensor.to(held).float() for name, tensor in tiny.tensors().items()})
    truth = scores(load(cast), IDS)
    # the values are those of the cast; their products are in float32, or in bfloat16 where the machine has it
    share = {torch.float32: 0.0, torch.float16: 1e-4, torch.bfloat16: 0.1}[held]
    assert float((scores(model, IDS) - truth).abs().max()) <= share * float(truth.std())
    assert float(truth.std()) > 1


def test_types_may_differ_within_a_checkpoint(tmp_path: Path) -> None:
    tensors = Tiny(dtype=torch.bfloat16).tensors()
    folder = Tiny(dtype=torch.bfloat16).write(tmp_path / "mixed")
    write_tensors(folder, {n: t.float() if "norm" in n else t for n, t in tensors.items()})
    mixed = scores(load(folder), IDS)
    assert torch.equal(mixed, scores(load(Tiny(dtype=torch.bfloat16).write(tmp_path / "plain")), IDS))


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    tiny = Tiny(tied=False)
    load(tiny.write(tmp_path / "model"), progress=lambda done, total: seen.append((done, total)))
    size = sum(tensor.nbytes for tensor in tiny.tensors().values())
    assert {total for _, total in seen} == {size}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == size


def test_a_head_that_is_stored_though_it_is_tied_is_fine(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path / "model")
    truth = scores(load(folder), IDS)
    tensors = Tiny().tensors()
    write_tensors(folder, {**tensors, HEAD: tensors["model.embed_tokens.weight"].clone()})
    assert torch.equal(scores(load(folder), IDS), truth)


def test_rotary_frequencies_that_old_checkpoints_store_are_fine(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path / "model")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    write_tensors(folder, {**Tiny().tensors(), **extra})
    load(folder)


def refused(folder: Path, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)) as error:
        load(folder)
    assert "\n" not in str(error.value)


def sharded(tmp_path: Path) -> Path:
    return Tiny(tied=False, shards=3).write(tmp_path / "model")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    refused(folder, f"has neither model.safetensors nor {INDEX}")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / FIRST).unlink()
    refused(folder, f"lacks the shard '{FIRST}'")


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1], ids=str)
def test_a_truncated_file_is_refused_wherever_it_ends(keep: int, tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    refused(folder, "model.safetensors' is truncated or no safetensors file")


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
def test_a_file_that_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, "model.safetensors' is truncated or no safetensors file")


@pytest.mark.parametrize("offsets", [[0, 2**50], [2**50, 2**50 + 4], [4, 0]], ids=str)
def test_a_header_that_points_outside_the_file_is_refused(offsets: list[int], tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path / "model")
    header = json.dumps({NORM: {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(folder, "model.safetensors' is truncated or no safetensors file")


def test_missing_unexpected_and_misshapen_tensors_are_listed_together(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path / "model")
    tensors = Tiny().tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    tensors[NORM] = torch.zeros(35)
    write_tensors(folder, tensors)
    refused(
        folder,
        "the checkpoint does not fit its config.json; missing: model.layers.1.mlp.up_proj.weight; "
        "unexpected: model.layers.9.mlp.up_proj.weight; "
        "of the wrong shape: model.norm.weight is [35], expected [36]",
    )


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    folder = Tiny(tied=False).write(tmp_path / "model")
    write_tensors(folder, Tiny().tensors())
    refused(folder, f"missing: {HEAD}")


def test_a_long_list_of_missing_tensors_is_cut_and_counted(tmp_path: Path) -> None:
    folder = Tiny(layers=3).write(tmp_path / "model")
    write_tensors(folder, Tiny(layers=1).tensors())
    refused(folder, " and 10 more")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float64, torch.bool], ids=str)
def test_a_weight_of_another_type_is_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path / "model")
    tensors = Tiny().tensors()
    write_tensors(folder, {**tensors, NORM: torch.ones(36).to(dtype)})
    refused(folder, f"of a type other than F32, F16, BF16: {NORM} is ")


@pytest.mark.parametrize("name", ["../model.safetensors", "sub/model.safetensors", "", "..", "."])
def test_an_index_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    save_file(Tiny().tensors(), tmp_path / "model.safetensors")
    folder = Tiny(shards=3).write(tmp_path / "model")
    (folder / "sub").mkdir()
    save_file(Tiny().tensors(), folder / "sub" / "model.safetensors")
    write_json(folder / INDEX, {"weight_map": dict.fromkeys(Tiny().tensors(), name)})
    with pytest.raises(InputError):
        Checkpoint(folder)


def test_an_index_with_an_absolute_path_is_refused(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.safetensors"
    save_file(Tiny().tensors(), elsewhere)
    folder = Tiny(shards=3).write(tmp_path / "model")
    write_json(folder / INDEX, {"weight_map": dict.fromkeys(Tiny().tensors(), str(elsewhere))})
    refused(folder, f"names the shard {str(elsewhere)!r}; it must be a file in the same folder")


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
def test_an_index_that_is_none_is_refused(index: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / INDEX).write_text(index, encoding="utf-8")
    refused(folder, f"{INDEX}' is no index of shards")


def test_an_index_that_names_no_text_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    write_json(folder / INDEX, {"weight_map": {"a": 5}})
    refused(folder, "names the shard 5; it must be a file in the same folder")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    tensors = Tiny(tied=False).tensors()
    names = list(tensors)
    twice = {name: tensors[name] for name in [*names[0::3], names[1]]}
    save_file(twice, folder / FIRST)
    refused(folder, f"tensor {names[1]!r} is in ")


def test_a_shard_that_lacks_what_the_index_promises_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    tensors = Tiny(tied=False).tensors()
    save_file({name: tensors[name] for name in list(tensors)[3::3]}, folder / FIRST)
    refused(folder, "missing: model.embed_tokens.weight")
