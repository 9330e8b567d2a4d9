"""Define the gateway's Prometheus metrics, and render them without blocking requests."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from time import time
from typing import Any, cast

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from backbone.bus.bus import QueueChange, QueueDepth, StorageUsage
from backbone.bus.refusal_counter import KINDS
from gateway.cached_result import CachedResult
from gateway.http.connection_limits import ConnectionLimiter
from schemas.jobs import JobStatus
from schemas.presence import RegistrySnapshot, WorkerState

LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
TTFT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
LAG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ITL = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10)
SERVER_ERROR = 500
FAILURES = frozenset({JobStatus.FAILED.value, JobStatus.EXPIRED.value})
OPENMETRICS_TYPE = "application/openmetrics-text"
OPENMETRICS_END = b"# EOF\n"
MAX_AGE_S = 1.0
"""Age up to which scrapes get the same text."""


class FastHistogram(Collector):
    """A histogram that requests and tokens observe: 0.3 µs an observation instead of prometheus_client's 2."""

    def __init__(
        self,
        name: str,
        text: str,
        buckets: tuple[float, ...],
        registry: CollectorRegistry,
        labels: tuple[str, ...] = ("model",),
    ) -> None:
        self._name, self._text, self._bounds, self._labels = name, text, buckets, labels
        self._bound_names = [*map(floatToGoString, buckets), "+Inf"]
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}
        self._exemplars: dict[tuple[tuple[str, ...], int], Exemplar] = {}
        registry.register(self)

    def observe(self, value: float, *labels: str) -> None:
        """Observe one value, in seconds. `labels`: a value for each label."""
        counts = self._counts.get(labels)
        if counts is None:
            counts = self._counts[labels] = [0] * (len(self._bounds) + 1)
            self._sums[labels] = 0.0
        counts[bisect_left(self._bounds, value)] += 1
        self._sums[labels] += value

    def totals(self) -> Iterable[tuple[tuple[str, ...], int, float]]:
        """Yield the labels, the number and the sum of all observations."""
        for labels, counts in self._counts.items():
            yield labels, sum(counts), self._sums[labels]

    def add_exemplar(self, value: float, trace_id: str, *labels: str) -> None:
        """Keep a trace as the example of an observed value's bucket."""
        bucket = bisect_left(self._bounds, value)
        self._exemplars[labels, bucket] = Exemplar({"trace_id": trace_id}, value, time())

    def collect(self) -> Iterable[Metric]:
        """Return the metrics' samples, for prometheus_client."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for labels, counts in self._counts.items():
            total = 0
            buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
            for at, (bound, count) in enumerate(zip(self._bound_names, counts, strict=True)):
                total += count
                exemplar = self._exemplars.get((labels, at))
                buckets.append((bound, total) if exemplar is None else (bound, total, exemplar))
            family.add_metric(labels, buckets, sum_value=self._sums[labels])
        yield family


class WorkerCollector(Collector):
    """Counts workers and the models they serve at each scrape, since the registry changes more often than it is scraped."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.snapshot: Callable[[], RegistrySnapshot | None] = lambda: None
        """Returns the registry's snapshot."""
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Return the metrics' samples, for prometheus_client."""
        snapshot = self.snapshot() or RegistrySnapshot()
        states = dict.fromkeys(WorkerState, 0)
        serving = {(c.value, entry.name): 0 for entry in snapshot.models.values() for c in entry.capabilities}
        for worker in snapshot.workers.values():
            states[worker.state] += 1
            for key in {(c.value, model.name) for model in worker.models for c in model.capabilities}:
                serving[key] = serving.get(key, 0) + (worker.state is WorkerState.READY)
        workers = GaugeMetricFamily("nexus_workers", "Workers in the registry, by state.", labels=["state"])
        for state, count in states.items():
            workers.add_metric([state.value], count)
        models = GaugeMetricFamily(
            "nexus_model_workers", "Ready workers of a model that is or was served.", labels=["capability", "model"]
        )
        for labels, count in serving.items():
            models.add_metric(labels, count)
        yield workers
        yield models


