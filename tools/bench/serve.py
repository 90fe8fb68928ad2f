"""`trimtab bench serve`: a running OpenAI-compatible server under load, with the field's figures.

Requests come as a Poisson process of --request-rate a second (with --burstiness other than 1 the gaps are
gamma-distributed, of the same mean), all at once by default. TTFT is the time to the first piece of text,
ITL that between pieces, TPOT that between tokens over a whole answer, E2EL that to the end of it. Prompts are
random common words, for which no tokenizer is needed; the server's own count of their tokens is reported.
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

from ...engine.utils.fields import check_fields, option, require_fields
from ...engine.utils.json import dumps
from ...kernels.common.errors import RunError
from ..cli import flags
from ..common import statistics
from . import common, workload
from .http.client import Client
from .http.stream import CHAT, Streamed, stream

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from ...engine.methods.base import Method
    from ..cli.method_args import Choice
    from ..cli.parser import Parser

ENDPOINTS = (CHAT, "/v1/completions")
KEY = "OPENAI_API_KEY"
WORDS = (
    "time year people way day man thing woman life child world school state family student group country "
    "problem hand part place case week company system program question work night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head"
)


@dataclass(frozen=True)
class Load:
    """Whom to ask, how often, and for what; the names are those of vLLM's bench."""

    base_url: str = option("http://127.0.0.1:8000", "where the server is")
    endpoint: str = option(CHAT, "what of it is asked", ENDPOINTS)
    model: str | None = option(None, "the model to ask for; none asks the server which it has")
    api_key: str | None = option(None, f"the server's key; none reads {KEY}")
    num_prompts: int = option(32, "requests in all")
    request_rate: float = option(math.inf, "requests a second, inf for all at once")
    burstiness: float = option(1.0, "1 is a Poisson process, less comes in bursts, more is steadier")
    max_concurrency: int | None = option(None, "most requests at a time; none is no limit")
    temperature: float = option(0.0, "0 is greedy")
    ignore_eos: bool = option(True, "ask for answers of the whole length; not every server can")

    def __post_init__(self) -> None:
        check_fields(self)
        limit, burst = self.max_concurrency, self.burstiness
        require_fields(
            self,
            ("num_prompts", 1 <= self.num_prompts <= 1_000_000, "a whole number from 1 to 1000000"),
            ("request_rate", self.request_rate > 0, "a number above 0, or inf"),
            ("burstiness", 0 < burst < math.inf, "a finite number above 0"),
            ("max_concurrency", limit is None or limit >= 1, "a whole number ≥ 1"),
            ("temperature", 0 <= self.temperature < math.inf, "a finite number ≥ 0"),
        )

    def arrivals(self, seed: int) -> Iterator[float]:
        """When each request comes, in seconds after the first moment."""
        draw, at = random.Random(seed), 0.0
        for _ in range(self.num_prompts):
            yield at
            if self.request_rate < math.inf:
                at += draw.gammavariate(self.burstiness, 1 / (self.request_rate * self.burstiness))


def add_arguments(parser: Parser) -> None:
    parser.epilog = "A prompt is made of --input-len common words; its tokens are what the server counts."
    flags.add_fields(parser, "server and load", Load)
    common.add_traffic(parser)


def run(args: argparse.Namespace) -> int:
    """Asks, waits for all answers, prints. Raises RunError when the server answers nothing."""
    load = Load(**flags.given(Load, args))
    shape, choice, method = workload.asked(args)
    client = Client(load.base_url, load.api_key or os.environ.get(KEY))
    started = time.perf_counter()
    answers, seconds = asyncio.run(_driven(client, load, shape, choice, method))
    good = [answer for answer in answers if answer.error is None]
    if not good:
        raise RunError(f"none of {len(answers)} requests was answered; {answers[0].error}")
    found = results(good, seconds)
    failed = [answer.error for answer in answers if answer.error is not None]
    print("\n".join(_lines(found, failed)))
    raw = [asdict(answer.since(started)) for answer in answers]
    said = common.said("serve", method, load, shape)
    said["config"].pop("api_key")
    print(dumps({**said, **found, "failed": len(failed), "errors": sorted({*failed}), "raw": raw}))
    return 0


