"""Composition root: build the parts of one gateway process from its settings, start them in order, and stop them."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from backbone.bus.fair_share import FairShare
from backbone.bus.nats.auth import read_nats_access
from backbone.bus.nats.backlogs import Backlogs
from backbone.bus.nats.broadcast import NatsBroadcast
from backbone.bus.nats.gateway_bus import NatsGatewayBus
from backbone.bus.nats.jetstream import BlobBucketConfig, JobsStreamConfig
from backbone.bus.nats.job_log import NatsJobLog
from backbone.bus.nats.objects.store import NatsBlobStore
from backbone.bus.nats.write_probe import StorageHealth
from backbone.bus.private_job_log import PrivateJobLog
from backbone.bus.subjects import AUDIT_QUEUE, USAGE_QUEUE
from backbone.ledger.access import read_ledger_access
from backbone.ledger.audit_store import AuditStore
from backbone.ledger.database import LedgerDatabase
from backbone.ledger.usage_ledger import UsageLedger
from backbone.registry.auth import read_etcd_access
from backbone.registry.etcd import EtcdRegistry
from backbone.secret_files import ConfigurationError
from backbone.settings import GatewaySettings
from backbone.ssrf_guard import GuardedHttpClient
from backbone.store.auth import read_redis_access
from backbone.store.byte_quotas import ByteQuotas
from backbone.store.redis import RedisStore
from backbone.store.redis_budgets import RedisBudgetStore
from backbone.store.redis_documents import RedisDocumentStore
from backbone.store.redis_quotas import RedisByteQuotas
from backbone.store.redis_rates import RedisRateStore
from backbone.store.sealed_documents import SealedDocumentStore
from backbone.team_keys import TeamKeys
from backbone.tracing.setup import make_tracer
from gateway.answer_quotas import AnswerQuotas
from gateway.app import make_app, make_observability_app
from gateway.asgi_app import App, AsgiApp
from gateway.audit.audit_log import AuditLog
from gateway.audit.model_jobs import AuditedModelJobs
from gateway.audit.report import AuditReports
from gateway.audit.writer import AuditEmitter, AuditWriter
from gateway.auth.authenticator import Authenticator
from gateway.auth.bootstrap_key import load_bootstrap_key
from gateway.auth.guess_limiter import KeyGuessLimiter
from gateway.auth.key_store import KeyStore
from gateway.auth.team_store import TeamStore
from gateway.batches.key_work import KeyWork
from gateway.batches.line_jobs import BatchDependencies
from gateway.batches.line_types import EndpointLineType, LineType, MessagesLineType, ResponsesLineType
from gateway.batches.repository import KIND as BATCH_KIND
from gateway.batches.repository import BatchRepository
from gateway.batches.scheduler import BatchScheduler
from gateway.batches.service import BatchService, max_window_s
from gateway.cached_result import CachedResult
from gateway.clock import ClockSync
from gateway.dependencies import Parts
from gateway.dialects.anthropic.asgi_app import AnthropicApp
from gateway.dialects.anthropic.endpoint import MESSAGES_PATH, count_endpoint, messages_endpoint
from gateway.dialects.anthropic.from_chat import AnswerFacts
from gateway.dialects.anthropic.results import message_result
from gateway.dispatcher import Dispatcher
from gateway.files import KIND as FILE_KIND
from gateway.files import FileReferences, FileStore
from gateway.health import ReadinessCheck, ShutdownState
from gateway.http.body_memory import BodyMemory
from gateway.http.disconnect import CallerTasks
from gateway.http.error_handlers import AllowedMethods
from gateway.http.inference_body import InferenceBodyReader
from gateway.http.remote_media import RemoteMedia
from gateway.http.unread_budget import UnreadBudget
from gateway.inspector.inspector import KIND as INSPECTED_KIND
from gateway.inspector.inspector import LIST_KIND as INSPECTED_LIST_KIND
from gateway.inspector.inspector import Inspector
from gateway.jobs.estimator import count_slots
from gateway.jobs.http_handler import DurableRequestHandler, JobPollHandler
from gateway.jobs.http_response import JobResponder
from gateway.jobs.idempotency import Idempotency
from gateway.jobs.runtime import JobDependencies, JobRuntime, retention
from gateway.jobs.seal_refusals import SealRefusalCounter
from gateway.jobs.storage_quotas import JobStorageQuotas
from gateway.limits.budget_ledger import LedgerSpend
from gateway.limits.budget_limiter import BudgetLimiter
from gateway.limits.budget_meter import BudgetMeter
from gateway.limits.effective import AssignedBudget, Bound
from gateway.limits.followers import FollowerLimiter
from gateway.limits.rate_limiter import RateLimiter
from gateway.log_search import LogSearch
from gateway.metrics import GatewayMetrics, MetricsExposition
from gateway.metrics_collector import MetricsCollector
from gateway.overview.hosts import HostDirectory
from gateway.overview.monitor import OverviewMonitor, OverviewSources
from gateway.overview.public_status import PublicStatus
from gateway.overview.queue_page import QueueBrowser
from gateway.overview.traffic import TrafficExchange
from gateway.peers import GatewayPeers
from gateway.people.assembly import build_people
from gateway.queue_holds import QueueHolds
from gateway.responses.repository import KIND as RESPONSE_KIND
from gateway.responses.repository import ResponseRepository
from gateway.responses.service import PATH as RESPONSES
from gateway.responses.service import ResponseService
from gateway.signed_urls import UrlSigner
from gateway.sync.handler import HandlerOptions, InferenceHandler
from gateway.sync.submitter import SyncSubmitter
from gateway.traces import JobTraces
from gateway.usage.emitter import UsageEmitter
from gateway.usage.prices import PriceFile
from gateway.usage.report import UsageReports
from gateway.usage.writer import LedgerWriter
from gateway.webhooks.budget_events import BudgetAnnouncer
from gateway.webhooks.sender import WEBHOOK_QUEUE_NAME, WebhookSender
from schemas.endpoints import BY_PATH, CHAT, ENDPOINTS, SERVED
from schemas.jobs import MAX_STARTS, Limits
from schemas.keys import AccessLimits

log = structlog.get_logger(__name__)

BATCHES = "batches"
BLOB_MARGIN_S = 3600.0
"""Blobs may live this much longer in the bucket than the longest lifetime that a blob is stored with."""

SEALED_KINDS = frozenset({FILE_KIND, BATCH_KIND, RESPONSE_KIND, INSPECTED_KIND, INSPECTED_LIST_KIND})
"""Documents that hold content, or names of blobs with their keys."""


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """A gateway whose parts have started."""

    api: App
    probes: App
    """The application of the observability port."""
    submitter: SyncSubmitter
    caller_tasks: CallerTasks
    poll_tasks: CallerTasks
    unread: UnreadBudget
    metrics: GatewayMetrics
    keys: KeyStore

    def end_job_polls(self) -> None:
        """Answer every poll that waits for a job with the job's present state; the caller repeats it at another gateway."""
        self.poll_tasks.shut_down()

    def end_open_requests(self) -> None:
        """End every open request with the error that the gateway shuts down."""
        self.submitter.end_requests()
        self.poll_tasks.shut_down()
        self.caller_tasks.shut_down()


