"""GPU microbenchmarks that complement `tools/gpu_check`; run in a few minutes.

    roof        memory bandwidth of copies and reads; always runs first, other parts refer to it
    gemm        the vendor's matmuls at few rows, in the shapes of Llama 3.1 8B
    attention   decode attention over the paged KV cache; $SHAPES, as in 80x512, sets other rows and lengths
    empties     the same launched for a longer context, as in a captured step: many programs exit at once
    head        the LM head with steering, and each alone
    steps       decode steps of Llama 3.1 8B with random weights, against the memory roofline
    hf          transformers with guidance_scale, in the same shape

`python -m trimtab.tools.gpu.probe PART...` runs the parts in the order named; all if none is named. With
--small everything is tiny and runs on a CPU in Triton's interpreter: this tests the program, and the figures
have no meaning. The file can also be run by its path if `trimtab` can be imported.

A call's time is that of a CUDA graph of many calls, divided by their number. The calls rotate over buffers
that together are larger than the L2 cache. Rows are printed as they are measured and written to probe.json in
the folder $OUT. A part that fails is recorded there under "failed", does not stop the others, and makes the
exit status 1.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

# absolute imports, so that this file can be run by its path
from trimtab.engine.methods.builtin import Base, Mato
from trimtab.engine.utils.json import dumps
from trimtab.kernels.lm_head import logits_matmul
from trimtab.kernels.reference.paged_attention import QueryTiles
from trimtab.kernels.specs.steering import GREEDY, MATO
from trimtab.kernels.steering.coefficients import SteeringCoefficients
from trimtab.kernels.steering.layout import RequestLayout
from trimtab.kernels.steering.state import SteeringState
from trimtab.tools.common import roofline
from trimtab.tools.gpu import tiny_models
from trimtab.tools.gpu.open_engine import open_engine
from trimtab.tools.gpu.step_benchmark import OBJECTIVES, StepLoad, StepPlan, time_steps, with_model

if TYPE_CHECKING:
    from torch import Tensor
    from trimtab.engine.engine import Engine

    Call = Callable[[], Any]

ROTATED, ROTATED_SMALL = 400 << 20, 1 << 16
"""Minimum total bytes of the buffers of one measurement."""
REPEATS, REPLAYS, WARMUP = 20, 15, 2
"""Minimum calls in a graph, timed replays, and warm-up replays."""
BLOCK = 64
"""Tokens per KV block."""
ROWS = (1, 5, 8, 16, 32, 80, 320)
PRODUCTS = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28_672, 4096), "down": (4096, 14_336)}
ADDED = ("o", "down")
"""Matmuls whose result is added to the residual."""
TEXTS = "1x512 5x512 5x2048 80x512 80x1100 320x512 32x2048 8x8192 1x65536"
LONGEST = (640, 1024, 4096, 16_384, 32_768)
BATCHES = ((1, 0), (1, 4), (16, 4), (64, 4))
"""(requests per batch, objectives per request)."""


def _load(requests: int, num_objectives: int, context: int) -> StepLoad:
    return StepLoad(requests, Mato(OBJECTIVES[:num_objectives]) if num_objectives else Base(), context)


MODEL = "llama-3.1-8b"
FIELDS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 4096,
    "max_num_batched_tokens": 8192,
    "kv_cache_memory": "48GiB",
}
ALONE = (_load(1, 0, 512), _load(1, 1, 512), _load(1, 4, 512), _load(1, 4, 2048))
TOGETHER = (_load(16, 0, 512), _load(16, 4, 512), _load(16, 4, 1100))
CROWDED = (_load(64, 0, 512), _load(64, 4, 512))
PLANS = (
    StepPlan(MODEL, FIELDS | {"max_num_seqs": 80}, ALONE + TOGETHER, 60, ()),
    StepPlan(MODEL, FIELDS | {"max_num_seqs": 320}, CROWDED, 60, ()),
)
LITTLE_FIELDS = {"dtype": "float32", "kv_cache_memory": "1MiB", "max_num_seqs": 8}
LITTLE = StepPlan("", LITTLE_FIELDS, (_load(1, 0, 20), _load(1, 4, 20)), 2, ())
GUIDED = "guidance_scale=1.5"


@dataclass
class Report:
    """Rows by part and name; each is printed when added, and all are then written to `folder`."""

    folder: Path | None
    rows: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def add(self, part: str, name: str, /, **figures: Any) -> None:
        self.rows.setdefault(part, {})[name] = figures
        line = " ".join(f"{key}={_number(value)}" for key, value in figures.items())
        print(f"{part:<10} {name:<44} {line}", flush=True)
        if self.folder is not None:
            tmp_path = self.folder / ".probe.json.part"
            tmp_path.write_text(dumps(self.rows) + "\n", encoding="utf-8")
            tmp_path.replace(self.folder / "probe.json")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Probe:
    """Measures calls on a device. small: tiny shapes on a CPU."""

    device: torch.device
    small: bool
    report: Report

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normally distributed bfloat16."""
        return torch.randn(*shape, device=self.device).to(torch.bfloat16) * scale

    def traffic(self, moved: float, us: float) -> dict[str, float]:
        """Figures of a call that moves `moved` bytes: its time, and its fraction of the copy bandwidth."""
        return {"us": us, "of_copy": 1e6 * moved / us / self.copy_speed}

    @property
    def copy_speed(self) -> float:
        """Copy bandwidth measured by the part `roof`: bytes per second, read plus written."""
        return float(self.report.rows["roof"]["bytes/s"]["copy"])

    @property
    def rotated(self) -> int:
        return ROTATED_SMALL if self.small else ROTATED

    def microseconds(self, calls: Sequence[Call], repeats: int | None = None) -> float:
        """Median time of a call, rotating over `calls`; with `small`, the time of the first call, once."""
        if self.small:
            start = time.perf_counter()
            calls[0]()
            return 1e6 * (time.perf_counter() - start)
        repeats = repeats or max(len(calls), REPEATS)
        graph = _capture_graph(calls, repeats)
        return 1e3 * statistics.median(_time_replays(graph)) / repeats

    def print_kernels(self, call: Call, name: str, repeats: int = 5) -> None:
        """Print the profiler's time of each of a call's kernels, without recording rows."""
        if self.small:
            return
        call()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(repeats):
                call()
            self.wait()
        events: Any = profiled.key_averages()
        for event in events:
            if event.device_time_total:
                us = event.device_time_total / event.count
                print(f"{'':10} {name}: {event.key[:90]} x{event.count / repeats:g} {us:.2f} us", flush=True)

    def wait(self) -> None:
        if not self.small:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Free unreferenced memory."""
        gc.collect()
        if not self.small:
            torch.cuda.empty_cache()


def _capture_graph(calls: Sequence[Call], repeats: int) -> torch.cuda.CUDAGraph:
    """Capture a CUDA graph of `repeats` calls, rotating over `calls`."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for call in calls[:2]:  # compile before capture
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in islice(cycle(calls), repeats):
            call()
    return graph