class BusRefusalCollector(Collector):
    """Reads at each scrape how many invalid messages and names the process's connections to NATS dropped, by kind."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.counts: Callable[[], Mapping[str, int]] = lambda: dict.fromkeys(KINDS, 0)
        """Returns the counts."""
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Return the metrics' samples, for prometheus_client."""
        family = CounterMetricFamily(
            "nexus_bus_refused",
            "Names and messages of workers that were dropped, by kind: worker (an invalid name), address (an answer requested on a subject of Nexus), question or message (unreadable). Anything but 0 is a defect or an attack; the log has the first of each kind as bus.refused.",
            labels=["kind"],
        )
        for kind, count in self.counts().items():
            family.add_metric([kind], count)
        yield family


class ConnectionCollector(Collector):
    """Reads at each scrape how many connections callers have open, and how much memory their unread answers take."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.limiter: ConnectionLimiter | None = None
        """The connections of the public port; None until it listens."""
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Return the metrics' samples, for prometheus_client."""
        connections = self.limiter or ConnectionLimiter()
        unread = connections.unread
        yield GaugeMetricFamily("nexus_connections", "Open connections of callers.", value=len(connections))
        yield CounterMetricFamily(
            "nexus_connections_refused",
            "Connections above MAX_CONNECTIONS or MAX_CONNECTIONS_PER_ADDRESS, answered 503.",
            value=connections.refused,
        )
        yield CounterMetricFamily(
            "nexus_connections_stalled",
            "Connections closed after WRITE_TIMEOUT_S because their callers did not read.",
            value=connections.stalled,
        )
        yield GaugeMetricFamily(
            "nexus_unread_bytes",
            "Bytes of memory for answers that callers have not read, at most MAX_UNREAD_BYTES.",
            value=unread.total,
        )
        yield CounterMetricFamily(
            "nexus_unread_shed", "Answers ended because unread answers reached MAX_UNREAD_BYTES.", value=unread.shed
        )


@dataclass(slots=True)
class ModelTotals:
    """What this process has counted of one model since it started."""

    tokens: int = 0
    """Completion tokens."""
    errors: int = 0
    """Requests that ended with a status of 500 or more, and durable jobs that failed or expired."""
    answers: int = 0
    """Requests that were answered."""
    seconds: float = 0.0
    """From the start of these requests on a worker to the last byte of their answers."""


