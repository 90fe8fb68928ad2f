"""Device and backend selection, KV cache size, device placement of tensors, and CUDA graphs.

The CPU stands in for a GPU, and a repeated call for a captured graph.
"""

from __future__ import annotations

import gc
import re
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from trimtab.engine import Amulet, Engine, EngineConfig, Mato, Objective, Opad, Request, SamplingParams
from trimtab.engine.execution import kv_cache_size
from trimtab.engine.execution.cuda_graphs import CUDAGraphRunner, capture_batch_sizes, capture_seq_lens
from trimtab.engine.execution.device import resolve_device, select_backend
from trimtab.engine.execution.model_runner import inference_context
from trimtab.kernels.backend import CPU_BACKEND, REFERENCE_BACKEND
from trimtab.kernels.common import transfer
from trimtab.kernels.common.errors import InputError, RunError
from trimtab.models.common.memory import GIB

from ...harness import get_runner
from ...helpers.fake_graph import fake_capture
from ...helpers.tiny_model import TinyModel, is_idle

if TYPE_CHECKING:
    from collections.abc import Callable

    from trimtab.kernels.reference.paged_kv_cache import PagedKVCache
    from trimtab.models.decoder import Decoder

KIND, SHORT = Objective("Be kind."), Objective("Be short.", 2)
TOKENS = 5
CPU, META = torch.device("cpu"), torch.device("meta")


def test_a_missing_device_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(InputError, match=re.escape("device is 'cuda:1', and torch finds no GPU")):
        Engine.from_pretrained("nowhere", device="cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(InputError, match=re.escape("device is 'cuda:2'; this machine has cuda:0 to cuda:1")):
        resolve_device("cuda:2")


def test_the_backend_is_one_that_the_device_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select_backend("auto", CPU) is select_backend("torch", CPU) is CPU_BACKEND
    assert select_backend("torch", torch.device("cuda", 0)) is REFERENCE_BACKEND
    assert select_backend("auto", CPU, batch_invariant=True, world_size=2) is CPU_BACKEND
    for kernels, processes, message in (
        ("torch", 1, "kernels is 'torch', whose"),
        ("auto", 2, "parallel_size is 2;"),
    ):
        with pytest.raises(InputError, match=f"batch_invariant is on, and .*{message}"):
            select_backend(kernels, torch.device("cuda", 0), batch_invariant=True, world_size=processes)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="interpreted, for tests"):
        select_backend("triton", CPU)
    monkeypatch.setattr("trimtab.engine.execution.device.find_spec", lambda name: None)
    with pytest.raises(InputError, match="triton is not installed"):
        select_backend("auto", torch.device("cuda", 0))


def test_a_gpu_kv_cache_gets_the_memory_left_by_weights_and_the_largest_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(kv_cache_size, "_measure_peak", lambda call, device: 2 * GIB)
    model = cast("Decoder", SimpleNamespace(device=torch.device("cuda", 0)))

    def num_blocks(**fields: Any) -> int:
        return kv_cache_size.compute_num_kv_blocks(
            EngineConfig(**fields), model, REFERENCE_BACKEND, cast("Any", None), GIB
        )

    assert num_blocks(gpu_memory_utilization=0.5) == 40 - 20 - 2
    assert num_blocks(kv_cache_memory="5GiB") == 5
    with pytest.raises(RunError, match=r"utilization is 0\.25, too small for one KV block of 1 GiB"):
        num_blocks(gpu_memory_utilization=0.25)
    with pytest.raises(RunError, match="the KV cache needs 70 GiB of memory; cuda:0 has 60 GiB free"):
        num_blocks(kv_cache_memory="70GiB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyModel(hidden=40, heads=4, kv_heads=2, head_dim=12, seed=3).write(
        tmp_path_factory.mktemp("tiny")
    )


@pytest.fixture(scope="module")
def reference(folder: Path) -> Engine:
    return open_engine(folder)


def open_engine(folder: Path) -> Engine:
    return Engine.from_pretrained(str(folder), kv_cache_memory="1MiB", block_size=16)


