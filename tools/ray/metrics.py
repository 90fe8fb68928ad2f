"""Merge the Prometheus metrics of all replicas into one text, with the label `replica`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client.core import Metric


def merge_metrics(texts: Iterable[tuple[str, str]]) -> bytes:
    """Merge `texts`, pairs of a replica's name and its metrics."""
    registry = CollectorRegistry()
    registry.register(_MergedCollector(texts))
    return generate_latest(registry)


class _MergedCollector:
    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        self._families: dict[str, Metric] = {}
        for replica, text in texts:
            for family in text_string_to_metric_families(text):
                samples = [
                    sample._replace(labels={**sample.labels, "replica": replica}) for sample in family.samples
                ]
                if family.name in self._families:
                    self._families[family.name].samples += samples
                else:
                    family.samples = samples
                    self._families[family.name] = family

    def collect(self) -> Iterator[Metric]:
        return iter(self._families.values())