class GatewayMetrics:
    """All metrics of one gateway process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        reg = self.registry
        self.requests = Counter(
            "nexus_requests_total",
            "Requests, by the status of their answer. 499: the caller disconnected. A stream that broke off counts under its error's status.",
            ["endpoint", "model", "status"],
            registry=reg,
        )
        self.duration = FastHistogram(
            "nexus_request_duration_seconds",
            "Time from the complete request to the last byte of the answer.",
            LATENCY,
            reg,
            labels=("endpoint", "model"),
        )
        self.ttft = FastHistogram(
            "nexus_time_to_first_token_seconds",
            "Time from the complete request to the backend's first output.",
            TTFT,
            reg,
        )
        self.itl = FastHistogram("nexus_inter_token_latency_seconds", "Time between two writes of a stream.", ITL, reg)
        self.queue_wait = FastHistogram(
            "nexus_queue_wait_seconds",
            "Time from submission to the first start on a worker.",
            LATENCY,
            reg,
            labels=("capability", "lane", "model"),
        )
        self.queue_depth = Gauge(
            "nexus_queue_depth",
            "Jobs that wait, over all gateways. Read every 5 s.",
            ["capability", "lane", "model"],
            registry=reg,
        )
        self.queue_running = Gauge(
            "nexus_queue_in_progress",
            "Jobs that a worker runs, over all gateways. Read every 5 s.",
            ["capability", "lane", "model"],
            registry=reg,
        )
        self.queues = Gauge(
            "nexus_queues", "Queues that exist in NATS, at most MAX_QUEUES. The same on every gateway.", registry=reg
        )
        self.queue_changes = Counter(
            "nexus_queue_changes_total",
            "Queues that this gateway made, freed (the model is no longer served), restored (a job waited without a queue), or was refused (NATS accepts no more queues).",
            ["change"],
            registry=reg,
        )
        self.tokens = Counter(
            "nexus_tokens_total",
            "Tokens as backends count them, by kind: prompt or completion.",
            ["kind", "model"],
            registry=reg,
        )
        self.requests_in_flight = 0
        """Requests that are being answered; read at each scrape."""
        in_flight = Gauge("nexus_requests_in_flight", "Requests that are being answered.", registry=reg)
        in_flight.set_function(lambda: self.requests_in_flight)
        self.attempts = Counter(
            "nexus_redelivered_requests_total", "Requests that more than one worker attempted.", ["model"], registry=reg
        )
        self.jobs_submitted = Counter(
            "nexus_jobs_submitted_total", "Durable jobs accepted, each counted once.", ["endpoint"], registry=reg
        )
        self.jobs_ended = Counter(
            "nexus_jobs_ended_total",
            "Runs of durable jobs whose end this gateway recorded. Other gateways record the others.",
            ["capability", "model", "status"],
            registry=reg,
        )
        self.dead_letters = Counter(
            "nexus_dead_letters_total",
            "Runs of durable jobs that this gateway recorded as dead letters.",
            ["capability", "model"],
            registry=reg,
        )
        self.unserved = Counter(
            "nexus_unserved_requests_total",
            "Synchronous requests refused because no ready worker serves the model.",
            ["capability", "model"],
            registry=reg,
        )
        self.webhook_tries = Counter(
            "nexus_webhook_tries_total",
            "Attempts to deliver a webhook, by state: delivered, pending (to be retried), failed (given up).",
            ["state"],
            registry=reg,
        )
        self.forgeries = Counter(
            "nexus_forgeries_refused_total",
            "Messages dropped because their seal is wrong, by kind: outcome, event, question, dead_letter, message, item. Their sender is no gateway and no worker of the job: a compromised worker, or one of another Nexus on the same NATS.",
            ["kind"],
            registry=reg,
        )
        self.part_up = Gauge(
            "nexus_part_up",
            "1 while a part answers this gateway, or stores what it writes: nats, nats_write, etcd, redis, redis_write, registry, clock. Checked every 5 s.",
            ["part"],
            registry=reg,
        )
        self.stream_bytes = Gauge(
            "nexus_stream_bytes",
            "Bytes in a stream of NATS. Read every 5 s, the same on every gateway.",
            ["stream"],
            registry=reg,
        )
        self.stream_max_bytes = Gauge(
            "nexus_stream_max_bytes",
            "Most bytes that a stream of NATS may hold, if it is bounded.",
            ["stream"],
            registry=reg,
        )
        self.stream_messages = Gauge("nexus_stream_messages", "Messages in a stream of NATS.", ["stream"], registry=reg)
        self.unrecorded = Gauge(
            "nexus_unrecorded_ends",
            "Ends of durable jobs that no gateway has recorded yet. The same on every gateway.",
            registry=reg,
        )
        self.ledger_rows = Counter(
            "nexus_ledger_rows_total", "Finished runs that this gateway wrote into the ledger.", registry=reg
        )
        self.ledger_up = Gauge(
            "nexus_ledger_up", "0 since this gateway's last write into the ledger failed, else 1.", registry=reg
        )
        self.ledger_up.set(1)
        self.ledger_lag = Gauge(
            "nexus_ledger_lag_seconds",
            "Age of the oldest usage or audit event that this gateway could not write into the ledger; 0: there is none.",
            registry=reg,
        )
        self.usage_dropped = Counter(
            "nexus_usage_dropped_total",
            "Finished runs that are missing in the ledger: the gateway's journal was full, or an event was unreadable.",
            registry=reg,
        )
        self.budget_refusals = Counter(
            "nexus_budget_refusals_total",
            "Requests that were refused because a budget was used up, or its rest reserved.",
            ["holder", "unit", "period"],
            registry=reg,
        )
        self.audit_rows = Counter(
            "nexus_audit_rows_total", "Audit events that this gateway wrote into the ledger's database.", registry=reg
        )
        self.audit_dropped = Counter(
            "nexus_audit_dropped_total",
            "Audit events that are lost: the gateway's journal was full, or an event was unreadable.",
            registry=reg,
        )
        self.loop_lag = Histogram(
            "nexus_event_loop_lag_seconds",
            "Delay with which this process's event loop runs a timer, measured four times a second.",
            registry=reg,
            buckets=LAG,
        )
        self.workers = WorkerCollector(reg)
        self.bus_refusals = BusRefusalCollector(reg)
        self.connections = ConnectionCollector(reg)
        for state in ("delivered", "pending", "failed"):
            self.webhook_tries.labels(state)
        for change in QueueChange:
            self.queue_changes.labels(change.value)
        self._depth_labels: set[tuple[str, str, str]] = set()
        self._children: dict[tuple[Any, ...], Any] = {}

    def child(self, metric: Counter | Gauge | Histogram, *labels: str | int) -> Any:
        """Return `metric.labels(...)` from a cache: prometheus_client takes a lock and builds strings each time."""
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child

    def model_totals(self) -> dict[str, ModelTotals]:
        """Return what was counted of each model. It reads counters, and takes about a microsecond for each."""
        totals: defaultdict[str, ModelTotals] = defaultdict(ModelTotals)
        for (metric, *labels), child in self._children.items():
            if metric is self.tokens and labels[0] == "completion":
                totals[labels[1]].tokens += int(child._value.get())
            elif (metric is self.requests and int(labels[2]) >= SERVER_ERROR) or (
                metric is self.jobs_ended and labels[2] in FAILURES
            ):
                totals[labels[1]].errors += int(child._value.get())
        for (_, model), count, seconds in self.duration.totals():
            totals[model].answers += count
            totals[model].seconds += seconds
        for (_, _, model), _, seconds in self.queue_wait.totals():
            totals[model].seconds -= seconds
        return totals

    def count_queue(self, change: QueueChange) -> None:
        """Count a change of a queue."""
        self.child(self.queue_changes, change.value).inc()

    def set_storage(self, storage: StorageUsage) -> None:
        """Set the sizes of NATS's streams."""
        for stream in storage.streams:
            self.child(self.stream_bytes, stream.stream).set(stream.bytes)
            self.child(self.stream_messages, stream.stream).set(stream.messages)
            if stream.max_bytes is not None:
                self.child(self.stream_max_bytes, stream.stream).set(stream.max_bytes)
        self.unrecorded.set(storage.unrecorded)

    def set_depths(self, depths: list[QueueDepth]) -> None:
        """Set the queues' depths; queues that are not in `depths` any more are set to 0."""
        seen: set[tuple[str, str, str]] = set()
        for depth in depths:
            labels = (depth.queue.capability.value, depth.queue.lane.value, depth.queue.model)
            seen.add(labels)
            self.queue_depth.labels(*labels).set(depth.waiting)
            self.queue_running.labels(*labels).set(depth.in_progress)
        for labels in self._depth_labels - seen:
            self.queue_depth.labels(*labels).set(0)
            self.queue_running.labels(*labels).set(0)
        self._depth_labels |= seen


