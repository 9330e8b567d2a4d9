"""Running the gateway: one process, or several that share the port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import structlog
import uvicorn
import uvloop

from backbone.bus.nats_blobs import NatsBlobs
from backbone.bus.nats_gateway import NatsGatewayBus
from backbone.bus.notices import NatsNotices
from backbone.bus.streams import BucketConfig, JobsStream
from backbone.egress import Egress
from backbone.logging import configure_logging
from backbone.memory import settle
from backbone.registry.etcd import EtcdRegistry
from backbone.settings import GatewaySettings
from backbone.store.redis import RedisStore
from backbone.store.redis_documents import RedisDocuments
from gateway.app import ENDPOINTS, make_app, make_observability_app
from gateway.auth import Auth
from gateway.bodies import Budget, Reader
from gateway.call import MAX_STARTS
from gateway.deps import Parts
from gateway.dispatch import Dispatcher
from gateway.door import Door
from gateway.inference import Bounds, Inference
from gateway.keys import KeyRing
from gateway.links import Links
from gateway.metrics import GatewayMetrics
from gateway.protocol import http_protocol
from gateway.readiness import ReadinessCheck
from gateway.remote_media import RemoteMedia
from schemas.errors import NexusError
from schemas.jobs import Limits

log = structlog.get_logger(__name__)

LAST_WORDS_S = 1.0
"""For open requests to be told that the gateway ends, after `GATEWAY_DRAIN_S`."""
INHERITED = "NEXUS_GATEWAY_SOCKET"
INDEX = "NEXUS_GATEWAY_INDEX"
SUPERVISOR = "NEXUS_GATEWAY_SUPERVISOR"


def run(settings: GatewaySettings) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit status: 1 when the gateway cannot start."""
    configure_logging(settings.log_format, settings.log_level)
    # What is wrong with a caller's form is told to the caller.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    try:
        if INHERITED in os.environ:
            listener = socket.socket(fileno=int(os.environ[INHERITED]))
            uvloop.run(_serve(settings, listener, int(os.environ[INDEX])))
            return 0
        listener = _bind(settings.gateway_host, settings.gateway_port)
        if settings.gateway_workers > 1:
            return _supervise(settings, listener)
        uvloop.run(_serve(settings, listener, 0))
    except (NexusError, OSError) as error:
        log.error("gateway cannot start", error=error.info.message if isinstance(error, NexusError) else str(error))
        return 1
    return 0


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another one with GATEWAY_PORT"
        ) from error
    listener.listen(2048)
    return listener


