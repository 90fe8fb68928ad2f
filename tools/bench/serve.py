"""`trimtab bench serve`: load test of a running OpenAI-compatible server.

Requests arrive as a Poisson process of --request-rate per second (with --burstiness other than 1 the gaps are
gamma-distributed with the same mean), all at once by default. TTFT is the time to the first chunk of text,
ITL the time between chunks, TPOT the mean time between the tokens of an answer, E2EL the time to its end.
Prompts are random common words, which need no tokenizer; the server's token counts are reported.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...engine.utils.fields import config_field, validate_rules, validate_types
from ...engine.utils.json import dumps
from ...kernels.common.errors import RunError
from ..cli import flags
from ..common import statistics
from . import common, workload
from .http.client import HTTPClient
from .http.stream import CHAT_ENDPOINT, StreamResult, stream_request

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from ...engine.methods.base import Method
    from ..cli.method_args import MethodSpec
    from ..cli.parser import Parser

ENDPOINTS = (CHAT_ENDPOINT, "/v1/completions")
API_KEY_ENV = "OPENAI_API_KEY"
WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head"
)


@dataclass(frozen=True)
class ServeConfig:
    """Server, arrival rate and sampling; field names as in vLLM's bench."""

    base_url: str = config_field("http://127.0.0.1:8000", "the server's URL")
    endpoint: str = config_field(CHAT_ENDPOINT, "the endpoint", ENDPOINTS)
    model: str | None = config_field(None, "the model to request; none takes the server's first model")
    api_key: str | None = config_field(None, f"the server's key; none reads {API_KEY_ENV}")
    num_prompts: int = config_field(32, "number of requests")
    request_rate: float = config_field(math.inf, "requests per second, inf for all at once")
    burstiness: float = config_field(1.0, "1 is a Poisson process, below 1 is burstier, above 1 is steadier")
    max_concurrency: int | None = config_field(None, "maximum concurrent requests; none is no limit")
    temperature: float = config_field(0.0, "0 is greedy")
    ignore_eos: bool = config_field(True, "ignore the end token, where the server supports it")

    def __post_init__(self) -> None:
        validate_types(self)
        concurrency, burstiness = self.max_concurrency, self.burstiness
        validate_rules(
            self,
            ("num_prompts", 1 <= self.num_prompts <= 1_000_000, "an integer from 1 to 1000000"),
            ("request_rate", self.request_rate > 0, "a number above 0, or inf"),
            ("burstiness", 0 < burstiness < math.inf, "a finite number above 0"),
            ("max_concurrency", concurrency is None or concurrency >= 1, "an integer ≥ 1"),
            ("temperature", 0 <= self.temperature < math.inf, "a finite number ≥ 0"),
        )

    def arrival_times(self, seed: int) -> Iterator[float]:
        """Arrival time of each request, in seconds after the first."""
        rng, arrival_time = random.Random(seed), 0.0
        for _ in range(self.num_prompts):
            yield arrival_time
            if self.request_rate < math.inf:
                arrival_time += rng.gammavariate(self.burstiness, 1 / (self.request_rate * self.burstiness))


def add_arguments(parser: Parser) -> None:
    parser.epilog = "A prompt has --input-len common words; token counts are the server's."
    flags.add_fields(parser, "server and load", ServeConfig)
    common.add_workload_args(parser)


def run(args: argparse.Namespace) -> int:
    """Send the requests, wait for all answers and print. Raises RunError if all requests fail."""
    config = ServeConfig(**flags.fields_from_args(ServeConfig, args))
    load, method_spec, method = workload.workload_from_args(args)
    client = HTTPClient(config.base_url, config.api_key or os.environ.get(API_KEY_ENV, "").strip() or None)
    start_time = time.perf_counter()
    answers, seconds = asyncio.run(_run_load(client, config, load, method_spec, method))
    succeeded = [answer for answer in answers if answer.error is None]
    if not succeeded:
        raise RunError(f"all {len(answers)} requests failed: {answers[0].error}")
    metrics = compute_metrics(succeeded, seconds)
    failed = [answer.error for answer in answers if answer.error is not None]
    print("\n".join(_format_lines(metrics, failed)))
    raw = [asdict(answer.relative_to(start_time)) for answer in answers]
    metadata = common.build_metadata("serve", method, config, load)
    metadata["config"].pop("api_key")
    print(dumps({**metadata, **metrics, "failed": len(failed), "errors": sorted({*failed}), "raw": raw}))
    return 0


