"""`trimtab plan`: counts beside the kernels', a queue beside a simulated one, floors beside real steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trimtab.engine.engine import Engine
from trimtab.engine.methods.builtin import Base
from trimtab.models import roofline
from trimtab.models.config import ModelConfig
from trimtab.models.loader.presets import PRESETS
from trimtab.tools import plan
from trimtab.tools.common import machine_peaks
from trimtab.tools.gpu import step_benchmark
from trimtab.tools.plan.config import Asked
from trimtab.tools.plan.replica import Replica

from ...helpers.tiny_model import Tiny, write_json
from ..conftest import Ran

Run = Callable[..., Ran]
LLAMA = ModelConfig.from_dict(PRESETS["llama-3.1-8b"])
BIG = ("--model", "llama-3.1-70b", "--gpu", "h200", "--rps", "50", "--branches", "5")
LONG = ("--prompt", "600", "--output", "300")


def plans(run: Run, *words: str) -> Any:
    ran = run("plan", *words, "--json")
    assert (ran.status, ran.err, ran.out.count("\n")) == (0, "", 1)
    return json.loads(ran.out)["plans"]


def steered(**more: Any) -> Replica:
    asked = Asked(**{"model": "llama-3.1-8b", "prompt": 600, "output": 300, "branches": 5, **more})
    return plan.planned(asked)["steered"].replica


def test_a_step_counts_with_the_bytes_that_kernels_are_timed_by() -> None:
    pytest.importorskip("triton")
    from trimtab.kernels.specs.layers import LAYER_SPECS  # noqa: PLC0415

    cases = {(spec.name, case.name): case.work for spec in LAYER_SPECS for case in spec.cases}
    of_16 = {part.work for part in roofline.decoding(LLAMA, 16, 100, 2)}
    assert cases["rms_norm", "Llama 3.1 8B, 16 rows"] in of_16
    assert cases["swiglu", "Llama 3.1 8B, 16 rows"] in of_16
    assert cases["rope_write", "Llama 3.1 8B, 16 rows, with norms"] in of_16
    of_5 = {part.work for part in roofline.decoding(LLAMA, 5, 2048, 2)}
    assert cases["paged_attention", "Llama 3.1 8B, 5 decoding at 2048"] in of_5


def test_a_step_reads_every_weight_once_and_multiplies_by_each() -> None:
    matrices = roofline.weight_bytes(LLAMA, 2) - 2 * LLAMA.hidden_size * (2 * LLAMA.num_layers + 1)
    few, many = ({p: p.work for p in roofline.decoding(LLAMA, rows, 1, 2)} for rows in (0, 7))
    products = [p for p in few if p.stage in roofline.PRODUCTS]
    assert sum(p.bytes for p in products) == matrices
    flops = sum(p.flops for p in many if p.stage in roofline.PRODUCTS)
    assert flops == 7 * matrices  # two for each number of two bytes


def test_a_window_bounds_what_a_layer_reads_and_computes() -> None:
    windowed = replace(LLAMA, windows=(64,) * 8 + (None,) * 24)
    read = sum(p.bytes for p in roofline.decoding(windowed, 1, 1000, 2) if p.stage == "attention")
    own = 2 * LLAMA.num_layers * LLAMA.num_heads * LLAMA.head_dim * 2
    assert read - own == roofline.kv_bytes(windowed, 1, 1000, 2)
    assert roofline.kv_bytes(windowed, 1, 1000, 2) == LLAMA.kv_size * 2 * (8 * 64 + 24 * 1000) / 32


def test_prompts_in_pieces_read_the_weights_once_a_piece_and_compute_the_same() -> None:
    runs = [roofline.Run(3, 500, 500)]
    once, thrice = (roofline.parts(LLAMA, runs, 3, 2, passes=passes) for passes in (1, 3))
    assert sum(p.flops for p in thrice) == pytest.approx(sum(p.flops for p in once))
    more = sum(p.bytes for p in thrice) - sum(p.bytes for p in once)
    layers = roofline.weight_bytes(LLAMA, 2) - 2 * LLAMA.hidden_size * (
        LLAMA.vocab_size + 2 * LLAMA.num_layers
    )
    assert more == pytest.approx(2 * layers, rel=1e-3)


def test_shares_of_a_model_add_up_to_it() -> None:
    whole, half = (roofline.decoding(LLAMA, 5, 700, 2, shares) for shares in (1, 2))
    for one, other in zip(whole, half, strict=True):
        if one.stage not in ("embed", "norm", "steer"):  # each device does those for itself
            assert 2 * other.flops == one.flops
            assert one.bytes <= 2 * other.bytes < one.bytes + 4e7  # activations are read by both


def test_what_is_in_flight_is_what_little_says(run: Run) -> None:
    for name, found in plans(run, *BIG, *LONG).items():
        rate = 50 * (5 if name == "uncoupled" else 1) / found["replicas"]
        assert found["requests_in_flight"] == pytest.approx(rate * 300 * found["tpot_ms"] / 1e3)
        assert found["rows_in_flight"] == found["requests_in_flight"] * (5 if name == "steered" else 1)
        assert found["rows_in_flight"] <= found["most_rows"]
        assert found["load"] <= 0.8


def test_tokens_come_as_in_a_simulated_replica() -> None:
    """Requests at regular times; a step takes S(n) of those that run, a prompt P before its request runs."""
    one = steered(gpu="h100")
    rate, now, done, spans = 0.6 * one.rate(one.most), 0.0, 0, []
    running: list[list[float]] = []  # when the first token was there, and tokens left
    while done < 400:
        if done + len(running) < int(now * rate):
            now += one.prefill
            running.append([now, one.demand.output])
            continue
        now += one.step(len(running)) if running else 1e-3
        for request in running:
            request[1] -= 1
        spans += [(now - start) / one.demand.output for start, left in running if not left]
        done += sum(not left for _, left in running)
        running = [request for request in running if request[1]]
    settled = sorted(spans[200:])
    assert settled[100] == pytest.approx(one.tpot(one.in_flight(rate)), rel=0.1)


def test_a_common_beginning_is_computed_and_held_once(run: Run) -> None:
    apart, common = (plans(run, *BIG, *LONG, "--shared", str(shared)) for shared in (0, 530))
    pages = 530 // 64 * 64
    saved = 4 * pages * 2 * 80 * 8 * 128 * 2
    for name in ("plain", "uncoupled"):
        assert common[name] == apart[name]
    one, other = common["steered"], apart["steered"]
    assert 5 * (other["kv_bytes_per_row"] - one["kv_bytes_per_row"]) == pytest.approx(saved)
    share = (600 + 4 * (600 - pages)) / 3000
    assert one["prefill_flops"] / other["prefill_flops"] == pytest.approx(share, rel=0.01)
    assert one["gpus"] < other["gpus"]


def test_more_gpus_a_model_are_quicker_and_hold_less_each(run: Run) -> None:
    two, eight = (plans(run, *BIG, *LONG, "--tensor-parallel-size", str(n))["steered"] for n in (2, 8))
    assert eight["weight_bytes"] == two["weight_bytes"] / 4
    assert two["step_floor_ms"] / 4 < eight["step_floor_ms"] < two["step_floor_ms"]
    assert eight["prefill_ms"] < two["prefill_ms"]


def test_messages_among_gpus_take_two_an_layer_and_one_for_the_logits() -> None:
    one = replace(steered(), shares=4)
    dear = replace(one, terms=replace(one.terms, message=one.terms.message + 1e-3))
    assert dear.step(3) - one.step(3) == pytest.approx(1e-3 * (2 * 32 + 1))
    lone = replace(dear, shares=1)
    assert lone.step(3) == pytest.approx(lone.floor(3) / 0.7)


def test_a_limit_of_the_time_between_tokens_is_kept_and_costs_gpus(run: Run) -> None:
    free, held = plans(run, *BIG, *LONG), plans(run, *BIG, *LONG, "--tpot-ms", "20")
    assert held["steered"]["tpot_ms"] <= 20 < free["steered"]["tpot_ms"]
    assert held["steered"]["gpus"] > free["steered"]["gpus"]


def test_a_price_makes_costs_of_gpu_hours(run: Run) -> None:
    found = plans(run, *BIG, *LONG, "--price", "3")["plain"]
    assert found["gpu_hours_per_million"] == pytest.approx(found["gpus"] / 15_000 * 1e6 / 3600)
    assert found["cost_per_million"] == pytest.approx(3 * found["gpu_hours_per_million"])


def test_people_get_a_table_with_the_assumptions_above(run: Run, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", Tiny().config())
    ran = run("plan", "--model", str(tmp_path), "--gpu", "a100", "--efficiency", "0.5")
    assert (ran.status, ran.err) == (0, "")
    assert "50%" in ran.out
    assert "steered" in ran.out
    assert "device hours for a million" in ran.out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--gpu", "v100"), "gpu is 'v100'; it must be one of a100, h100, h200, b200, mi300x, cpu"),
        (("--rps", "0"), "rps is 0.0; it must be a number above 0"),
        (("--rps", "inf"), "rps is inf; it must be a number above 0"),
        (("--branches", "0"), "branches is 0; it must be a whole number ≥ 1"),
        (("--shared", "128"), "shared is 128; it must be from 0 to less than prompt (128)"),
        (("--efficiency", "1.5"), "efficiency is 1.5; it must be above 0 and at most 1"),
        (("--model", "nowhere"), "model is 'nowhere'; it must be 'demo', a folder with config.json"),
        (
            ("--model", "llama-3.1-8b", "--prompt", "140000"),
            "prompt and output are 140064 tokens; llama-3.1-8b takes 131072",
        ),
        (
            ("--model", "llama-3.1-70b", "--tensor-parallel-size", "3"),
            "tensor_parallel_size is 3; 64 heads, 8 for keys and values, go on 1, 2, 4, 8 of H100",
        ),
        (
            ("--model", "llama-3.1-70b", "--prompt", "130000", "--branches", "20"),
            "the model does not fit: weights, the largest step and one request take 926 GiB, and of 8 x "
            "H100, the most that it can be shared among, 536 may be used",
        ),
        (
            ("--model", "llama-3.1-70b", "--tpot-ms", "1"),
            "tpot_ms is 1; on 8 x H100 one request takes ",
        ),
    ],
)
def test_wrong_input_is_one_sentence(run: Run, words: tuple[str, ...], sentence: str) -> None:
    ran = run("plan", *words)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.startswith(f"trimtab: {sentence}")
    assert ran.err.count("\n") == 1


@pytest.mark.long
def test_a_step_of_the_demo_takes_at_least_its_floor_on_this_cpu(demo_folder: Path) -> None:
    """The ratio is printed: how far this machine's steps are from its roofs."""
    engine = Engine.from_pretrained(str(demo_folder), dtype="bfloat16", enable_prefix_caching=False)
    for requests in (1, 16):
        asked = Asked(model=str(demo_folder), gpu="cpu", branches=1, prompt=128, output=40)
        measured = min(step_benchmark.times(engine, step_benchmark.Load(requests, Base(), 128), 40)[1])
        at_least = plan.planned(asked)["plain"].replica.floor(requests)
        print(f"{requests} rows: floor {1e3 * at_least:.1f} ms, step / floor {measured / at_least:.2f}")
        assert measured > 0.8 * at_least  # both are measured, on a machine that may be busy


def test_a_cpu_is_planned_by_its_own_roofs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "config.json", Tiny().config())
    monkeypatch.setattr(machine_peaks, "measured", lambda dtype, device: machine_peaks.Roof(1e6, 1e12))
    found = plans(run, "--model", str(tmp_path), "--gpu", "cpu", "--branches", "1", "--efficiency", "0.5")
    assert found["plain"]["step_floor_ms"] == pytest.approx(1e3 * found["plain"]["step_bytes"] / 1e6)
    assert found["plain"]["step_ms"] == 2 * found["plain"]["step_floor_ms"]
