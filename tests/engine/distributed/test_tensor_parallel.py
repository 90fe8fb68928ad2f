"""Tensor parallelism: the tokens of a single process, and failures with a cause.

Where a token differs from that of one process, it is a tie if the two scores, noise included, differ by at
most TIE_TOLERANCE; an answer is compared up to its first tie.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from trimtab.engine import AsyncEngine, Engine, Mato, Request
from trimtab.kernels.common.errors import InputError, RunError
from trimtab.kernels.steering.gumbel import gumbel

from ...harness import get_core
from ...helpers.invariance_marks import batch_invariant_cpu
from ...helpers.naive_decoders import load_float64
from ...helpers.sample_requests import KIND, METHODS, QUESTION, SHORT, greedy_params, sampled_params
from ...helpers.tiny_model import TinyModel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trimtab.engine.outputs import Output

TIE_TOLERANCE = 1e-3
SMALL_ENGINE = {"kv_cache_memory": "8MiB", "dtype": "float32"}
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9},
    {"top_k": 12, "repetition_penalty": 1.3},
    {"min_p": 0.02, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"top_k": 200, "top_p": 0.999, "logit_bias": {5: 3.0, 299: 4.0, 160: -5.0}, "min_tokens": 5},
]


@dataclass(frozen=True)
class Family(TinyModel):
    """A tiny model with other config fields."""

    fields: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        return {**super().config(), **self.fields}


FOUR_KV_HEADS: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 6, "intermediate": 52}
FAMILIES = {
    "llama": TinyModel(**FOUR_KV_HEADS, tied=False, shards=3),
    "llama-biases": Family(
        **FOUR_KV_HEADS,
        fields={"attention_bias": True, "mlp_bias": True, "architectures": ["LlamaForCausalLM"]},
    ),
    "mistral": Family(
        **FOUR_KV_HEADS, fields={"architectures": ["MistralForCausalLM"], "sliding_window": 24}
    ),
    "qwen2": Family(**FOUR_KV_HEADS, dtype=torch.bfloat16, fields={"architectures": ["Qwen2ForCausalLM"]}),
    "qwen3": Family(**FOUR_KV_HEADS, fields={"architectures": ["Qwen3ForCausalLM"], "head_dim": 6}),
    "granite": Family(
        **FOUR_KV_HEADS,
        fields={
            "architectures": ["GraniteForCausalLM"],
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.5,
            "logits_scaling": 0.7,
        },
    ),
}


def make_requests(tokens: int) -> list[Request]:
    """Every method, greedy and sampled, with every filter."""
    requests = []
    for index, method in enumerate(METHODS):
        requests.append(Request(QUESTION, method, greedy_params(tokens, ignore_eos=True, logprobs=20)))
        filters = FILTERS[index % len(FILTERS)]
        requests.append(Request(QUESTION, method, sampled_params(index, tokens, logprobs=20, **filters)))
    return requests


def is_tie(request: Request, output: Output, token: int, position: int) -> bool:
    """Whether `token` ties with the token at this position of the output."""
    assert output.logprobs is not None
    scores = output.logprobs[position].top
    sampling = request.sampling
    if not {token, output.token_ids[position]} <= set(scores):
        return False
    chosen, other = scores[output.token_ids[position]], scores[token]
    if sampling.temperature:
        noise = gumbel(torch.tensor([output.seed]), torch.tensor([position]), 307)[0]
        chosen, other = (
            score / sampling.temperature + float(noise[i])
            for score, i in ((chosen, output.token_ids[position]), (other, token))
        )
    return abs(chosen - other) <= TIE_TOLERANCE


def agreement_before_ties(
    requests: list[Request], single_rank: list[Output], multi_rank: list[Output]
) -> float:
    """Fraction of tokens before the first tie; asserts that answers differ only from a tie on."""
    count = 0
    for request, single, shared in zip(requests, single_rank, multi_rank, strict=True):
        assert shared.error is None
        pairs = enumerate(zip(single.token_ids, shared.token_ids, strict=False))
        position = next((i for i, (a, b) in pairs if a != b), None)
        if position is not None:
            assert is_tie(request, single, shared.token_ids[position], position), (
                request.steering.name,
                position,
            )
        else:
            assert shared.token_ids == single.token_ids
            assert shared.text == single.text
        count += len(single.token_ids) if position is None else position
    return count / sum(len(output.token_ids) for output in single_rank)


@pytest.fixture(scope="module")
def two_rank_engine(tiny_folder: Path) -> Iterator[Engine]:
    """An engine of the tiny model on two processes."""
    with Engine.from_pretrained(str(tiny_folder), tensor_parallel_size=2, **SMALL_ENGINE) as engine:
        yield engine


def test_two_ranks_generate_the_tokens_of_one_with_every_method_and_filter(
    two_rank_engine: Engine, tiny: Engine
) -> None:
    requests = make_requests(12)
    assert agreement_before_ties(requests, tiny.generate(requests), two_rank_engine.generate(requests)) > 0.9


def test_logprobs_of_two_ranks_are_as_near_to_float64_as_those_of_one(
    two_rank_engine: Engine, tiny: Engine, tiny_folder: Path
) -> None:
    model = load_float64(tiny_folder)
    request = Request(QUESTION, Mato([KIND, SHORT]), greedy_params(16, ignore_eos=True))
    one, several = tiny.generate(request), two_rank_engine.generate(request)
    assert several.token_ids == one.token_ids
    for index, branch in enumerate(one.branches):
        ids = torch.tensor([[*branch.prompt_token_ids, *one.token_ids]])
        with torch.inference_mode():
            logprobs = model(ids).logits[0, len(branch.prompt_token_ids) - 1 : -1].log_softmax(-1)
        truth = logprobs.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
        assert one.trace is not None
        assert several.trace is not None
        errors = [
            (torch.tensor(output.trace.branch_logprobs).double()[:, index] - truth).abs().max()
            for output in (one, several)
            if output.trace
        ]
        assert errors[1] <= 2 * errors[0] + 1e-5
    ids = one.branches[0].prompt_token_ids
    assert torch.allclose(two_rank_engine.score(ids), tiny.score(ids), atol=1e-4)


@batch_invariant_cpu
def test_a_request_on_two_ranks_gives_the_same_bits_alone_and_batched(two_rank_engine: Engine) -> None:
    requests = make_requests(6)
    together = two_rank_engine.generate(requests)
    for index in (1, 7, 16):
        alone = two_rank_engine.generate(requests[index])
        assert (alone.token_ids, alone.trace) == (together[index].token_ids, together[index].trace)
        assert alone.logprobs == together[index].logprobs


@pytest.mark.parametrize(
    ("sizes", "size", "message"),
    [
        (
            TinyModel(),
            4,
            "tensor_parallel_size is 4; it must divide the model's 6 heads, 2 KV heads",
        ),
        (
            TinyModel(intermediate=51),
            2,
            "it must divide the model's 6 heads, 2 KV heads and intermediate size 51",
        ),
    ],
)
def test_a_model_that_cannot_be_sharded_is_refused_with_its_numbers(
    tmp_path: Path, sizes: TinyModel, size: int, message: str
) -> None:
    folder = sizes.write(tmp_path / "model")
    with pytest.raises(InputError, match=message):
        Engine.from_pretrained(str(folder), tensor_parallel_size=size)


@pytest.mark.parametrize("size", [0, -1, 1025])
def test_a_tensor_parallel_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises(InputError, match=rf"tensor_parallel_size is {size}; it must be an integer from 1"):
        Engine.from_pretrained(tensor_parallel_size=size)


def test_a_tensor_parallel_size_other_than_torchruns_world_size_is_refused(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        InputError, match="tensor_parallel_size is 2, and WORLD_SIZE, which torchrun sets, is 3"
    ):
        Engine.from_pretrained(str(tiny_folder), tensor_parallel_size=2)


def worker_pids(engine: Engine | AsyncEngine) -> list[int]:
    """Process ids of the engine's workers."""
    ranks = get_core(engine).tp_group
    assert ranks is not None
    assert ranks._workers is not None
    return [process.pid for process in ranks._workers._processes.values()]