class _SingleMetricRegistry:
    """Presents one metric as a registry."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return (self._metric,)


class MetricsExposition:
    """Renders the metrics of one process."""

    def __init__(
        self, registry: CollectorRegistry, max_age_s: float = MAX_AGE_S, *, has_exemplars: bool = False
    ) -> None:
        """`has_exemplars`: scrapers that accept OpenMetrics get it, since the other format has no place for them."""
        self._registry = registry
        self._has_exemplars = has_exemplars
        self._text = CachedResult(self._render, max_age_s)
        self._openmetrics = CachedResult(self._render_openmetrics, max_age_s)

    async def text(self) -> bytes:
        """Return the metrics, at most `max_age_s` old."""
        return await self._text.get()

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics for an `Accept` header, at most `max_age_s` old, and their content type."""
        if self._has_exemplars and OPENMETRICS_TYPE in accept:
            return await self._openmetrics.get(), openmetrics.CONTENT_TYPE_LATEST
        return await self._text.get(), CONTENT_TYPE_LATEST

    async def _render(self) -> bytes:
        return b"".join([part async for part in self._parts(generate_latest)])

    async def _render_openmetrics(self) -> bytes:
        parts = [part.removesuffix(OPENMETRICS_END) async for part in self._parts(openmetrics.generate_latest)]
        return b"".join((*parts, OPENMETRICS_END))

    async def _parts(self, render: Callable[[CollectorRegistry], bytes]) -> AsyncIterator[bytes]:
        """Render metric by metric, so that streams get their turn in between."""
        for metric in self._registry.collect():
            yield render(cast("CollectorRegistry", _SingleMetricRegistry(metric)))
            await asyncio.sleep(0)