@asynccontextmanager
async def run_gateway(
    settings: GatewaySettings, name: str, shutdown_state: ShutdownState
) -> AsyncIterator[RunningGateway]:
    """Build and start a gateway; stop it at the end of the block. `name`: of its connections to NATS.

    Raises Unavailable when it cannot start, and ConfigurationError.
    """
    metrics = GatewayMetrics()
    clients = _Clients(settings, name, metrics)
    services = _Services(settings, clients, metrics, shutdown_state)
    async with contextlib.AsyncExitStack() as stack:
        if clients.tracer is not None:
            stack.push_async_callback(clients.tracer.close)
        stack.push_async_callback(services.webhook_client.close)
        stack.push_async_callback(services.reader.media.close)
        for part in services.in_start_order(clients):
            stack.push_async_callback(part.close)
            await part.start()
        yield services.serve(settings)


class _Startable(Protocol):
    """A part with a life of its own. `close` is called even where `start` failed."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...


class _Clients:
    """The gateway's clients of NATS, etcd and Redis."""

    def __init__(self, settings: GatewaySettings, name: str, metrics: GatewayMetrics) -> None:
        self.tracer = make_tracer(settings, "nexus-gateway", name)
        self.traces = JobTraces(self.tracer) if self.tracer is not None else None
        nats = read_nats_access(settings)
        self.storage_health = StorageHealth()
        self.registry = EtcdRegistry(read_etcd_access(settings), settings.etcd_prefix)
        self.store = RedisStore(read_redis_access(settings))
        self.team_keys = TeamKeys.read(settings.team_keys_file)
        self.documents = SealedDocumentStore(RedisDocumentStore(self.store), self.team_keys, SEALED_KINDS)
        self.broadcast = NatsBroadcast(nats, name)
        self.keys = KeyStore(self.documents, self.broadcast, defaults=_team_defaults(settings))
        backlogs = Backlogs(FairShare(self.keys.weight, lambda queue: count_slots(self.registry.snapshot, queue)))
        self.bus = NatsGatewayBus(
            nats,
            gateway=name,
            ack_wait_s=settings.ack_wait_s,
            stream=_jobs_stream(settings),
            storage_health=self.storage_health,
            backlogs=backlogs,
        )
        self.blobs = NatsBlobStore(nats, f"{name}-blobs", create=_bucket(settings), storage_health=self.storage_health)
        log = NatsJobLog(
            nats, name, retention=retention(settings), storage_health=self.storage_health, backlogs=backlogs
        )
        self.job_log = PrivateJobLog(log, SealRefusalCounter(metrics).count, self.team_keys)
        self.clock = ClockSync(self.bus.server_time_s)
        self.peers = GatewayPeers(self.bus, name)
        self.log_search = LogSearch(self.bus, self.registry, self.peers)
        metrics.bus_refusals.counts = lambda: nats.refusals.counts
        self.bus.on_queue_change(metrics.count_queue)


