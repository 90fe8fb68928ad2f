"""Tensor parallelism: shards join to the full tensors; each takes about 1 / tp_size of the memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import pytest
import torch
from trimtab.kernels.common.errors import InputError
from trimtab.kernels.distributed.communicator import Communicator
from trimtab.models.config import ModelConfig
from trimtab.models.decoder import Decoder, param_dims, param_shapes, weight_bytes
from trimtab.models.tensor_parallel import RANK0_BIASES, SHARDED_DIMS, ShardedWeights, TPSharding
from trimtab.models.weights.dummy import DummyWeights
from trimtab.models.weights.safetensors import Checkpoint

from ...helpers.tiny_model import TinyModel

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from trimtab.models.decoder import WeightSource

CPU = torch.device("cpu")
SIZES = [1, 2, 4]


@dataclass(frozen=True)
class BiasedModel(TinyModel):
    """A model with attention and MLP biases."""

    def config(self) -> dict[str, Any]:
        switches = {"attention_bias": True, "mlp_bias": True}
        return {**super().config(), **switches}


@dataclass(frozen=True)
class FakeCommunicator:
    """A rank and world size without communication."""

    rank: int
    world_size: int


TINY = BiasedModel(heads=8, kv_heads=4, head_dim=6, intermediate=52, tied=False, shards=2)
CONFIG = ModelConfig.from_dict(TINY.config())


def shard_tensors(size: int) -> list[TPSharding]:
    return [
        TPSharding(CONFIG, cast("Communicator", FakeCommunicator(rank, size)), param_dims(CONFIG))
        for rank in range(size)
    ]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(TINY.write(tmp_path / "model"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("random", [False, True])
def test_the_shards_of_every_tensor_join_to_the_full_tensor(
    checkpoint: Checkpoint, size: int, random: bool
) -> None:
    weights: WeightSource = DummyWeights(param_shapes(CONFIG), torch.float32, CPU) if random else checkpoint
    for name, names in param_dims(CONFIG).items():
        shards = [
            ShardedWeights(weights, each, param_shapes(CONFIG)).get_tensor(name)
            for each in shard_tensors(size)
        ]
        local_shapes = [param_shapes(each.local_config)[name] for each in shard_tensors(size)]
        assert [tuple(shard.shape) for shard in shards] == local_shapes
        axes = [axis for axis, dim in enumerate(names) if dim in SHARDED_DIMS]
        if name.endswith(RANK0_BIASES):
            assert torch.equal(torch.stack(shards).sum(0), weights.get_tensor(name))
        elif axes:
            assert torch.equal(torch.cat(shards, axes[0]), weights.get_tensor(name))
        else:
            assert all(torch.equal(shard, weights.get_tensor(name)) for shard in shards)


def test_a_shard_takes_hardly_more_than_its_share_of_memory() -> None:
    full_bytes = weight_bytes(CONFIG, 4, CPU)
    assert all(
        full_bytes / 4 <= weight_bytes(each.local_config, 4, CPU) < full_bytes / 3
        for each in shard_tensors(4)
    )


def test_a_checkpoint_that_does_not_fit_its_config_is_refused_on_every_rank(
    checkpoint: Checkpoint,
) -> None:
    each = TPSharding(CONFIG, cast("Communicator", FakeCommunicator(1, 2)), param_dims(CONFIG))
    checkpoint.shapes["model.norm.weight"] = (35,)
    with pytest.raises(InputError, match=r"model.norm.weight is \[35\], expected \[36\]"):
        Decoder(
            each.local_config,
            ShardedWeights(checkpoint, each, param_shapes(CONFIG)),
            torch.float32,
            CPU,
            sharding=each,
        )
