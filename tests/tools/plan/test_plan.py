"""`trimtab plan`: costs against kernel specs, TPOT against a simulation, rooflines against real steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trimtab.engine.engine import Engine
from trimtab.engine.methods.builtin import Base
from trimtab.kernels.specs.layers import LAYER_SPECS
from trimtab.models import roofline
from trimtab.models.config import ModelConfig
from trimtab.models.loader.presets import PRESETS
from trimtab.tools import plan
from trimtab.tools.common import machine_peaks
from trimtab.tools.gpu import step_benchmark
from trimtab.tools.plan.config import PlanConfig
from trimtab.tools.plan.replica import Replica

from ...helpers.tiny_model import TinyModel, write_json
from ..conftest import CommandResult

Run = Callable[..., CommandResult]
LLAMA = ModelConfig.from_dict(PRESETS["llama-3.1-8b"])
LLAMA_70B = ("--model", "llama-3.1-70b", "--gpu", "h200", "--rps", "50", "--branches", "5")
LONG = ("--prompt", "600", "--output", "300")


def run_plan(run: Run, *words: str) -> Any:
    ran = run("plan", *words, "--json")
    assert (ran.status, ran.stderr, ran.stdout.count("\n")) == (0, "", 1)
    return json.loads(ran.stdout)["plans"]


def make_config(**more: Any) -> Replica:
    config = PlanConfig(**{"model": "llama-3.1-8b", "prompt": 600, "output": 300, "branches": 5, **more})
    return plan.plan_load(config)["steered"].replica


def test_step_costs_match_the_kernel_specs() -> None:
    cases = {(spec.name, case.name): case.cost for spec in LAYER_SPECS for case in spec.cases}
    costs_16 = {part.cost for part in roofline.decode_step_ops(LLAMA, 16, 100, 2)}
    assert cases["rms_norm", "Llama 3.1 8B, 16 rows"] in costs_16
    assert cases["swiglu", "Llama 3.1 8B, 16 rows"] in costs_16
    assert cases["rope_write", "Llama 3.1 8B, 16 rows, with norms"] in costs_16
    costs_5 = {part.cost for part in roofline.decode_step_ops(LLAMA, 5, 2048, 2)}
    assert cases["paged_attention", "Llama 3.1 8B, 5 decoding at 2048"] in costs_5


def test_a_step_reads_and_multiplies_each_weight_once() -> None:
    matrices = roofline.weight_bytes(LLAMA, 2) - 2 * LLAMA.hidden_size * (2 * LLAMA.num_layers + 1)
    few, many = ({p: p.cost for p in roofline.decode_step_ops(LLAMA, rows, 1, 2)} for rows in (0, 7))
    products = [p for p in few if p.stage in roofline.MATMUL_STAGES]
    assert sum(p.bytes for p in products) == matrices
    flops = sum(p.flops for p in many if p.stage in roofline.MATMUL_STAGES)
    assert flops == 7 * matrices  # 2 flops per weight, 2 bytes per weight


def test_a_sliding_window_bounds_the_kv_bytes_of_a_layer() -> None:
    windowed = replace(LLAMA, sliding_windows=(64,) * 8 + (None,) * 24)
    read = sum(p.bytes for p in roofline.decode_step_ops(windowed, 1, 1000, 2) if p.stage == "attention")
    attention_flops = 2 * LLAMA.num_layers * LLAMA.num_heads * LLAMA.head_dim * 2
    assert read - attention_flops == roofline.kv_bytes(windowed, 1, 1000, 2)
    assert (
        roofline.kv_bytes(windowed, 1, 1000, 2) == LLAMA.kv_elements_per_token * 2 * (8 * 64 + 24 * 1000) / 32
    )


def test_chunked_prefill_reads_the_weights_once_per_chunk_with_equal_flops() -> None:
    runs = [roofline.SequenceShape(3, 500, 500)]
    once, thrice = (roofline.step_ops(LLAMA, runs, 3, 2, num_forwards=passes) for passes in (1, 3))
    assert sum(p.flops for p in thrice) == pytest.approx(sum(p.flops for p in once))
    more = sum(p.bytes for p in thrice) - sum(p.bytes for p in once)
    layers = roofline.weight_bytes(LLAMA, 2) - 2 * LLAMA.hidden_size * (
        LLAMA.vocab_size + 2 * LLAMA.num_layers
    )
    assert more == pytest.approx(2 * layers, rel=1e-3)


def test_tensor_parallel_shards_add_up_to_the_model() -> None:
    unsharded, half = (roofline.decode_step_ops(LLAMA, 5, 700, 2, shares) for shares in (1, 2))
    for one, other in zip(unsharded, half, strict=True):
        if one.stage not in ("embed", "norm", "steer"):  # replicated on each device
            assert 2 * other.flops == one.flops
            assert one.bytes <= 2 * other.bytes < one.bytes + 4e7  # both read the activations


def test_requests_in_flight_follow_littles_law(run: Run) -> None:
    for name, estimate in run_plan(run, *LLAMA_70B, *LONG).items():
        rate = 50 * (5 if name == "uncoupled" else 1) / estimate["replicas"]
        assert estimate["requests_in_flight"] == pytest.approx(rate * 300 * estimate["tpot_ms"] / 1e3)
        assert estimate["rows_in_flight"] == estimate["requests_in_flight"] * (5 if name == "steered" else 1)
        assert estimate["rows_in_flight"] <= estimate["most_rows"]
        assert estimate["load"] <= 0.8


def test_tpot_matches_a_simulated_replica() -> None:
    """Requests arrive at regular times; a step of n takes S(n), a prefill takes P."""
    replica = make_config(gpu="h100")
    rate, now, done, spans = 0.6 * replica.request_rate(replica.max_requests), 0.0, 0, []
    running: list[list[float]] = []  # time of the first token, and remaining tokens
    while done < 400:
        if done + len(running) < int(now * rate):
            now += replica.prefill_time
            running.append([now, replica.demand.output_len])
            continue
        now += replica.step_time(len(running)) if running else 1e-3
        for request in running:
            request[1] -= 1
        spans += [(now - start) / replica.demand.output_len for start, left in running if not left]
        done += sum(not left for _, left in running)
        running = [request for request in running if request[1]]
    settled = sorted(spans[200:])
    assert settled[100] == pytest.approx(replica.tpot(replica.concurrency(rate)), rel=0.1)


def test_a_common_prefix_is_computed_and_cached_once(run: Run) -> None:
    unshared, shared_prefix = (
        run_plan(run, *LLAMA_70B, *LONG, "--shared", str(shared)) for shared in (0, 530)
    )
    cached_tokens = 530 // 64 * 64
    saved = 4 * cached_tokens * 2 * 80 * 8 * 128 * 2
    for name in ("plain", "uncoupled"):
        assert shared_prefix[name] == unshared[name]
    one, other = shared_prefix["steered"], unshared["steered"]
    assert 5 * (other["kv_bytes_per_row"] - one["kv_bytes_per_row"]) == pytest.approx(saved)
    share = (600 + 4 * (600 - cached_tokens)) / 3000
    assert one["prefill_flops"] / other["prefill_flops"] == pytest.approx(share, rel=0.01)
    assert one["gpus"] < other["gpus"]


def test_more_gpus_per_replica_are_faster_with_less_memory_each(run: Run) -> None:
    two, eight = (
        run_plan(run, *LLAMA_70B, *LONG, "--tensor-parallel-size", str(n))["steered"] for n in (2, 8)
    )
    assert eight["weight_bytes"] == two["weight_bytes"] / 4
    assert two["step_floor_ms"] / 4 < eight["step_floor_ms"] < two["step_floor_ms"]
    assert eight["prefill_ms"] < two["prefill_ms"]


def test_a_step_has_two_messages_per_layer_and_one_for_the_logits() -> None:
    replica = replace(make_config(), tp_size=4)
    slower = replace(
        replica,
        assumptions=replace(replica.assumptions, message_latency=replica.assumptions.message_latency + 1e-3),
    )
    assert slower.step_time(3) - replica.step_time(3) == pytest.approx(1e-3 * (2 * 32 + 1))
    single = replace(slower, tp_size=1)
    assert single.step_time(3) == pytest.approx(single.min_step_time(3) / 0.7)


def test_a_tpot_limit_is_met_with_more_gpus(run: Run) -> None:
    free, limited = run_plan(run, *LLAMA_70B, *LONG), run_plan(run, *LLAMA_70B, *LONG, "--tpot-ms", "20")
    assert limited["steered"]["tpot_ms"] <= 20 < free["steered"]["tpot_ms"]
    assert limited["steered"]["gpus"] > free["steered"]["gpus"]


def test_cost_is_gpu_hours_times_price(run: Run) -> None:
    estimate = run_plan(run, *LLAMA_70B, *LONG, "--price", "3")["plain"]
    assert estimate["gpu_hours_per_million"] == pytest.approx(estimate["gpus"] / 15_000 * 1e6 / 3600)
    assert estimate["cost_per_million"] == pytest.approx(3 * estimate["gpu_hours_per_million"])


def test_without_json_a_table_has_the_assumptions_in_its_title(run: Run, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", TinyModel().config())
    ran = run("plan", "--model", str(tmp_path), "--gpu", "a100", "--efficiency", "0.5")
    assert (ran.status, ran.stderr) == (0, "")
    assert "50%" in ran.stdout
    assert "steered" in ran.stdout
    assert "device hours per million tokens" in ran.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--gpu", "v100"), "gpu is 'v100'; it must be one of a100, h100, h200, b200, mi300x, cpu"),
        (("--rps", "0"), "rps is 0.0; it must be a number above 0"),
        (("--rps", "inf"), "rps is inf; it must be a number above 0"),
        (("--branches", "0"), "branches is 0; it must be an integer ≥ 1"),
        (("--shared", "128"), "shared is 128; it must be from 0 to less than prompt (128)"),
        (("--efficiency", "1.5"), "efficiency is 1.5; it must be above 0 and at most 1"),
        (("--model", "nowhere"), "model is 'nowhere'; it must be 'demo', a folder with config.json"),
        (
            ("--model", "llama-3.1-8b", "--prompt", "140000"),
            "prompt and output are 140064 tokens; llama-3.1-8b takes 131072",
        ),
        (
            ("--model", "llama-3.1-70b", "--tensor-parallel-size", "3"),
            "tensor_parallel_size is 3; with 64 heads and 8 KV heads on H100 it must be one of 1, 2, 4, 8",
        ),
        (
            ("--model", "llama-3.1-70b", "--prompt", "130000", "--branches", "20"),
            "the model does not fit: weights, the largest step and one request take 926 GiB; the "
            "largest configuration, 8 x H100, has 536 GiB",
        ),
        (
            ("--model", "llama-3.1-70b", "--tpot-ms", "1"),
            "tpot_ms is 1; on 8 x H100 one request takes ",
        ),
    ],
)
def test_invalid_input_is_reported_in_one_sentence(run: Run, words: tuple[str, ...], sentence: str) -> None:
    ran = run("plan", *words)
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"trimtab: {sentence}")
    assert ran.stderr.count("\n") == 1


@pytest.mark.long
def test_a_demo_model_step_takes_at_least_its_roofline_time_on_this_cpu(demo_folder: Path) -> None:
    """Prints the ratio of measured step time to roofline time."""
    engine = Engine.from_pretrained(str(demo_folder), dtype="bfloat16", enable_prefix_caching=False)
    for requests in (1, 16):
        config = PlanConfig(model=str(demo_folder), gpu="cpu", branches=1, prompt=128, output=40)
        measured = min(
            step_benchmark.time_steps(engine, step_benchmark.StepLoad(requests, Base(), 128), 40)[1]
        )
        floor = plan.plan_load(config)["plain"].replica.min_step_time(requests)
        print(f"{requests} rows: floor {1e3 * floor:.1f} ms, step / floor {measured / floor:.2f}")
        assert measured > 0.8 * floor  # the peaks are measured, too, on a machine that may be busy


def test_a_cpu_plan_uses_its_measured_peaks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "config.json", TinyModel().config())
    monkeypatch.setattr(
        machine_peaks, "measure_peaks", lambda dtype, device: machine_peaks.MachinePeaks(1e6, 1e12)
    )
    plans = run_plan(run, "--model", str(tmp_path), "--gpu", "cpu", "--branches", "1", "--efficiency", "0.5")
    assert plans["plain"]["step_floor_ms"] == pytest.approx(1e3 * plans["plain"]["step_bytes"] / 1e6)
    assert plans["plain"]["step_ms"] == 2 * plans["plain"]["step_floor_ms"]