class _Services:
    """The gateway's own parts: they answer requests, run jobs and batches, check keys, store files, collect metrics."""

    def __init__(
        self, settings: GatewaySettings, clients: _Clients, metrics: GatewayMetrics, shutdown_state: ShutdownState
    ) -> None:
        self.metrics = metrics
        self.inspector = Inspector(clients.documents, clients.keys.inspection)
        self.unread = UnreadBudget(settings.max_unread_bytes)
        self.dispatcher = _dispatcher(settings, clients.bus, clients.registry, metrics)
        self.submitter = SyncSubmitter(
            self.dispatcher, settings.ack_wait_s, keep_s=settings.result_url_ttl_s, unread=self.unread
        )
        self.keys = clients.keys
        self.rate_limiter = RateLimiter(RedisRateStore(clients.store))
        token = load_bootstrap_key(settings)
        self.auth, self.url_signer = _auth(settings, token, self.keys, self.rate_limiter)
        self.people = build_people(settings, clients.documents, self.keys, self.auth, token)
        self.webhook_client = _webhook_client(settings)
        self.webhooks = _webhooks(settings, clients, self.webhook_client, self.auth, metrics, self.keys, clients.traces)
        self.body_quotas = RedisByteQuotas(clients.store, "bodies")
        self.usage_reports = UsageReports(None)
        self.audit_reports = AuditReports(None)
        self.audit_log: AuditLog | None = None
        self.usage_emitter: UsageEmitter | None = None
        self.ledger_parts: tuple[_Startable, ...] = ()
        self.ledger_lag_s: Callable[[], float] = lambda: 0.0
        prices, spend = PriceFile(settings.ledger_prices_file), None
        if (access := read_ledger_access(settings)) is not None:
            database = LedgerDatabase(access)
            ledger = UsageLedger(database)
            self._open_ledger(settings, clients, ledger, AuditStore(database), prices)
            spend = LedgerSpend(ledger, clients.job_log.work_queue(USAGE_QUEUE).oldest, lambda: prices.currency)
        self.budgets, batches = (
            self._budgets(clients, prices, spend),
            BatchRepository(clients.documents, settings.file_keep_s),
        )
        self.job_runtime = JobRuntime(
            settings,
            JobDependencies(
                log=clients.job_log,
                bus=clients.bus,
                blobs=clients.blobs,
                store=clients.store,
                documents=clients.documents,
                registry=clients.registry,
                dispatcher=self.dispatcher,
                metrics=metrics,
                keys=self.keys,
                rate_limiter=self.rate_limiter,
                budgets=self.budgets,
                webhooks=self.webhooks,
                storage=JobStorageQuotas(
                    self.body_quotas,
                    RedisByteQuotas(clients.store, "results"),
                    clients.job_log,
                    clients.blobs,
                    clients.store,
                    self.keys.limits,
                    batches.is_unfinished,
                    keep_s=settings.job_keep_s,
                ),
                usage=self.usage_emitter,
                traces=clients.traces,
                inspector=self.inspector,
            ),
        )
        self.jobs = self.job_runtime.jobs
        self.reader = _reader(settings, clients.blobs, self.body_quotas)
        self.job_reader = self.reader.with_blob_ttl(settings.job_queue_timeout_s + settings.job_keep_s)
        self.files = FileStore(
            clients.documents,
            clients.blobs,
            settings.max_file_bytes,
            settings.file_keep_s,
            self.reader.memory,
            RedisByteQuotas(clients.store),
            settings.body_timeout_s,
        )
        self.file_references = FileReferences(self.files.open)
        self.caller_tasks, self.poll_tasks = CallerTasks(), CallerTasks()
        self.job_responder = JobResponder(
            self.jobs,
            clients.blobs,
            self.url_signer,
            settings.queue_comment_after_s,
            {MESSAGES_PATH: lambda data, job: message_result(data, job, AnswerFacts())},
        )
        idempotency = Idempotency(clients.job_log, clients.blobs)
        refuse_server_tools = settings.responses_other_tools == "refuse"
        self.messages = messages_endpoint(refuse_server_tools=refuse_server_tools)
        self.token_counts = count_endpoint(refuse_server_tools=refuse_server_tools)
        self.durable_handler = DurableRequestHandler(
            self.jobs,
            self.job_responder,
            self.caller_tasks,
            idempotency,
            self.job_reader,
            self.auth,
            {**BY_PATH, self.messages.path: self.messages},
            self.file_references,
            self.webhooks.check_url,
            self.audit_log,
            clients.tracer,
        )
        self.answer_quotas = AnswerQuotas(
            RedisByteQuotas(clients.store, "urls"),
            self.body_quotas,
            clients.blobs,
            url_keep_s=settings.result_url_ttl_s,
        )
        self.inference = InferenceHandler(
            self.submitter,
            self.reader,
            clients.blobs,
            self.url_signer,
            self.auth,
            metrics,
            HandlerOptions(settings.queue_comment_after_s, settings.log_prompts, clients.team_keys.has),
            self.durable_handler,
            self.rate_limiter,
            self.budgets,
            self.caller_tasks,
            self.answer_quotas,
            self.usage_emitter,
            clients.tracer,
            self.inspector,
        )
        self.batches, self.batch_scheduler = self._batches(settings, clients, batches)
        self.responses = ResponseService(
            self.jobs,
            self.caller_tasks,
            ResponseRepository(
                clients.documents,
                clients.blobs,
                settings.response_keep_s,
                RedisByteQuotas(clients.store, "responses"),
            ),
            clients.blobs,
            self.job_reader,
            idempotency,
            CHAT,
            metrics,
            keep_alive_s=settings.queue_comment_after_s,
            refuse_other_tools=settings.responses_other_tools == "refuse",
        )
        self.readiness = ReadinessCheck(
            clients.bus,
            clients.registry,
            clients.store,
            shutdown_state,
            clients.storage_health,
            clients.clock.check,
        )
        self.hosts = HostDirectory(clients.registry)
        self.holds = QueueHolds(clients.bus, clients.registry)
        self.traffic = TrafficExchange(clients.bus, metrics.model_totals)
        self.overview = OverviewMonitor(
            OverviewSources(
                clients.bus,
                self.dispatcher,
                clients.store,
                self.traffic,
                self.readiness.check,
                self.ledger_lag_s,
            )
        )
        self.metrics_collector = MetricsCollector(clients.bus, clients.registry, self.readiness, metrics)
        self.parts = Parts(
            dispatcher=self.dispatcher,
            inference=self.inference,
            auth=self.auth,
            readiness=CachedResult(self.readiness.check, 0.0),
            blobs=clients.blobs,
            url_signer=self.url_signer,
            exposition=MetricsExposition(metrics.registry, has_exemplars=clients.tracer is not None),
            keys=self.keys,
            teams=TeamStore(self.keys),
            key_work=KeyWork(clients.store, self.jobs, self.batches),
            jobs=self.jobs,
            job_search=self.job_runtime.search,
            job_responder=self.job_responder,
            documents=clients.documents,
            caller_tasks=self.caller_tasks,
            reader=self.job_reader,
            files=self.files,
            batches=self.batches,
            responses=self.responses,
            usage=self.usage_reports,
            followers=FollowerLimiter(),
            people=self.people,
            budgets=self.budgets,
            check_webhook=self.webhooks.check_url,
            audit=self.audit_reports,
            inspector=self.inspector,
            log_search=clients.log_search,
            overview=self.overview,
            holds=self.holds,
            hosts=self.hosts,
            status=PublicStatus(self.overview),
            queues=QueueBrowser(clients.bus, self.dispatcher, clients.store),
        )

    def _budgets(self, clients: _Clients, prices: PriceFile, spend: LedgerSpend | None) -> BudgetLimiter:
        def owner_of(key_id: str) -> str:
            key = self.keys.get(key_id)
            return key.owner if key is not None else ""

        def count(assigned: AssignedBudget) -> None:
            labels = (assigned.holder, assigned.budget.unit, assigned.budget.period)
            self.metrics.child(self.metrics.budget_refusals, *labels).inc()

        meter = BudgetMeter(prices.unit_prices, lambda: prices.currency)
        announcer = BudgetAnnouncer(self.webhooks, owner_of, meter.currency)
        return BudgetLimiter(
            RedisBudgetStore(clients.store), meter, spend, announce=announcer.announce, count_refused=count
        )

    def _open_ledger(
        self,
        settings: GatewaySettings,
        clients: _Clients,
        ledger: UsageLedger,
        audit_store: AuditStore,
        prices: PriceFile,
    ) -> None:
        """Build what records usage and administrative actions. Raises ConfigurationError."""
        queue, metrics = clients.job_log.work_queue(USAGE_QUEUE), self.metrics
        audit_queue = clients.job_log.work_queue(AUDIT_QUEUE)
        folder = Path(settings.usage_journal_dir) if settings.usage_journal_dir else None
        try:
            self.usage_emitter = UsageEmitter(queue, folder, metrics.usage_dropped.inc)
            audit_emitter = AuditEmitter(audit_queue, folder, metrics.audit_dropped.inc)
        except OSError as error:
            raise ConfigurationError(f"USAGE_JOURNAL_DIR: {folder} cannot be written: {error.strerror}") from error
        writer = LedgerWriter(queue, ledger, prices, metrics, keep_s=settings.ledger_keep_s)
        audit_writer = AuditWriter(audit_queue, audit_store, metrics, keep_s=settings.audit_keep_s)
        self.ledger_lag_s = lambda: max(writer.lag_s(), audit_writer.lag_s())
        metrics.ledger_lag.set_function(self.ledger_lag_s)
        self.usage_reports, self.audit_reports = UsageReports(ledger), AuditReports(audit_store)
        self.audit_log = AuditLog(
            audit_emitter.emit, secret=load_bootstrap_key(settings) or "", person_of=self.keys.person_of
        )
        self.auth.on_refused = self.audit_log.record_refusal
        self.ledger_parts = (self.usage_emitter, writer, audit_emitter, audit_writer, self.audit_log)

    def _batches(
        self, settings: GatewaySettings, clients: _Clients, repository: BatchRepository
    ) -> tuple[BatchService, BatchScheduler]:
        queue = clients.job_log.work_queue(BATCHES)
        line_types: dict[str, LineType] = {
            endpoint.path: EndpointLineType(endpoint, self.file_references, self.job_responder.payload)
            for endpoint in ENDPOINTS
            if endpoint.batchable
        }
        line_types[MESSAGES_PATH] = MessagesLineType(self.messages, self.job_responder.payload)
        line_types[RESPONSES] = ResponsesLineType(CHAT, clients.blobs)
        longest_s = max_window_s(settings.job_keep_s)
        service = BatchService(
            repository, self.files, queue, line_types, max_window_s=longest_s, team_keys=clients.team_keys
        )
        dependencies = BatchDependencies(
            repository=repository,
            files=self.files,
            blobs=clients.blobs,
            jobs=self.jobs,
            log=clients.job_log,
            reader=self.reader,
            line_types=line_types,
            window=settings.batch_window,
            limits=self.keys.limits,
            results=RedisByteQuotas(clients.store, "batches"),
            team_keys=clients.team_keys,
        )
        return service, BatchScheduler(queue, dependencies)

    def in_start_order(self, clients: _Clients) -> tuple[_Startable, ...]:
        """Return every part to be started, each behind the parts that it needs."""
        return (
            clients.bus,
            clients.clock,
            clients.peers,
            clients.log_search,
            clients.blobs,
            clients.registry,
            clients.store,
            clients.broadcast,
            self.keys,
            self.people.gate,
            self.rate_limiter,
            clients.job_log,
            self.budgets,
            *self.ledger_parts,
            self.inspector,
            self.dispatcher,
            self.answer_quotas,
            self.submitter,
            self.job_runtime,
            self.batch_scheduler,
            self.metrics_collector,
            self.holds,
            self.hosts,
            self.traffic,
            self.overview,
        )

    def serve(self, settings: GatewaySettings) -> RunningGateway:
        """Build the applications of both ports. All parts have started."""
        api = make_app(
            self.parts,
            settings.public_names,
            public_url=settings.public_url,
            observability_port=settings.observability_port,
            audit_log=self.audit_log,
            model_jobs=None
            if self.audit_log is None
            else AuditedModelJobs(self.audit_log, self.auth, self.inference.serve),
        )
        observability = make_observability_app(self.parts, api, settings.public_url, settings.gateway_port)
        return RunningGateway(
            api=AsgiApp(
                AnthropicApp(api, self.inference, self.messages, self.token_counts),
                self.inference,
                ENDPOINTS if self.audit_log is None else SERVED,
                settings.cors_origins,
                self.durable_handler,
                JobPollHandler(self.jobs, self.poll_tasks, self.auth, self.parts.followers),
                AllowedMethods(api.routes).allow_header,
                settings.gateway_max_hops,
                self.people.gate,
                None if self.audit_log is None else self.audit_log.record_denial,
            ),
            probes=AsgiApp(
                observability,
                self.inference,
                [],
                origins="",  # pages of other origins never read this port
                methods=AllowedMethods(observability.routes).allow_header,
                max_hops=settings.gateway_max_hops,
            ),
            submitter=self.submitter,
            caller_tasks=self.caller_tasks,
            poll_tasks=self.poll_tasks,
            unread=self.unread,
            metrics=self.metrics,
            keys=self.keys,
        )