def compute_metrics(answers: Sequence[StreamResult], seconds: float) -> dict[str, Any]:
    """Metrics of the answers of a run of `seconds`, with vLLM's names."""
    output_tokens, input_tokens = sum(a.tokens for a in answers), sum(a.prompt_tokens for a in answers)
    return {
        "duration": seconds,
        "completed": len(answers),
        "steered": sum(answer.steered for answer in answers),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(answers) / seconds,
        "output_throughput": output_tokens / seconds,
        "total_token_throughput": (input_tokens + output_tokens) / seconds,
        **summarize_latencies(answers),
        "plain_requests": summarize_latencies([a for a in answers if not a.steered]),
        "steered_requests": summarize_latencies([a for a in answers if a.steered]),
    }


def summarize_latencies(answers: Sequence[StreamResult]) -> dict[str, float]:
    """Mean, median, p90 and p99 of TTFT, TPOT, ITL and E2EL in milliseconds."""
    return {
        **statistics.summarize([1e3 * a.ttft for a in answers], "ttft_ms"),
        **statistics.summarize([1e3 * a.tpot for a in answers if a.tpot is not None], "tpot_ms"),
        **statistics.summarize([1e3 * gap for a in answers for gap in a.gaps], "itl_ms"),
        **statistics.summarize([1e3 * a.latency for a in answers], "e2el_ms"),
    }


async def _run_load(
    client: HTTPClient,
    config: ServeConfig,
    load: workload.WorkloadConfig,
    method_spec: MethodSpec,
    method: Method,
) -> tuple[list[StreamResult], float]:
    """All answers, and the seconds from the first request to the last answer."""
    model = config.model or await _get_model(client)
    bodies = list(_build_bodies(config, load, model, method_spec, method))
    semaphore = asyncio.Semaphore(config.max_concurrency) if config.max_concurrency else None
    start = time.perf_counter()

    async def send_at(arrival_time: float, body: dict[str, Any]) -> StreamResult:
        await asyncio.sleep(start + arrival_time - time.perf_counter())
        async with AsyncExitStack() as stack:
            if semaphore is not None:
                await stack.enter_async_context(semaphore)
            return await stream_request(client, config.endpoint, body, "steering" in body)

    schedule = zip(config.arrival_times(load.seed), bodies, strict=True)
    answers = await asyncio.gather(*(send_at(arrival_time, body) for arrival_time, body in schedule))
    return answers, time.perf_counter() - start


async def _get_model(client: HTTPClient) -> str:
    models = await client.get_json("/v1/models")
    try:
        return str(models["data"][0]["id"])
    except (LookupError, TypeError):
        raise RunError(f"{client.base_url}/v1/models lists no model; name one with --model") from None


def _build_bodies(
    config: ServeConfig, load: workload.WorkloadConfig, model: str, method_spec: MethodSpec, method: Method
) -> Iterator[dict[str, Any]]:
    rng = random.Random(load.seed)
    for index in range(config.num_prompts):
        text = " ".join(rng.choices(WORDS.split(), k=load.input_len))
        prompt_field = (
            {"messages": [{"role": "user", "content": text}]}
            if config.endpoint == CHAT_ENDPOINT
            else {"prompt": text}
        )
        body = {
            "model": model,
            **prompt_field,
            "max_tokens": load.output_len,
            "temperature": config.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if config.ignore_eos else {}),
        }
        if load.is_steered(index):
            objectives = [asdict(objective) for objective in method.objectives]
            body["steering"] = {"method": method.name, "objectives": objectives, **method_spec.settings}
        yield body


def _format_lines(metrics: dict[str, Any], failed: Sequence[str | None]) -> Iterator[str]:
    """The results as lines of text."""
    yield statistics.format_row(
        "completed", f"{metrics['completed']} in {metrics['duration']:.2f} s, {len(failed)} failed"
    )
    for name in ("request_throughput", "output_throughput", "total_token_throughput"):
        yield statistics.format_row(
            f"{name.replace('_', ' ')}, per second", statistics.format_number(metrics[name])
        )
    for name, title in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2EL")):
        statistic_names = ("mean", "median", "p90", "p99")
        summary = ", ".join(
            f"{statistic} {statistics.format_number(metrics[f'{statistic}_{name}_ms'])}"
            for statistic in statistic_names
        )
        yield statistics.format_row(f"{title}, ms", summary)
    if failed:
        yield statistics.format_row("first failure", str(failed[0]))
