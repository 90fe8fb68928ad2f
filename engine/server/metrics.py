"""Prometheus metrics of the server, named as in vLLM with the prefix `trimtab:`."""

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
    """Counters and histograms of the served requests; the engine's statistics are read at scrape time."""

    def __init__(self, engine: BaseEngine) -> None:
        self.registry = CollectorRegistry()
        self.ttft = self._histogram("time_to_first_token_seconds", "time to the first token", TTFT_BUCKETS)
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "time between two tokens of an answer", ITL_BUCKETS
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "time from the arrival of a request to its end", E2E_BUCKETS
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "time an answer waited in the queue", E2E_BUCKETS
        )
        self.branches = self._histogram("request_branches", "branches of an answer", BRANCH_BUCKETS)
        self.prompt_tokens = self._counter("prompt_tokens", "tokens of base branch prompts")
        self.branch_tokens = self._counter("branch_prompt_tokens", "prompt tokens of all other branches")
        self.generation_tokens = self._counter("generation_tokens", "tokens of answers")
        self.successes = self._counter(
            "request_success", "finished answers by finish reason", "finished_reason"
        )
        self.errors = self._counter("request_refused", "requests that ended with an error", "status")
        self.registry.register(_EngineStatsCollector(engine))

    def render(self) -> bytes:
        """The metrics in the Prometheus text format."""
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
            ("num_requests_waiting", "answers waiting in the queue", stats.waiting),
            (
                "kv_cache_usage_perc",
                "share of KV cache blocks in use, 0 to 1",
                stats.pages_held / stats.pages,
            ),
        ):
            yield GaugeMetricFamily(PREFIX + name, help, value)
        for name, help, value in (
            ("num_preemptions", "preempted answers, which are recomputed", stats.preemptions),
            ("prefix_cache_queries", "prompt tokens of all started branches", stats.prompt_tokens),
            ("prefix_cache_hits", "prompt tokens found in the prefix cache", stats.cached),
            ("engine_steps", "steps of the engine", stats.steps),
            ("engine_step_seconds", "seconds spent in engine steps", stats.step_seconds),
            (
                "steering_seconds",
                "part of engine_step_seconds for LM head, steering and sampling",
                stats.steer_seconds,
            ),
            ("late_compiles", "kernels compiled or loaded while requests waited", stats.late_compiles),
        ):
            yield CounterMetricFamily(PREFIX + name, help, value)