def _webhooks(
    settings: GatewaySettings,
    clients: _Clients,
    webhook_client: GuardedHttpClient,
    auth: Authenticator,
    metrics: GatewayMetrics,
    keys: KeyStore,
    traces: JobTraces | None,
) -> WebhookSender:
    def bounds_of(key: str, owner: str) -> tuple[Bound, ...]:
        return keys.limits(key).webhooks or (Bound(f"team:{owner}", settings.team_max_webhooks),)

    return WebhookSender(
        clients.job_log.work_queue(WEBHOOK_QUEUE_NAME),
        clients.store,
        webhook_client,
        auth.webhook_secret,
        delays_s=settings.webhook_delays,
        timeout_s=settings.webhook_timeout_s,
        count=lambda state: metrics.child(metrics.webhook_tries, state).inc(),
        bounds_of=bounds_of,
        traces=traces,
    )


def _jobs_stream(settings: GatewaySettings) -> JobsStreamConfig:
    return JobsStreamConfig(
        settings.max_queued_jobs,
        settings.max_queued_per_model,
        settings.max_queue_bytes // 2,
        settings.stream_replicas,
        settings.max_queues,
    )


def _bucket(settings: GatewaySettings) -> BlobBucketConfig:
    jobs_s = settings.job_queue_timeout_s + settings.job_keep_s
    longest = max(jobs_s, settings.file_keep_s, settings.response_keep_s, settings.result_url_ttl_s)
    return BlobBucketConfig(settings.max_blob_bytes, settings.stream_replicas, int(longest + BLOB_MARGIN_S))