def is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def all_exited(pids: list[int], timeout: float) -> bool:
    """Whether all processes exit within `timeout` seconds."""
    until = time.monotonic() + timeout
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def test_a_killed_process_ends_the_engine_within_five_seconds_with_the_cause(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), tensor_parallel_size=2, **SMALL_ENGINE)
    pieces = engine.stream(Request(QUESTION, Mato([KIND, SHORT]), greedy_params(400, ignore_eos=True)))
    next(pieces)
    os.kill(worker_pids(engine)[0], signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RunError, match="the engine has ended: rank 1 of 2 was killed by SIGKILL"):
        list(pieces)
    assert time.monotonic() - start < 5
    with pytest.raises(RunError, match="the engine has ended: rank 1 of 2 was killed by SIGKILL"):
        engine.generate(Request(QUESTION))


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_generate_the_tokens_of_one_in_every_architecture(
    tmp_path: Path, family: str, size: int
) -> None:
    folder = str(FAMILIES[family].write(tmp_path / "model"))
    requests = make_requests(32)
    one = Engine.from_pretrained(folder, **SMALL_ENGINE).generate(requests)
    with Engine.from_pretrained(folder, tensor_parallel_size=size, **SMALL_ENGINE) as engine:
        assert agreement_before_ties(requests, one, engine.generate(requests)) > 0.9