def _time_replays(graph: torch.cuda.CUDAGraph) -> list[float]:
    """Milliseconds of each of `REPLAYS` replays, enqueued without waiting for the host."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for _ in range(WARMUP):
        graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def measure_roof(probe: Probe) -> None:
    """Memory bandwidth of copying and of summing 4 GiB of float32."""
    count = 1 << (16 if probe.small else 30)
    dst, src = (torch.randn(count, device=probe.device) for _ in range(2))
    copying = probe.microseconds([partial(dst.copy_, src)], 5)
    reading = probe.microseconds([dst.sum], 5)
    probe.report.add("roof", "bytes/s", copy=8e6 * count / copying, read=4e6 * count / reading)


def measure_gemm(probe: Probe) -> None:
    for name, shape in PRODUCTS.items():
        out, inner = (64, 64) if probe.small else shape
        copies = max(2, probe.rotated // (2 * out * inner))
        weights = [probe.random(out, inner, scale=inner**-0.5) for _ in range(copies)]
        for rows in ROWS:
            calls = _matmul_calls(probe, weights, rows, added=name in ADDED)
            moved = 2 * (out * inner + rows * (inner + out))
            figures = probe.traffic(moved, probe.microseconds(calls))
            probe.report.add("gemm", f"{name} {out}x{inner} rows {rows}", **figures)
            if rows in (5, 80):
                probe.print_kernels(calls[0], f"{name} rows {rows}")


def _matmul_calls(probe: Probe, weights: list[Tensor], rows: int, *, added: bool) -> list[Call]:
    """One matmul call per weight."""
    out, inner = weights[0].shape
    x = probe.random(rows, inner)
    if not added:
        return [partial(torch.nn.functional.linear, x, weight) for weight in weights]
    result = torch.zeros(rows, out, device=probe.device, dtype=torch.bfloat16)
    return [partial(result.addmm_, x, weight.t()) for weight in weights]


def measure_attention(probe: Probe) -> None:
    shapes = os.environ.get("SHAPES", "2x70" if probe.small else TEXTS).split()
    for rows, context in (map(int, shape.split("x")) for shape in shapes):
        moved, calls = _attention_calls(probe, rows, context)
        figures = probe.traffic(moved, probe.microseconds(calls))
        probe.report.add("attention", f"{rows} rows at {context}", mb=moved / 1e6, **figures)
        probe.print_kernels(calls[0], f"{rows} at {context}")


def measure_empties(probe: Probe) -> None:
    rows, context = (2, 70) if probe.small else (80, 600)
    for longest in (70, 300) if probe.small else LONGEST:
        moved, calls = _attention_calls(probe, rows, context, longest)
        figures = probe.traffic(moved, probe.microseconds(calls))
        probe.report.add("empties", f"{rows} rows at {context}, bucket {longest}", **figures)


def _attention_calls(
    probe: Probe, rows: int, context: int, longest: int | None = None
) -> tuple[int, list[Call]]:
    """(bytes of keys and values read, one decode attention call per cache) for `rows` sequences.

    longest: the maximum sequence length that the kernel is launched for; `context` if None.
    """
    from trimtab.kernels.triton.attention import paged_attention  # noqa: PLC0415 - it imports triton

    heads, kv_heads, width = (4, 2, 16) if probe.small else (32, 8, 128)
    num_blocks, columns = (-(-tokens // BLOCK) for tokens in (context, longest or context))
    moved = rows * context * 2 * kv_heads * width * torch.bfloat16.itemsize
    copies = max(2, min(8, 1 + probe.rotated // moved))
    caches = [probe.random(2, rows * num_blocks + 1, kv_heads, BLOCK, width) for _ in range(copies)]
    tables = torch.zeros(rows, columns, dtype=torch.int32, device=probe.device)
    tables[:, :num_blocks] = (
        torch.randperm(rows * num_blocks, device=probe.device).view(rows, num_blocks).int()
    )
    queries = probe.random(rows, heads, width, scale=width**-0.5)
    tiles = QueryTiles.from_spans([(row, context - 1, 1, row) for row in range(rows)], 1, probe.device)
    tiles = replace(tiles, max_seq_len=longest or tiles.max_seq_len)
    return moved, [partial(paged_attention, queries, cache, tables, tiles) for cache in caches]


def measure_head(probe: Probe) -> None:
    vocab, width = (512, 64) if probe.small else (128_256, 4096)
    copies = 1 if probe.small else 2
    weights = [probe.random(vocab, width, scale=width**-0.5) for _ in range(copies)]
    for requests, num_objectives in BATCHES:
        _measure_head(probe, weights, requests, num_objectives)


def _measure_head(probe: Probe, weights: list[Tensor], requests: int, num_objectives: int) -> None:
    from trimtab.kernels.triton.lm_head.launch import lm_head_steer  # noqa: PLC0415 - it imports triton
    from trimtab.kernels.triton.steering.step import steer  # noqa: PLC0415

    vocab, width = weights[0].shape
    layout, state = _make_requests(probe, vocab, requests, num_objectives)
    rows = requests * (num_objectives + 1)
    hidden = probe.random(rows, width)
    logits = 3 * torch.randn(rows, vocab, device=probe.device)
    both = [partial(lm_head_steer, hidden, weight, layout, state, trace=False) for weight in weights]
    products = [partial(logits_matmul, hidden, weight) for weight in weights]
    steering = partial(steer, logits, layout, state, trace=False)
    name, moved = f"{requests} x {num_objectives + 1}", weights[0].nbytes
    add = partial(probe.report.add, "head")
    add(f"{name}, LM head and steering", **probe.traffic(moved, probe.microseconds(both)))
    add(f"{name}, LM head alone", **probe.traffic(moved, probe.microseconds(products)))
    add(f"{name}, steering alone (L2 warm)", us=probe.microseconds([steering]))
    probe.print_kernels(both[0], name)


def _make_requests(
    probe: Probe, vocab: int, requests: int, num_objectives: int
) -> tuple[RequestLayout, SteeringState]:
    """Layout and state of a batch of requests: MATO, or plain decoding without objectives."""
    state = SteeringState(vocab, probe.device)
    for row in range(requests):
        state.add_request(
            row,
            MATO if num_objectives else SteeringCoefficients(),
            [1 / num_objectives] * num_objectives if num_objectives else [],
            GREEDY,
        )
    return RequestLayout.from_branches(
        [(row, range(num_objectives + 1)) for row in range(requests)], probe.device
    ), state


def measure_steps(probe: Probe) -> None:
    """Decode steps, and their ratios to the targets."""
    if probe.small:
        with TemporaryDirectory() as scratch:
            model = tiny_models.write_model(
                Path(scratch) / "model", "llama", tiny_models.TINY_MODEL, torch.float32
            )
            _measure_plan(probe, with_model(LITTLE, str(model)))
    else:
        for plan in PLANS:
            _measure_plan(probe, plan)
            probe.free()  # the next engine takes the remaining memory
    _add_targets_of_steps(probe.report)


def _measure_plan(probe: Probe, plan: StepPlan) -> None:
    engine = open_engine(
        plan.model,
        str(probe.device),
        load_format="dummy",
        kernels="triton",
        enable_prefix_caching=False,
        **plan.engine_options,
    )
    for load in plan.loads:
        _measure_load(probe, engine, load, plan.num_steps)


def _measure_load(probe: Probe, engine: Engine, load: StepLoad, steps: int) -> None:
    time_steps(engine, load, 2)  # warm-up: compiles kernels
    _, seconds = time_steps(engine, load, steps)
    us, branches = 1e6 * statistics.median(seconds), 1 + len(load.method.branch_objectives())
    tokens = load.context_len + 35  # mean context over the steps
    moved = roofline.weight_bytes(engine) + roofline.kv_bytes(engine, load.num_requests * branches, tokens)
    floor_us = 1e6 * moved / probe.copy_speed
    probe.report.add(
        "steps",
        f"{load.num_requests} x {branches} at {load.context_len}",
        us=us,
        floor_us=floor_us,
        times_floor=us / floor_us,
        tokens_per_s=1e6 * load.num_requests / us,
        captured=engine.stats.captured,
    )


def _add_targets_of_steps(report: Report) -> None:
    names = plain, steered, crowd = "1 x 1 at 512", "1 x 5 at 512", "16 x 5 at 512"
    steps = report.rows.get("steps", {})
    if not steps.keys() >= set(names):
        return  # with --small
    ratio = steps[steered]["us"] / steps[plain]["us"]
    report.add("targets", "plain 1x1: share of copy, target .80", found=1 / steps[plain]["times_floor"])
    report.add("targets", "1x5 over 1x1, target 1.06", found=ratio)
    report.add("targets", "16x5 over floor, target 1.35", found=steps[crowd]["times_floor"])


def measure_hf(probe: Probe) -> None:
    """Time per token after the first, plain and with guidance_scale."""
    model = _make_hf_model(probe)
    prompt = torch.randint(0, 300, (1, 20 if probe.small else 512), device=probe.device)
    mask = torch.ones_like(prompt)
    guidance = {"guidance_scale": 1.5, "negative_prompt_ids": prompt, "negative_prompt_attention_mask": mask}
    few, many = 4, 8 if probe.small else 44
    for name, fields in (("plain", {}), (GUIDED, guidance)):
        seconds = partial(_time_generate, probe, model, prompt, fields)
        seconds(few)  # warm-up
        differences = [seconds(many) - seconds(few) for _ in range(3)]
        per_token = statistics.median(differences) / (many - few)
        probe.report.add("hf", name, us_per_token=1e6 * per_token)
    _add_targets_of_hf(probe.report)


def _make_hf_model(probe: Probe) -> Any:
    """A transformers model in the shape of Llama 3.1 8B, with random bfloat16 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - only this part needs it

    tiny, full = (307, 32, 48, 2, 4, 2), (128_256, 4096, 14_336, 32, 32, 8)
    vocab, hidden, inner, layers, heads, kv_heads = tiny if probe.small else full
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with probe.device:
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default_dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


