"""Builds the job components of a gateway and runs their background work."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Protocol

import structlog

from backbone.bus.blobs import BlobStore
from backbone.bus.bus import GatewayBus
from backbone.bus.job_log import Retention
from backbone.bus.private_job_log import PrivateJobLog
from backbone.registry.registry import Registry
from backbone.settings import GatewaySettings
from backbone.store.documents import DocumentStore
from backbone.store.store import Store
from gateway.auth.key_store import KeyStore
from gateway.dispatcher import Dispatcher
from gateway.inspector.inspector import Inspector
from gateway.jobs.attempt_gate import AttemptGate
from gateway.jobs.content_retention import ContentRetention
from gateway.jobs.estimator import EtaEstimator
from gateway.jobs.expiry import ExpiryWatcher
from gateway.jobs.lane_change import LaneChanger
from gateway.jobs.outcome_recorder import OutcomeRecorder
from gateway.jobs.record_recovery import RecordRecovery
from gateway.jobs.search import JobSearch
from gateway.jobs.service import JobService
from gateway.jobs.storage_quotas import JobStorageQuotas
from gateway.jobs.submitter import JobSubmitter
from gateway.jobs.terminator import JobTerminator
from gateway.jobs.usage import OutcomeUsage
from gateway.limits.budget_limiter import BudgetLimiter
from gateway.limits.rate_limiter import RateLimiter
from gateway.metrics import GatewayMetrics
from gateway.traces import JobTraces
from gateway.usage.emitter import UsageEmitter
from gateway.usage.events import event_of_outcome
from schemas.outcome import Outcome

log = structlog.get_logger(__name__)


class WebhookQueue(Protocol):
    """Sends the outcomes of jobs to their webhooks; `gateway.webhooks` implements it."""

    async def enqueue(self, outcome: Outcome, /) -> None:
        """Store an outcome to be sent. Raises Unavailable."""

    async def run(self) -> None:
        """Send stored outcomes, until cancelled."""


@dataclass(frozen=True, slots=True)
class JobDependencies:
    """The collaborators of the job components."""

    log: PrivateJobLog
    bus: GatewayBus
    blobs: BlobStore
    store: Store
    documents: DocumentStore
    registry: Registry
    dispatcher: Dispatcher
    metrics: GatewayMetrics
    keys: KeyStore
    rate_limiter: RateLimiter
    budgets: BudgetLimiter
    webhooks: WebhookQueue
    storage: JobStorageQuotas
    usage: UsageEmitter | None = None
    """None without a ledger."""
    traces: JobTraces | None = None
    """None where tracing is off."""
    inspector: Inspector | None = None


class JobRuntime:
    """Owns the jobs service and its background tasks: recorder, expiry, recovery, webhooks and attempt gate."""

    def __init__(self, settings: GatewaySettings, dependencies: JobDependencies) -> None:
        self._log = dependencies.log
        self._terminator = terminator = JobTerminator(dependencies.log, dependencies.store, dependencies.bus)
        content_keys = dependencies.log.content_keys
        content = ContentRetention(content_keys, dependencies.log, dependencies.store, dependencies.blobs)
        submitter = JobSubmitter(
            dependencies.log,
            dependencies.store,
            terminator,
            dependencies.dispatcher,
            dependencies.metrics,
            keep_s=settings.job_keep_s,
            queue_s=settings.job_queue_timeout_s,
            rate_limiter=dependencies.rate_limiter,
            content_keys=content_keys,
            budgets=dependencies.budgets,
            traces=dependencies.traces,
            inspector=dependencies.inspector,
        )
        estimator = EtaEstimator(dependencies.store, lambda: dependencies.registry.snapshot)
        keep_s = settings.job_keep_s
        usage: OutcomeUsage | None = None
        if dependencies.usage is not None:
            usage = OutcomeUsage(dependencies.usage, dependencies.store, dependencies.keys.person_of)
        self.jobs = JobService(
            dependencies.log,
            dependencies.store,
            dependencies.blobs,
            submitter,
            terminator,
            estimator,
            LaneChanger(dependencies.log, dependencies.store, terminator, dependencies.bus),
            keep_s=keep_s,
            usage=usage,
            content=content,
        )
        self.search = JobSearch(dependencies.store, dependencies.keys.keys_of, id_slack_s=settings.idempotency_keep_s)
        self._webhooks = dependencies.webhooks
        self._keys = dependencies.keys
        self._rate_limiter = dependencies.rate_limiter
        self._budgets = dependencies.budgets
        self._recorder = OutcomeRecorder(
            dependencies.log,
            dependencies.store,
            dependencies.blobs,
            terminator,
            dependencies.metrics,
            keep_s=keep_s,
            enqueue=self._webhooks.enqueue,
            usage=usage,
            settle=self._settle_limits,
            storage=dependencies.storage,
            content=content,
            record_use=dependencies.bus.record_use,
            traces=dependencies.traces,
            inspector=dependencies.inspector,
        )
        self._updates: set[asyncio.Task[None]] = set()
        dependencies.bus.on_job_moved(self._note_moved)
        self._expiry_watcher = ExpiryWatcher(
            dependencies.log,
            dependencies.store,
            terminator,
            ack_wait_s=settings.ack_wait_s,
            content=content,
            is_held=dependencies.dispatcher.is_held,
        )
        self._gate = AttemptGate(
            dependencies.log,
            dependencies.store,
            ack_wait_s=settings.ack_wait_s,
            keep_s=keep_s,
            max_running=lambda key: dependencies.keys.limits(key).running,
            content_keys=content_keys,
            on_start=dependencies.bus.record_start,
            traces=dependencies.traces,
        )
        self._recovery = RecordRecovery(dependencies.log, dependencies.store, dependencies.documents, keep_s=keep_s)
        self._tasks: list[asyncio.Task[None]] = []

    def _settle_limits(self, outcome: Outcome, reserved: int, at: int) -> None:
        """Count what a job has used against the limits and the budgets of its key."""
        limits = self._keys.limits(outcome.key)
        if limits.tokens:
            usage = outcome.usage
            used = (usage.total_tokens or usage.prompt_tokens + usage.completion_tokens) if usage is not None else 0
            self._rate_limiter.settle(limits, reserved, used)
        if limits.budgets:
            self._budgets.charge(limits, event_of_outcome(outcome, 1000 * at, None))

    def _note_moved(self, job: str, run: int, owner: str, seq: int) -> None:
        task = asyncio.create_task(self._terminator.record_move(owner, job, run, seq))
        self._updates.add(task)
        task.add_done_callback(self._updates.discard)

    async def start(self) -> None:
        """Start the background tasks. The job log must be started. Raises Unavailable."""
        await self._log.serve_gate_requests(self._gate)
        for work in (self._recorder.run(), self._expiry_watcher.run(), self._recovery.run(), self._webhooks.run()):
            task = asyncio.create_task(work)
            task.add_done_callback(_report)
            self._tasks.append(task)

    async def close(self) -> None:
        """Stop the background tasks. The other gateways take over their work."""
        await asyncio.gather(*self._updates)
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._gate.close()


def _report(task: asyncio.Task[None]) -> None:
    """Log a background task that ended with an error."""
    if not task.cancelled() and task.exception() is not None:
        log.error("jobs.task_died", task=task.get_coro().__qualname__, exc_info=task.exception())  # type: ignore[union-attr]


def retention(settings: GatewaySettings) -> Retention:
    """Return the retention times and sizes of the streams about jobs."""
    return Retention(
        jobs_s=settings.job_keep_s,
        events_s=settings.events_keep_s,
        dead_letters_s=settings.dead_letters_keep_s,
        claims_s=settings.idempotency_keep_s,
        max_event_bytes=settings.max_event_bytes,
        max_outcome_bytes=settings.max_result_bytes,
        max_usage_bytes=settings.max_usage_bytes,
        max_audit_bytes=settings.max_audit_bytes,
        replicas=settings.stream_replicas,
    )