@pytest.fixture
def torch_backend_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine with the reference backend, as on a GPU without Triton."""
    monkeypatch.setattr("trimtab.engine.core.builder.select_backend", lambda *_: REFERENCE_BACKEND)
    return open_engine(folder)


def make_requests() -> list[Request]:
    """Prompts of one and several blocks, logit edits, truncation, and all steering state."""
    greedy = SamplingParams(max_tokens=TOKENS, ignore_eos=True, repetition_penalty=1.2, logit_bias={7: 0.5})
    drawn = SamplingParams(
        max_tokens=TOKENS, ignore_eos=True, temperature=0.8, top_k=40, top_p=0.95, min_p=0.01, seed=5
    )
    top = SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=3)
    return [
        Request("What happens if an earthworm is cut in half?", Amulet([KIND]), greedy),
        Request("Why?", Mato([KIND, SHORT], kl_budget=0.2), drawn),
        Request("What?", Opad([SHORT]), top),
    ]


def assert_same_answers(engine: Engine, other: Engine) -> None:
    for one, two in zip(engine.generate(make_requests()), other.generate(make_requests()), strict=True):
        assert (one.error, one.token_ids) == (None, two.token_ids)
        assert one.trace is not None
        assert two.trace is not None
        for row, exact in zip(one.trace.branch_logprobs, two.trace.branch_logprobs, strict=True):
            assert row == pytest.approx(exact, abs=1e-4)
    assert is_idle(engine)


def test_the_reference_cache_gives_the_outputs_of_the_cpu_cache(
    torch_backend_engine: Engine, reference: Engine
) -> None:
    assert_same_answers(torch_backend_engine, reference)
    ids = [5 + 7 * n % 290 for n in range(40)]
    assert float((torch_backend_engine.score(ids) - reference.score(ids)).abs().max()) < 1e-4


def test_a_step_creates_no_tensor_on_another_device(torch_backend_engine: Engine, reference: Engine) -> None:
    """The default device is meta: a tensor made without a device has no data and fails in any operation."""
    with META:
        outputs = torch_backend_engine.generate(make_requests())
        scored = torch_backend_engine.score([5, 6, 7])
    assert [one.token_ids for one in outputs] == [
        one.token_ids for one in reference.generate(make_requests())
    ]
    assert scored.device == CPU


def test_replayed_steps_give_the_outputs_of_eager_steps(
    torch_backend_engine: Engine, reference: Engine
) -> None:
    runner = get_runner(torch_backend_engine)
    cache: PagedKVCache = runner.cache  # type: ignore[assignment]
    with inference_context():
        runner.cuda_graphs = CUDAGraphRunner(runner.model, cache, 12, 512, fake_capture)
    assert torch_backend_engine.stats.captured == len(capture_batch_sizes(12)) == 5
    replayed, run = [], runner.cuda_graphs.run
    runner.cuda_graphs.run = lambda *args: replayed.append(run(*args)) or replayed[-1]  # type: ignore[method-assign, func-returns-value]
    cache.blocks.fill_(torch.nan)  # blocks that no branch owns must not be read
    assert_same_answers(torch_backend_engine, reference)
    assert [step is None for step in replayed].count(False) >= TOKENS - 1
    assert len({len(step) for step in replayed if step is not None} & {8, 4, 2}) > 0


def test_the_inputs_of_a_captured_step_live_as_long_as_the_step(torch_backend_engine: Engine) -> None:
    runner, read = get_runner(torch_backend_engine), list[weakref.ref[torch.Tensor]]()
    cache: PagedKVCache = runner.cache  # type: ignore[assignment]

    def capture_and_drop(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Keep only the result, as a graph does: it has memory addresses, no tensors."""
        hidden, layout = step(), cache.metadata
        assert layout is not None
        (tiles,) = layout.query_tiles
        read.extend(
            map(
                weakref.ref,
                (tiles.row_start, tiles.pos_start, tiles.num_tokens, tiles.table_row, layout.block_tables),
            )
        )
        return lambda: hidden

    with inference_context():
        graphs = CUDAGraphRunner(runner.model, cache, 2, 512, capture_and_drop)
    cache.metadata = None
    gc.collect()
    assert graphs.num_graphs == 2
    assert len(read) == 10
    assert all(tensor() is not None for tensor in read)


def test_captured_batch_sizes_and_lengths_end_with_the_maximum() -> None:
    assert capture_batch_sizes(48) == [1, 2, 4, 8, 16, 24, 32, 48]
    assert capture_batch_sizes(1000) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert (capture_batch_sizes(1), capture_batch_sizes(5)) == ([1], [1, 2, 4, 5])
    assert capture_seq_lens(8192) == [1024, 4096, 8192]
    assert (capture_seq_lens(300), capture_seq_lens(131_072)[-1]) == ([300], 32_768)


def test_packed_arrays_arrive_unchanged_and_aligned() -> None:
    columns = [
        np.arange(3, dtype=np.int64),
        np.arange(6, dtype=np.int32).reshape(2, 3).T,
        np.array([], np.int64),
        np.array([0.5, -np.inf], np.float32),
        np.array([[2.0**-40]]),
    ]
    packed = transfer.pack_pinned(CPU, columns)
    views = transfer.unpack_views(packed, columns)
    for tensor, column in zip(views, columns, strict=True):
        assert torch.equal(tensor, torch.from_numpy(np.ascontiguousarray(column)))
        assert (tensor.data_ptr() - packed.data_ptr()) % transfer.ALIGNMENT == 0
    assert [tensor.dtype for tensor in transfer.to_device(META, *columns)] == [
        tensor.dtype for tensor in views
    ]