def _dispatcher(
    settings: GatewaySettings,
    bus: NatsGatewayBus,
    registry: EtcdRegistry,
    metrics: GatewayMetrics,
) -> Dispatcher:
    return Dispatcher(
        bus,
        registry,
        metrics,
        _limits(settings),
        media_timeout_s=settings.media_timeout_s,
        pull_timeout_s=settings.pull_timeout_s,
        queue_grace_s=settings.queue_grace_s,
    )


def _limits(settings: GatewaySettings) -> Limits:
    return Limits(
        queue_s=settings.queue_timeout_s,
        first_token_s=settings.first_token_timeout_s,
        idle_s=settings.idle_timeout_s,
        total_s=settings.total_timeout_s,
        load_s=settings.load_timeout_s,
    )


def _auth(
    settings: GatewaySettings, token: str, keys: KeyStore, rate_limiter: RateLimiter
) -> tuple[Authenticator, UrlSigner]:
    if not token:
        log.warning("auth.bootstrap_key_missing", setting="GATEWAY_BEARER_TOKEN")
    # Without a common bootstrap key, each gateway can verify only the URLs that it signed.
    signing = token or secrets.token_urlsafe(32)
    auth = Authenticator(token, keys, KeyGuessLimiter(settings.max_wrong_keys), rate_limiter.headers)
    return auth, UrlSigner(signing, settings.public_url, settings.result_url_ttl_s, keys.is_revoked)