@pytest.mark.long
def test_sharded_dummy_weights_are_those_of_one_rank(tmp_path: Path) -> None:
    folder = str(replace(TinyModel(), intermediate=48).write(tmp_path / "model"))
    fields = {**SMALL_ENGINE, "load_format": "dummy", "tensor_parallel_size": 2}
    with Engine.from_pretrained(folder, **fields) as engine:
        one = Engine.from_pretrained(folder, **{**fields, "tensor_parallel_size": 1})
        assert torch.allclose(engine.score([5, 6, 7]), one.score([5, 6, 7]), atol=1e-5)


@pytest.mark.long
def test_requests_preempted_for_lack_of_blocks_give_the_same_answers(tiny_folder: Path) -> None:
    requests = [
        Request(f"{QUESTION} {index}", Mato([KIND, SHORT]), sampled_params(index, 40)) for index in range(6)
    ]
    fields = {"dtype": "float32", "block_size": 16, "tensor_parallel_size": 2}
    with Engine.from_pretrained(str(tiny_folder), kv_cache_memory="8MiB", **fields) as engine:
        roomy = engine.generate(requests)
    with Engine.from_pretrained(str(tiny_folder), kv_cache_memory="70KiB", **fields) as engine:
        tight = engine.generate(requests)
        assert engine.stats.preemptions > 0
    assert [output.token_ids for output in tight] == [output.token_ids for output in roomy]


@pytest.mark.long
def test_an_idle_service_learns_within_five_seconds_that_a_process_was_killed(tiny_folder: Path) -> None:
    engine = AsyncEngine.from_pretrained(str(tiny_folder), tensor_parallel_size=2, **SMALL_ENGINE)
    assert engine.submit(Request(QUESTION, sampling=greedy_params(3))).result(60).token_ids
    os.kill(worker_pids(engine)[0], signal.SIGKILL)
    until = time.monotonic() + 5
    while engine.refusal is None and time.monotonic() < until:
        time.sleep(0.02)
    assert engine.refusal == "the engine has ended: rank 1 of 2 was killed by SIGKILL"
    with pytest.raises(RunError, match="rank 1 of 2"):
        engine.submit(Request(QUESTION))
    engine.shutdown()


@pytest.mark.long
def test_closing_an_engine_ends_its_processes_and_refuses_requests(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), tensor_parallel_size=2, **SMALL_ENGINE)
    started = worker_pids(engine)
    assert all(map(is_alive, started))
    engine.close()
    engine.close()
    assert not any(map(is_alive, started))
    with pytest.raises(RunError, match="the engine has ended: it was closed"):
        engine.generate(Request(QUESTION))


@pytest.mark.long
@pytest.mark.usefixtures("gc_disabled")
def test_an_engine_still_answers_after_an_interrupt(tiny_folder: Path) -> None:
    with Engine.from_pretrained(str(tiny_folder), tensor_parallel_size=2, **SMALL_ENGINE) as engine:
        expected = engine.generate(Request(QUESTION, sampling=greedy_params(5))).token_ids
        pieces = engine.stream(Request(QUESTION, Mato([KIND, SHORT]), greedy_params(450, ignore_eos=True)))
        next(pieces)
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            list(pieces)
        timer.join()
        assert engine.generate(Request(QUESTION, sampling=greedy_params(5))).token_ids == expected


HOLD_PROGRAM = """
import sys
from trimtab import Engine
engine = Engine.from_pretrained(sys.argv[1], tensor_parallel_size=2, kv_cache_memory="8MiB")
print(*[p.pid for p in engine._core.tp_group._workers._processes.values()], flush=True)
sys.stdin.read()
"""


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, None])
def test_however_the_first_process_ends_no_worker_stays_behind(
    tiny_folder: Path, number: signal.Signals | None
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_PROGRAM, str(tiny_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout is not None
        pids = [int(pid) for pid in first.stdout.readline().split()]
        assert pids
        assert all(map(is_alive, pids))
        if number is None:
            first.communicate("")
        else:
            first.send_signal(number)
        assert all_exited(pids, 5)


ANSWER_PROGRAM = """
import sys
from trimtab import Engine, Mato, Objective, Request, SamplingParams
engine = Engine.from_pretrained(sys.argv[1], tensor_parallel_size=2, kv_cache_memory="8MiB")
objectives = [Objective("Be kind."), Objective("Be brief.")]
print(engine.generate(Request("Why?", Mato(objectives), SamplingParams(max_tokens=9))).token_ids)
"""


@pytest.mark.long
def test_under_torchrun_the_same_program_gives_one_answer(tiny_folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "answer.py"
    program.write_text(ANSWER_PROGRAM)
    runs = [
        [sys.executable, str(program)],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program)],
    ]
    ended = [
        subprocess.run([*run, str(tiny_folder)], capture_output=True, text=True, check=False, timeout=120)
        for run in runs
    ]
    assert [each.returncode for each in ended] == [0, 0], ended[1].stderr
    assert ended[0].stdout == ended[1].stdout
    assert ended[0].stdout.startswith("[")
