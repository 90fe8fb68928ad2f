"""Parts of a model for several processes: together they are the whole, each hardly more than its share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import pytest
import torch
from trimtab.kernels.common.errors import InputError
from trimtab.kernels.distributed.communicator import Peers
from trimtab.models.config import ModelConfig
from trimtab.models.llama import Llama, dimensions, held_bytes, shapes
from trimtab.models.tensor_parallel import CUT, SUMMED, Shards, ShardWeights
from trimtab.models.weights.dummy import DummyWeights
from trimtab.models.weights.safetensors import Checkpoint

from ...helpers.tiny_model import Tiny

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from trimtab.models.llama import Weights

CPU = torch.device("cpu")
SIZES = [1, 2, 4]


@dataclass(frozen=True)
class Biased(Tiny):
    """With every bias there is, and norms of queries and keys."""

    def config(self) -> dict[str, Any]:
        switches = {"attention_bias": True, "mlp_bias": True}
        return {**super().config(), **switches}


@dataclass(frozen=True)
class Number:
    """A process that exchanges nothing."""

    rank: int
    size: int


TINY = Biased(heads=8, kv_heads=4, head_dim=6, inner=52, tied=False, shards=2)
CONFIG = ModelConfig.from_dict(TINY.config())


def parts(size: int) -> list[Shards]:
    return [Shards(CONFIG, cast("Peers", Number(rank, size)), dimensions(CONFIG)) for rank in range(size)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(TINY.write(tmp_path / "model"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("random", [False, True])
def test_parts_of_every_tensor_put_together_are_the_whole(
    checkpoint: Checkpoint, size: int, random: bool
) -> None:
    weights: Weights = DummyWeights(shapes(CONFIG), torch.float32, CPU) if random else checkpoint
    for name, names in dimensions(CONFIG).items():
        found = [ShardWeights(weights, each, shapes(CONFIG)).tensor(name) for each in parts(size)]
        own = [shapes(each.own)[name] for each in parts(size)]
        assert [tuple(part.shape) for part in found] == own
        axes = [axis for axis, dim in enumerate(names) if dim in CUT]
        if name.endswith(SUMMED):
            assert torch.equal(torch.stack(found).sum(0), weights.tensor(name))
        elif axes:
            assert torch.equal(torch.cat(found, axes[0]), weights.tensor(name))
        else:
            assert all(torch.equal(part, weights.tensor(name)) for part in found)


def test_a_part_takes_hardly_more_than_its_share_of_the_memory() -> None:
    whole = held_bytes(CONFIG, 4, CPU)
    assert all(whole / 4 <= held_bytes(each.own, 4, CPU) < whole / 3 for each in parts(4))


def test_a_checkpoint_that_does_not_fit_its_config_is_refused_whichever_part_is_loaded(
    checkpoint: Checkpoint,
) -> None:
    each = Shards(CONFIG, cast("Peers", Number(1, 2)), dimensions(CONFIG))
    checkpoint.shapes["model.norm.weight"] = (35,)
    with pytest.raises(InputError, match=r"model.norm.weight is \[35\], expected \[36\]"):
        Llama(each.own, ShardWeights(checkpoint, each, shapes(CONFIG)), torch.float32, CPU, shards=each)