def _team_defaults(settings: GatewaySettings) -> AccessLimits:
    return AccessLimits(
        lanes=settings.team_lane_names,
        requests_per_minute=settings.team_requests_per_minute or None,
        tokens_per_minute=settings.team_tokens_per_minute or None,
        max_open=settings.team_max_open,
        max_queued=settings.team_max_queued or max(1, settings.max_queued_per_model // 2),
        max_running=settings.team_max_running or None,
        max_stored_bytes=settings.team_max_stored_bytes or settings.max_blob_bytes // 4,
        max_pending_bytes=settings.team_max_pending_bytes or settings.max_blob_bytes // 4,
        max_result_bytes=settings.team_max_result_bytes or settings.max_result_bytes // 4,
        max_batches=settings.team_max_batches,
        max_webhooks=settings.team_max_webhooks,
    )


def _hosts(text: str) -> frozenset[str]:
    return frozenset(host.strip() for host in text.split(",") if host.strip())


def _webhook_client(settings: GatewaySettings) -> GuardedHttpClient:
    return GuardedHttpClient(
        max_bytes=0,
        timeout_s=settings.webhook_timeout_s,
        private_hosts=_hosts(settings.webhook_private_hosts),
        setting="WEBHOOK_PRIVATE_HOSTS",
    )


def _reader(settings: GatewaySettings, blobs: NatsBlobStore, quotas: ByteQuotas) -> InferenceBodyReader:
    client: GuardedHttpClient | None = None
    if settings.fetch_media:
        client = GuardedHttpClient(
            max_bytes=settings.fetch_max_bytes,
            timeout_s=settings.fetch_timeout_s,
            private_hosts=_hosts(settings.fetch_private_hosts),
            setting="FETCH_PRIVATE_HOSTS",
        )
    limits = _limits(settings)
    return InferenceBodyReader(
        blobs,
        settings.max_body_bytes,
        settings.body_timeout_s,
        # Lifetime of a request's blobs: the longest that its job may live, with all its attempts.
        MAX_STARTS * (limits.queue_s + limits.load_s + limits.total_s),
        BodyMemory(settings.max_buffered_bytes, settings.max_body_bytes),
        RemoteMedia(client, settings.max_body_bytes),
        quotas,
    )
