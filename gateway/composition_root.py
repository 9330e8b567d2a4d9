"""Putting one gateway process together from its settings, and starting and stopping its parts in order."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from backbone.bus.nats.auth import nats_access
from backbone.bus.nats.broadcast import NatsBroadcast
from backbone.bus.nats.gateway_bus import NatsGatewayBus
from backbone.bus.nats.jetstream import BlobBucketConfig, JobsStreamConfig
from backbone.bus.nats.job_log import NatsJobLog
from backbone.bus.nats.objects.store import NatsBlobStore
from backbone.bus.nats.write_probe import StorageHealth
from backbone.bus.sealed_job_log import SealedJobLog
from backbone.registry.auth import etcd_access
from backbone.registry.etcd import EtcdRegistry
from backbone.settings import GatewaySettings
from backbone.ssrf_guard import GuardedHttpClient
from backbone.store.auth import redis_access
from backbone.store.redis import RedisStore
from backbone.store.redis_documents import RedisDocumentStore
from gateway.app import make_app, make_observability_app
from gateway.asgi_app import App, AsgiApp
from gateway.auth.authenticator import Authenticator
from gateway.auth.bootstrap_key import load_bootstrap_key
from gateway.auth.guess_limiter import KeyGuessLimiter
from gateway.auth.key_store import KeyStore
from gateway.batches.line_jobs import BatchDependencies
from gateway.batches.line_types import EndpointLine, LineType, ResponsesLine
from gateway.batches.repository import BatchRepository
from gateway.batches.scheduler import BatchScheduler
from gateway.batches.service import BatchService, max_window_s
from gateway.cached_result import CachedResult
from gateway.clock import ClockSync
from gateway.dependencies import Parts
from gateway.dispatcher import Dispatcher
from gateway.files import FileReferences, FileStore
from gateway.health import ReadinessCheck, ShutdownState
from gateway.http.body_memory import BodyMemory
from gateway.http.disconnect import CallerTasks
from gateway.http.inference_body import InferenceBodyReader
from gateway.http.path_methods import AllowedMethods
from gateway.http.remote_media import RemoteMedia
from gateway.http.unread_budget import UnreadBudget
from gateway.jobs.http_handler import DurableRequestHandler, JobPollHandler
from gateway.jobs.http_response import JobResponder
from gateway.jobs.idempotency import Idempotency
from gateway.jobs.runtime import JobDependencies, JobRuntime, retention
from gateway.jobs.seal_refusals import SealRefusalCounter
from gateway.metrics import GatewayMetrics
from gateway.metrics_collector import MetricsCollector
from gateway.metrics_text import MetricsExposition
from gateway.responses.repository import ResponseRepository
from gateway.responses.service import PATH as RESPONSES
from gateway.responses.service import ResponseService
from gateway.signed_urls import UrlSigner
from gateway.sync.handler import HandlerOptions, InferenceHandler
from gateway.sync.submitter import SyncSubmitter
from schemas.endpoints import BY_PATH, CHAT, ENDPOINTS
from schemas.jobs import MAX_STARTS, Limits

log = structlog.get_logger(__name__)

BATCHES = "batches"
BLOB_MARGIN_S = 3600.0
"""Blobs of the bucket may live this much longer than the longest that is asked for."""


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """A gateway whose parts are up."""

    api: App
    probes: App
    """What is on the observability port."""
    submitter: SyncSubmitter
    caller_tasks: CallerTasks
    poll_tasks: CallerTasks
    unread: UnreadBudget
    metrics: GatewayMetrics

    def end_polls(self) -> None:
        """Whoever waits for a job to end is told how it stands: a poll is repeated, elsewhere."""
        self.poll_tasks.shut_down()

    def end_waiting(self) -> None:
        """Whoever still waits for an answer is told that the gateway shuts down."""
        self.submitter.end_requests()
        self.poll_tasks.shut_down()
        self.caller_tasks.shut_down()


@asynccontextmanager
async def run_gateway(settings: GatewaySettings, gateway: str, leaving: ShutdownState) -> AsyncIterator[RunningGateway]:
    """A gateway, by the name that its connections have, until the end of the block. Raises Unavailable when it cannot
    start, and ConfigurationError.
    """
    nats, storing = nats_access(settings), StorageHealth()
    bus = NatsGatewayBus(
        nats, gateway=gateway, ack_wait_s=settings.ack_wait_s, stream=_jobs_stream(settings), storing=storing
    )
    clock = ClockSync(bus.server_time_s)
    registry = EtcdRegistry(etcd_access(settings), settings.etcd_prefix)
    store = RedisStore(redis_access(settings))
    documents = RedisDocumentStore(store)
    metrics = GatewayMetrics()
    metrics.refused.counts = lambda: nats.refusals.counts
    bus.on_queue_change(metrics.count_queue)
    unread = UnreadBudget(settings.max_unread_bytes)
    dispatcher = _dispatcher(settings, bus, registry, metrics)
    submitter = SyncSubmitter(dispatcher, settings.ack_wait_s, keep_s=settings.result_url_ttl_s, unread=unread)
    notices = NatsBroadcast(nats, gateway)
    keys = KeyStore(documents, notices)
    auth, url_signer = _auth(settings, keys)
    blobs = NatsBlobStore(nats, f"{gateway}-blobs", create=_bucket(settings), storing=storing)
    nats_log = NatsJobLog(nats, gateway, retention=retention(settings), storing=storing)
    jobs_log = SealedJobLog(nats_log, SealRefusalCounter(metrics).count)
    egress = _hooks_egress(settings)
    job_runtime = JobRuntime(
        settings,
        JobDependencies(jobs_log, bus, blobs, store, documents, registry, dispatcher, metrics, keys, egress, auth),
    )
    reader = _reader(settings, blobs)
    lasting = reader.with_blob_ttl(settings.job_queue_timeout_s + settings.job_keep_s)
    files = FileStore(
        documents, blobs, settings.max_file_bytes, settings.file_keep_s, reader.memory, settings.body_timeout_s
    )
    caller_tasks, poll_tasks = CallerTasks(), CallerTasks()
    job_responder = JobResponder(job_runtime.jobs, blobs, url_signer, settings.queue_comment_after_s)
    uploads, idempotency = FileReferences(files.open), Idempotency(jobs_log, blobs)
    durable_handler = DurableRequestHandler(
        job_runtime.jobs,
        job_responder,
        caller_tasks,
        idempotency,
        lasting,
        auth,
        BY_PATH,
        uploads,
        job_runtime.webhooks.check_url,
    )
    backlog, batch_repository = jobs_log.work_queue(BATCHES), BatchRepository(documents, settings.file_keep_s)
    line_types: dict[str, LineType] = {
        endpoint.path: EndpointLine(endpoint, uploads, job_responder.payload)
        for endpoint in ENDPOINTS
        if endpoint.batchable
    }
    line_types[RESPONSES] = ResponsesLine(CHAT, blobs)
    batches = BatchService(batch_repository, files, backlog, line_types, longest_s=max_window_s(settings.job_keep_s))
    batch_scheduler = BatchScheduler(
        backlog,
        BatchDependencies(
            repository=batch_repository,
            files=files,
            blobs=blobs,
            jobs=job_runtime.jobs,
            log=jobs_log,
            reader=reader,
            line_types=line_types,
            window=settings.batch_window,
        ),
    )
    responses = ResponseService(
        job_runtime.jobs,
        caller_tasks,
        ResponseRepository(documents, blobs, settings.response_keep_s),
        blobs,
        lasting,
        idempotency,
        CHAT,
        metrics,
        pause_s=settings.queue_comment_after_s,
        refuse_other_tools=settings.responses_other_tools == "refuse",
    )
    options = HandlerOptions(settings.queue_comment_after_s, settings.log_prompts)
    inference = InferenceHandler(submitter, reader, blobs, url_signer, auth, metrics, options, durable_handler)
    readiness = ReadinessCheck(bus, registry, store, leaving, storing, clock.check)
    vitals = MetricsCollector(bus, registry, readiness, metrics)
    parts = Parts(
        dispatcher=dispatcher,
        inference=inference,
        auth=auth,
        readiness=CachedResult(readiness.check, 0.0),
        blobs=blobs,
        url_signer=url_signer,
        exposition=MetricsExposition(metrics.registry),
        keys=keys,
        jobs=job_runtime.jobs,
        job_responder=job_responder,
        documents=documents,
        caller_tasks=caller_tasks,
        reader=lasting,
        files=files,
        batches=batches,
        responses=responses,
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(egress.close)
        stack.push_async_callback(reader.media.close)
        for part in (
            bus,
            clock,
            blobs,
            registry,
            store,
            notices,
            keys,
            jobs_log,
            dispatcher,
            submitter,
            job_runtime,
            batch_scheduler,
            vitals,
        ):
            stack.push_async_callback(part.close)
            await part.start()
        api = make_app(
            parts,
            settings.public_names,
            public_url=settings.public_url,
            observability_port=settings.observability_port,
        )
        side = make_observability_app(parts, api, settings.public_url, settings.gateway_port)
        yield RunningGateway(
            api=AsgiApp(
                api,
                inference,
                ENDPOINTS,
                settings.cors_origins,
                durable_handler,
                JobPollHandler(job_runtime.jobs, poll_tasks, auth),
                AllowedMethods(api.routes).allow_header,
                settings.gateway_max_hops,
            ),
            probes=AsgiApp(
                side,
                inference,
                [],
                origins="",
                methods=AllowedMethods(side.routes).allow_header,
                max_hops=settings.gateway_max_hops,
            ),  # pages of other origins have no business there
            submitter=submitter,
            caller_tasks=caller_tasks,
            poll_tasks=poll_tasks,
            unread=unread,
            metrics=metrics,
        )


def _jobs_stream(settings: GatewaySettings) -> JobsStreamConfig:
    return JobsStreamConfig(
        settings.max_queued_jobs,
        settings.max_queued_per_model,
        settings.max_queue_bytes,
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


def _auth(settings: GatewaySettings, keys: KeyStore) -> tuple[Authenticator, UrlSigner]:
    token = load_bootstrap_key(settings)
    if not token:
        log.warning("no bootstrap key: only keys that were created before work", setting="GATEWAY_BEARER_TOKEN")
    # Where gateways have no key in common, each can check only the URLs that it signed.
    signing = token or secrets.token_urlsafe(32)
    auth = Authenticator(token, keys, KeyGuessLimiter(settings.max_wrong_keys))
    return auth, UrlSigner(signing, settings.public_url, settings.result_url_ttl_s)


def _hosts(text: str) -> frozenset[str]:
    return frozenset(host.strip() for host in text.split(",") if host.strip())


def _hooks_egress(settings: GatewaySettings) -> GuardedHttpClient:
    return GuardedHttpClient(
        max_bytes=0,
        timeout_s=settings.webhook_timeout_s,
        private_hosts=_hosts(settings.webhook_private_hosts),
        setting="WEBHOOK_PRIVATE_HOSTS",
    )


def _reader(settings: GatewaySettings, blobs: NatsBlobStore) -> InferenceBodyReader:
    egress: GuardedHttpClient | None = None
    if settings.fetch_media:
        egress = GuardedHttpClient(
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
        # As long as the job may live, with all the attempts it may take.
        MAX_STARTS * (limits.queue_s + limits.load_s + limits.total_s),
        BodyMemory(settings.max_buffered_bytes, settings.max_body_bytes),
        RemoteMedia(egress, settings.max_body_bytes),
    )
