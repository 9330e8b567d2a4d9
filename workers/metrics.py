"""The worker's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class WorkerMetrics:
    """Holds the metrics of one worker process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        reg = self.registry
        self.slots = Gauge("nexus_worker_slots", "Jobs that this worker can run at the same time.", registry=reg)
        self.busy = Gauge("nexus_worker_slots_busy", "Jobs that this worker runs.", registry=reg)
        self.attempts = Counter(
            "nexus_worker_attempts_total",
            "Attempts at jobs, by outcome: completed, failed, returned, cancelled, fenced.",
            ["capability", "model", "outcome"],
            registry=reg,
        )
        self.seconds = Histogram(
            "nexus_worker_attempt_duration_seconds",
            "Time from the delivery of a job to the end of the attempt.",
            ["capability", "model"],
            registry=reg,
            buckets=(0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900),
        )
        self.redeliveries = Counter(
            "nexus_redeliveries_total",
            "Jobs that were delivered again after another attempt.",
            ["capability", "model"],
            registry=reg,
        )
        self.backend_errors = Counter(
            "nexus_backend_errors_total",
            "Attempts that ended in an error, time limits among them, by code. invalid_request: a refusal without a code.",
            ["backend", "code"],
            registry=reg,
        )
        self.backend_up = Gauge("nexus_backend_up", "1 while the inference server answers.", ["backend"], registry=reg)
        self._children: dict[tuple[str, str, str], tuple[Counter, Histogram]] = {}
        """Children of `attempts` and `seconds`: finding them by labels costs more than counting. A worker has few models."""

    def record_attempt(self, capability: str, model: str, outcome: str, seconds: float) -> None:
        """Count an attempt that has ended, and its duration."""
        key = capability, model, outcome
        children = self._children.get(key)
        if children is None:
            children = self._children[key] = (self.attempts.labels(*key), self.seconds.labels(capability, model))
        counter, histogram = children
        counter.inc()
        histogram.observe(seconds)