def results(answers: Sequence[Streamed], seconds: float) -> dict[str, Any]:
    """The figures of answers that came within so many seconds, by vLLM's names."""
    tokens, prompts = sum(a.tokens for a in answers), sum(a.prompt_tokens for a in answers)
    return {
        "duration": seconds,
        "completed": len(answers),
        "steered": sum(answer.steered for answer in answers),
        "total_input_tokens": prompts,
        "total_output_tokens": tokens,
        "request_throughput": len(answers) / seconds,
        "output_throughput": tokens / seconds,
        "total_token_throughput": (prompts + tokens) / seconds,
        **latencies(answers),
        "plain_requests": latencies([a for a in answers if not a.steered]),
        "steered_requests": latencies([a for a in answers if a.steered]),
    }


def latencies(answers: Sequence[Streamed]) -> dict[str, float]:
    """Mean, median, p90 and p99 of TTFT, TPOT, ITL and E2EL in milliseconds."""
    return {
        **statistics.summary([1e3 * a.ttft for a in answers], "ttft_ms"),
        **statistics.summary([1e3 * a.tpot for a in answers if a.tpot is not None], "tpot_ms"),
        **statistics.summary([1e3 * gap for a in answers for gap in a.gaps], "itl_ms"),
        **statistics.summary([1e3 * a.latency for a in answers], "e2el_ms"),
    }


async def _driven(
    client: Client, load: Load, shape: workload.Traffic, choice: Choice, method: Method
) -> tuple[list[Streamed], float]:
    """All answers, and the seconds from the first request to the last answer."""
    model = load.model or await _model(client)
    bodies = list(_bodies(load, shape, model, choice, method))
    gate = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else None
    start = time.perf_counter()

    async def one(at: float, body: dict[str, Any]) -> Streamed:
        await asyncio.sleep(start + at - time.perf_counter())
        async with AsyncExitStack() as stack:
            if gate is not None:
                await stack.enter_async_context(gate)
            return await stream(client, load.endpoint, body, "steering" in body)

    coming = zip(load.arrivals(shape.seed), bodies, strict=True)
    answers = await asyncio.gather(*(one(at, body) for at, body in coming))
    return answers, time.perf_counter() - start


async def _model(client: Client) -> str:
    listed = await client.get("/v1/models")
    try:
        return str(listed["data"][0]["id"])
    except (LookupError, TypeError):
        raise RunError(f"{client.base_url}/v1/models names no model; name one with --model") from None


def _bodies(
    load: Load, shape: workload.Traffic, model: str, choice: Choice, method: Method
) -> Iterator[dict[str, Any]]:
    draw = random.Random(shape.seed)
    for index in range(load.num_prompts):
        text = " ".join(draw.choices(WORDS.split(), k=shape.input_len))
        asks = (
            {"messages": [{"role": "user", "content": text}]} if load.endpoint == CHAT else {"prompt": text}
        )
        body = {
            "model": model,
            **asks,
            "max_tokens": shape.output_len,
            "temperature": load.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if load.ignore_eos else {}),
        }
        if shape.is_steered(index):
            wishes = [asdict(objective) for objective in method.objectives]
            body["steering"] = {"method": method.name, "objectives": wishes, **choice.values}
        yield body


def _lines(found: dict[str, Any], failed: Sequence[str | None]) -> Iterator[str]:
    """The figures for people."""
    yield statistics.line(
        "answered", f"{found['completed']} in {found['duration']:.2f} s, {len(failed)} failed"
    )
    for name in ("request_throughput", "output_throughput", "total_token_throughput"):
        yield statistics.line(f"{name.replace('_', ' ')}, a second", statistics.number(found[name]))
    for name, title in (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2EL")):
        kinds = ("mean", "median", "p90", "p99")
        said = ", ".join(f"{kind} {statistics.number(found[f'{kind}_{name}_ms'])}" for kind in kinds)
        yield statistics.line(f"{title}, ms", said)
    if failed:
        yield statistics.line("first failure", str(failed[0]))
