"""Assembly of a worker from its settings; it runs until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import signal

import structlog
import uvloop

from backbone.bus.nats.auth import read_nats_access
from backbone.bus.nats.objects.store import NatsBlobStore
from backbone.bus.nats.worker_bus import NatsWorkerBus
from backbone.bus.nats.worker_log import NatsWorkerLog
from backbone.gc_tuning import tune_garbage_collector
from backbone.listen_errors import describe_listen_error
from backbone.logging import configure_logging
from backbone.registry.auth import read_etcd_access
from backbone.registry.etcd import EtcdRegistry
from backbone.secret_files import ConfigurationError
from backbone.setting_errors import read_settings
from backbone.settings import WorkerSettings
from backbone.startup_errors import report_startup_error
from backbone.tracing.setup import make_tracer
from schemas.errors import NexusError
from schemas.redaction import REDACTOR
from workers.backend_options import split_options
from workers.backends.base import Backend, BackendConfig, make_backend
from workers.health_server import serve_probes
from workers.metrics import WorkerMetrics
from workers.worker import Worker

log = structlog.get_logger(__name__)

START_FAILED_EVENT = "worker.start_failed"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def main() -> int:
    """Run a worker that environment variables configure. Return the exit status."""
    try:
        settings = read_settings(WorkerSettings)
    except ConfigurationError as error:
        return report_startup_error(START_FAILED_EVENT, error)
    return run(settings)


def run(settings: WorkerSettings) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit status: 2 for settings that cannot work, 1 for a failed start."""
    configure_logging(settings.log_format, settings.log_level, ring_bytes=settings.log_ring_bytes)
    REDACTOR.add(settings.worker_backend_url, settings.nats_url, settings.etcd_url, settings.host)
    try:
        uvloop.run(_main(settings))
    except (NexusError, OSError, ConfigurationError) as error:
        return report_startup_error(START_FAILED_EVENT, error)
    return 0


def worker_id(settings: WorkerSettings) -> str:
    """Return the configured id, or one of host, backend and a random part. It is a subject's token: `[A-Za-z0-9_-]`."""
    if settings.worker_name:
        return (
            settings.worker_name
            if _ID.fullmatch(settings.worker_name)
            else re.sub(r"[^A-Za-z0-9_-]", "-", settings.worker_name)[:64]
        )
    host = re.sub(r"[^A-Za-z0-9_-]", "-", settings.host)[:32]
    return f"{host}-{settings.worker_backend}-{secrets.token_hex(3)}"


def backend_config(settings: WorkerSettings) -> BackendConfig:
    """Return the settings that the adapter needs."""
    return BackendConfig(
        url=settings.worker_backend_url,
        api_key=settings.worker_backend_key.get_secret_value() if settings.worker_backend_key else "",
        models=tuple(name.strip() for name in settings.worker_models.split(",") if name.strip()),
        options=split_options(settings.worker_backend_options),
    )


def _backend(settings: WorkerSettings) -> Backend:
    try:
        return make_backend(settings.worker_backend, backend_config(settings))
    except ValueError as error:
        raise ConfigurationError(_configuration_message(str(error), settings)) from error


def _configuration_message(problem: str, settings: WorkerSettings) -> str:
    """Return the message of an adapter's configuration error, with the setting that it concerns."""
    if "URL" not in problem:
        return f"the backend '{settings.worker_backend}' cannot be set up: {problem}. See WORKER_BACKEND_OPTIONS (--option)."
    given = settings.worker_backend_url.rpartition("@")[2]  # without a password
    is_now = f"is '{given}'" if given else "is not set"
    return f"WORKER_BACKEND_URL (--url) {is_now}, and the backend '{settings.worker_backend}' needs it: {problem}."


async def _main(settings: WorkerSettings) -> None:
    name = worker_id(settings)
    structlog.contextvars.bind_contextvars(worker=name)
    metrics = WorkerMetrics()
    tracer = make_tracer(settings, "nexus-worker", name)
    nats = read_nats_access(settings)
    registry = EtcdRegistry(
        read_etcd_access(settings), settings.etcd_prefix, lease_s=settings.worker_lease_s, services_only=True
    )
    blobs = NatsBlobStore(nats, f"{name}-blobs", worker=name)
    jobs = NatsWorkerLog(nats, f"{name}-log")
    worker = Worker(
        worker_id=name,
        host=settings.host,
        backend=_backend(settings),
        blobs=blobs,
        log=jobs,
        registry=registry,
        metrics=metrics,
        ack_wait_s=settings.ack_wait_s,
        slots=settings.worker_concurrency,
        health_interval_s=settings.worker_health_interval_s,
        swap_patience_s=settings.worker_swap_patience_s,
        drain_s=settings.worker_drain_s,
        adapts=settings.worker_unsupported_parameters == "adapt",
        tracer=tracer,
    )
    bus = NatsWorkerBus(nats, worker=name, ack_wait_s=settings.ack_wait_s, on_job=worker.on_job)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.drain)
    _open_probes(settings, metrics, worker)
    tune_garbage_collector()
    async with contextlib.AsyncExitStack() as stack:
        if tracer is not None:
            stack.push_async_callback(tracer.close)
        for part in (blobs, jobs):
            await part.start()
            stack.push_async_callback(part.close)
        await worker.run(bus)


def _open_probes(settings: WorkerSettings, metrics: WorkerMetrics, worker: Worker) -> None:
    host, port = settings.worker_observability_host, settings.worker_observability_port
    if not port:
        return
    try:
        serve_probes(host, port, metrics.registry, lambda: worker.state, lambda: worker.problems)
    except OSError as error:
        why = describe_listen_error(
            error,
            host,
            port,
            port_setting="WORKER_OBSERVABILITY_PORT (--observability-port)",
            host_setting="WORKER_OBSERVABILITY_HOST",
        )
        raise ConfigurationError(why) from error