class _Server(uvicorn.Server):
    """Several of these share one loop, whose signals are handled in one place."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: object, head_timeout_s: float, drain_s: float) -> _Server:
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        loop="none",
        http=http_protocol(head_timeout_s),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # nothing reads the caller's address
        # Without it uvicorn waits for open streams for ever.
        timeout_graceful_shutdown=math.ceil(drain_s + LAST_WORDS_S),
        timeout_keep_alive=75,
        backlog=2048,
    )
    return _Server(config)


async def _serve(settings: GatewaySettings, listener: socket.socket, index: int) -> None:
    gateway = secrets.token_hex(6)
    structlog.contextvars.bind_contextvars(gateway=gateway)
    side = _bind(settings.observability_host, settings.observability_port + index if settings.observability_port else 0)
    stream = JobsStream(
        settings.max_queued_jobs, settings.max_queued_per_model, settings.max_queue_bytes, settings.stream_replicas
    )
    bus = NatsGatewayBus(settings.nats_url, gateway=gateway, ack_wait_s=settings.ack_wait_s, stream=stream)
    registry = EtcdRegistry(settings.etcd_url, settings.etcd_prefix)
    store = RedisStore(settings.redis_url)
    metrics = GatewayMetrics()
    limits = Limits(
        queue_s=settings.queue_timeout_s,
        first_token_s=settings.first_token_timeout_s,
        idle_s=settings.idle_timeout_s,
        total_s=settings.total_timeout_s,
        load_s=settings.load_timeout_s,
    )
    dispatcher = Dispatcher(
        bus,
        registry,
        metrics,
        limits,
        settings.ack_wait_s,
        media_timeout_s=settings.media_timeout_s,
        pull_timeout_s=settings.pull_timeout_s,
        keep_s=settings.result_url_ttl_s,
    )
    notices = NatsNotices(settings.nats_url, gateway)
    keys = KeyRing(RedisDocuments(store), notices)
    auth, links = _auth(settings, keys)
    blobs = NatsBlobs(
        settings.nats_url,
        f"{gateway}-blobs",
        create=BucketConfig(max_bytes=settings.max_blob_bytes, replicas=settings.stream_replicas),
    )
    reader = _reader(settings, blobs, limits)
    bounds = Bounds(settings.queue_comment_after_s, settings.log_prompts)
    inference = Inference(dispatcher, reader, blobs, links, auth, metrics, bounds)
    parts = Parts(
        dispatcher, inference, auth, ReadinessCheck(bus, registry, store), blobs, links, metrics.registry, keys
    )

    async with contextlib.AsyncExitStack() as stack:
        if INHERITED in os.environ:
            orphan = asyncio.create_task(_stop_when_orphaned(int(os.environ[SUPERVISOR])))
            stack.callback(orphan.cancel)
        stack.push_async_callback(bus.close)
        await bus.start()
        stack.push_async_callback(blobs.close)
        stack.push_async_callback(reader.media.close)
        await blobs.start()
        stack.push_async_callback(registry.close)
        await registry.start()
        stack.push_async_callback(store.close)
        await store.start()
        stack.push_async_callback(notices.close)
        await notices.start()
        stack.push_async_callback(keys.close)
        await keys.start()
        stack.push_async_callback(dispatcher.close)
        await dispatcher.start()
        timeout, drain_s = settings.body_timeout_s, settings.gateway_drain_s
        api = _server(Door(make_app(parts), inference, ENDPOINTS, settings.cors_origins), timeout, drain_s)
        probes = _server(Door(make_observability_app(parts), inference, [], settings.cors_origins), timeout, drain_s)
        loop = asyncio.get_running_loop()

        def stop() -> None:
            loop.call_later(drain_s, dispatcher.end_calls)
            for server in (api, probes):
                # A second signal does not wait for open streams.
                server.force_exit = server.should_exit
                server.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        settle()
        port = listener.getsockname()[1]
        log.info("gateway up", url=f"http://{settings.gateway_host}:{port}", observability_port=side.getsockname()[1])
        await asyncio.gather(api.serve(sockets=[listener]), probes.serve(sockets=[side]))


def _auth(settings: GatewaySettings, keys: KeyRing) -> tuple[Auth, Links]:
    token = settings.gateway_bearer_token.get_secret_value() if settings.gateway_bearer_token else ""
    if not token:
        log.warning("no bootstrap key: only keys that were created before work", setting="GATEWAY_BEARER_TOKEN")
    # Where gateways have no key in common, each can check only the URLs that it signed.
    signing = token or secrets.token_urlsafe(32)
    return Auth(token, keys), Links(signing, settings.public_url, settings.result_url_ttl_s)


def _reader(settings: GatewaySettings, blobs: NatsBlobs, limits: Limits) -> Reader:
    egress: Egress | None = None
    if settings.fetch_media:
        private = frozenset(host.strip() for host in settings.fetch_private_hosts.split(",") if host.strip())
        egress = Egress(max_bytes=settings.fetch_max_bytes, timeout_s=settings.fetch_timeout_s, private_hosts=private)
    return Reader(
        blobs,
        settings.max_body_bytes,
        settings.body_timeout_s,
        # As long as the job may live, with all the attempts it may take.
        MAX_STARTS * (limits.queue_s + limits.load_s + limits.total_s),
        Budget(settings.max_buffered_bytes),
        RemoteMedia(egress, settings.max_body_bytes),
    )


async def _stop_when_orphaned(parent: int) -> None:
    """A supervisor that is killed outright, even while we start, cannot stop its processes."""
    while os.getppid() == parent:
        await asyncio.sleep(0.5)
    log.warning("the supervisor is gone; stopping")
    os.kill(os.getpid(), signal.SIGTERM)


def _supervise(settings: GatewaySettings, listener: socket.socket) -> int:
    """Several processes accept from one socket. One that dies is started again."""
    os.set_inheritable(listener.fileno(), True)
    stopping = False

    def start(index: int) -> subprocess.Popen[bytes]:
        env = os.environ | {INHERITED: str(listener.fileno()), INDEX: str(index), SUPERVISOR: str(os.getpid())}
        return subprocess.Popen([sys.executable, "-m", "gateway"], env=env, pass_fds=[listener.fileno()])

    def stop(number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True
        for child in children.values():
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    children: dict[int, subprocess.Popen[bytes]] = {}
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    for index in range(settings.gateway_workers):
        children[index] = start(index)
    status = 0
    while children:
        for index, child in list(children.items()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(timeout=0.2)
                del children[index]
                if stopping:
                    status = max(status, abs(code))
                else:
                    log.error("gateway process died; starting another", index=index, code=code)
                    children[index] = start(index)
    return status