def _time_generate(probe: Probe, model: Any, prompt: Tensor, fields: dict[str, Any], tokens: int) -> float:
    """Seconds to generate exactly `tokens` tokens, including prefill."""
    probe.wait()
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **fields,
        )
    probe.wait()
    return time.perf_counter() - start


def _add_targets_of_hf(report: Report) -> None:
    """Compare with this run's `steps`, if they were measured before."""
    guided, steps = report.rows["hf"][GUIDED]["us_per_token"], report.rows.get("steps", {})
    for name in ("1 x 2 at 512", "1 x 5 at 512"):
        if name in steps:
            title = f"{name} against guidance_scale, target 8"
            report.add("targets", title, found=guided / steps[name]["us"])


PARTS: dict[str, Callable[[Probe], None]] = {
    "roof": measure_roof,
    "gemm": measure_gemm,
    "attention": measure_attention,
    "empties": measure_empties,
    "head": measure_head,
    "steps": measure_steps,
    "hf": measure_hf,
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    if args.small:  # before triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    folder = os.environ.get("OUT")
    device = torch.device("cpu" if args.small else "cuda")
    probe = Probe(device, args.small, Report(Path(folder) if folder else None))
    parts = args.parts or list(PARTS)
    for part in parts if "roof" in parts else ["roof", *parts]:
        start = time.perf_counter()
        _measure(probe, part)
        probe.free()
        print(f"-- {part}: {time.perf_counter() - start:.0f} s", flush=True)
    return 1 if "failed" in probe.report.rows else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="probe", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    known = ", ".join(PARTS)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {known}; default: all")
    parser.add_argument("--small", action="store_true", help="tiny shapes on a CPU, to test this program")
    args = parser.parse_args(argv)
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}; choose from {known}")
    return args


def _measure(probe: Probe, part: str) -> None:
    try:
        PARTS[part](probe)
    except Exception as error:  # a failing part must not stop the others
        probe.report.add("failed", part, error=f"{type(error).__name__}: {error}"[:300])


def _hide_neighbours() -> None:
    """Remove this file's folder and the repository root from sys.path: transformers imports a package named
    `kernels` and would find ours."""
    here = Path(__file__).resolve()
    hidden = {here.parent, here.parents[2]}
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in hidden]


if __name__ == "__main__":
    _hide_neighbours()
    sys.exit(main())
