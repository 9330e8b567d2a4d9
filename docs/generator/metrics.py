"""The metrics as a reference page, from the metric objects of the gateway and the worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import Metric

from docs.generator.markdown import NOTICE, code, table
from gateway.metrics import GatewayMetrics
from workers.metrics import WorkerMetrics

INTRODUCTION = """
`GET /metrics` on the observability port of a gateway or a worker serves them for Prometheus. All times are in seconds. A
histogram has the usual series `_bucket`, `_sum` and `_count`. [Alarms](../how-to/alarms.md) are built on these metrics.
"""


def page() -> str:
    """Return docs/reference/metrics.md."""
    parts = [
        "# Metrics\n\n",
        NOTICE,
        INTRODUCTION,
    ]
    for title, registry, note in (
        ("Gateway", GatewayMetrics().registry, MODEL_LABEL),
        ("Worker", WorkerMetrics().registry, ""),
    ):
        rows = [
            (code(name), kind, ", ".join(map(code, labels)), meaning)
            for name, kind, labels, meaning in metrics(registry)
        ]
        parts += [f"\n## {title}\n\n", table(["metric", "type", "labels", "meaning"], rows), note]
    return "".join(parts)


MODEL_LABEL = "\n`model` is the name that workers offer. It is empty for a request that never became a job: a bad body, a wrong key, an unknown model.\n"


def metrics(registry: CollectorRegistry) -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """Yield name, type, labels and meaning of each metric, as Prometheus sees it."""
    collectors = cast("dict[Any, list[str]]", registry._collector_to_names)
    for collector in collectors:
        for family in collector.collect():
            name = f"{family.name}_total" if family.type == "counter" else family.name
            yield name, family.type, labels_of(collector, family), family.documentation


def labels_of(collector: Any, family: Metric) -> tuple[str, ...]:
    """Return the names of a metric's labels: declared, or, by a collector of our own, those of its family."""
    declared = getattr(collector, "_labelnames", None)
    if declared is None:
        declared = getattr(family, "_labelnames", None) or ()
    return tuple(label for label in declared if not (isinstance(collector, Histogram) and label == "le"))
