"""What a server tells Prometheus, under the field's names (vLLM) with the prefix `trimtab:`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from ..base_engine import BaseEngine

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
    640, 2560,
)  # fmt: skip
ITL_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
E2E_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
BRANCH_BUCKETS = (1, 2, 3, 4, 5, 6, 8, 11, 16)
PREFIX = "trimtab:"


class Metrics:
    """Counters of what was served, and the engine's own numbers as they are when somebody asks."""

    def __init__(self, engine: BaseEngine) -> None:
        self.registry = CollectorRegistry()
        self.ttft = self._histogram("time_to_first_token_seconds", "until the first token", TTFT_BUCKETS)
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "between an answer's tokens", ITL_BUCKETS
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "from a request to its end", E2E_BUCKETS
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "that an answer waited for room", E2E_BUCKETS
        )
        self.branches = self._histogram(
            "request_branches", "prompts that an answer is decoded by", BRANCH_BUCKETS
        )
        self.prompt_tokens = self._counter("prompt_tokens", "tokens of base prompts")
        self.branch_tokens = self._counter("branch_prompt_tokens", "tokens of all other branches' prompts")
        self.generation_tokens = self._counter("generation_tokens", "tokens of answers")
        self.successes = self._counter("request_success", "answers by how they ended", "finished_reason")
        self.errors = self._counter("request_refused", "requests answered with an error", "status")
        self.registry.register(_EngineStatsCollector(engine))

    def render(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, help, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, help, labels, registry=self.registry)


class _EngineStatsCollector:
    def __init__(self, engine: BaseEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        for name, help, value in (
            ("num_requests_running", "answers being decoded", stats.running),
            ("num_requests_waiting", "answers waiting for room", stats.waiting),
            (
                "kv_cache_usage_perc",
                "share of the pages in use, 0 to 1",
                stats.pages_held / stats.pages,
            ),
        ):
            yield GaugeMetricFamily(PREFIX + name, help, value)
        for name, help, value in (
            ("num_preemptions", "answers that gave their pages back and started again", stats.preemptions),
            ("prefix_cache_queries", "prompt tokens of all branches that began", stats.prompt_tokens),
            ("prefix_cache_hits", "tokens that the prefix cache had", stats.cached),
            ("engine_steps", "steps of the engine", stats.steps),
            ("engine_step_seconds", "seconds in steps", stats.step_seconds),
            ("steering_seconds", "seconds of these in choosing tokens", stats.steer_seconds),
            ("late_compiles", "kernels made ready after the start, which stalls a step", stats.late_compiles),
        ):
            yield CounterMetricFamily(PREFIX + name, help, value)
