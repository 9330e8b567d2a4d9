"""Run the gateway as one process, or as several that share the port: sockets, signals, graceful shutdown, supervision."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import resource
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import cast

import structlog
import uvicorn
import uvloop

from backbone.gc_tuning import tune_garbage_collector
from backbone.listen_errors import describe_listen_error
from backbone.logging import configure_logging
from backbone.secret_files import ConfigurationError
from backbone.setting_errors import read_settings
from backbone.settings import GatewaySettings
from backbone.startup_errors import report_startup_error
from gateway.composition_root import RunningGateway, run_gateway
from gateway.health import ShutdownState
from gateway.http.client_addresses import TrustedProxies
from gateway.http.connection import HttpProtocol, http_protocol
from gateway.http.connection_limits import ConnectionBounds, ConnectionLimiter
from gateway.http.response_writer import add_security_headers
from gateway.http.unread_budget import UnreadBudget
from gateway.supervisor import Supervisor
from schemas.errors import NexusError
from schemas.redaction import REDACTOR

log = structlog.get_logger(__name__)

CANNOT_START = "gateway.start_failed"
FINAL_ERRORS_S = 1.0
"""Time after `GATEWAY_DRAIN_S` in which open requests are answered that the gateway shuts down."""
MAX_UNSENT_BYTES = 128 * 1024
"""Bytes of an answer that the kernel buffers before it can send them."""
TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if sys.platform == "linux" else 0x201)
PROBE_BOUNDS = ConnectionBounds(most=128, most_per_address=128, max_stored=1024 * 1024)
RESERVED_FILES = 512
"""Open files of the process that are not callers' connections, or are connections that are being refused."""


def main() -> int:
    """Run a gateway that is configured by environment variables. Returns the exit status."""
    try:
        settings = read_settings(GatewaySettings)
    except ConfigurationError as error:
        return report_startup_error(CANNOT_START, error)
    return run(settings)


def run(settings: GatewaySettings) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit status: 2 for settings that cannot work, 1 for another failed start."""
    configure_logging(settings.log_format, settings.log_level, ring_bytes=settings.log_ring_bytes)
    REDACTOR.add(settings.nats_url, settings.etcd_url, settings.redis_url, socket.gethostname())
    # Errors in a caller's form are answered to the caller.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    try:
        listener = _bind(settings.gateway_host, settings.gateway_port, "GATEWAY")
    except (OSError, ConfigurationError) as error:
        return report_startup_error(CANNOT_START, error)
    if settings.gateway_workers == 1:
        return _run_process(settings, listener, 0)
    supervisor = os.getpid()
    serve = functools.partial(_run_process, settings, listener, supervisor=supervisor)
    return Supervisor(settings.gateway_workers, listener, serve).run()


def _run_process(settings: GatewaySettings, listener: socket.socket, index: int, *, supervisor: int = 0) -> int:
    """Serve the connections of a socket. `supervisor`: the process without which this one stops. Returns the exit status."""
    try:
        uvloop.run(_serve(settings, listener, index, supervisor))
    except (NexusError, OSError, ConfigurationError) as error:
        return report_startup_error(CANNOT_START, error)
    return 0


def _bind(host: str, port: int, setting: str) -> socket.socket:
    """Listen on an address. `setting`: prefix of the settings _HOST and _PORT. Raises ConfigurationError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        flag = "--port" if setting == "GATEWAY" else "--observability-port"
        why = describe_listen_error(
            error, host, port, port_setting=f"{setting}_PORT ({flag})", host_setting=f"{setting}_HOST"
        )
        raise ConfigurationError(why) from error
    _bound_kernel_buffers(listener)
    listener.listen(2048)
    return listener


def _bound_kernel_buffers(listener: socket.socket) -> None:
    """Bound the unsent bytes that the kernel buffers for a caller that does not read. Accepted connections inherit the bound."""
    with contextlib.suppress(AttributeError, OSError):
        listener.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, MAX_UNSENT_BYTES)


def _connections(settings: GatewaySettings, unread: UnreadBudget) -> ConnectionLimiter:
    """Raise the process's limit on open files to its hard limit, and keep the limit on connections below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    most = settings.max_connections
    if soft != resource.RLIM_INFINITY and most > soft - RESERVED_FILES:
        most = max(1, soft - RESERVED_FILES)
        log.warning(
            "connections.bound_lowered",
            max_connections=most,
            wanted=settings.max_connections,
            reason=f"the process may have {soft} files open; raise the limit (ulimit -n)",
        )
    bounds = ConnectionBounds(
        most=most,
        most_per_address=settings.max_connections_per_address,
        write_timeout_s=settings.write_timeout_s,
    )
    return ConnectionLimiter(bounds, TrustedProxies(settings.trusted_proxies), unread)


class _Server(uvicorn.Server):
    """A uvicorn server that shares its event loop and signal handlers with another one."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve the connections that are made but not accepted before the listeners close: closing would reset them."""
        spare = [listener.dup() for listener in sockets or ()]
        for server in self.servers:
            server.close()
        last = [connection for listener in spare for connection in _accept_all(listener)]
        loop = asyncio.get_running_loop()
        for connection in last:
            await loop.connect_accepted_socket(self._protocol, connection)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        make = cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class)
        return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)


def _accept_all(listener: socket.socket) -> list[socket.socket]:
    """Accept all connections that are pending now."""
    listener.setblocking(False)
    found = []
    with listener, contextlib.suppress(OSError):  # raised when none is pending
        while True:
            connection, _ = listener.accept()
            connection.setblocking(False)
            found.append(connection)
    return found


def _server(
    app: object,
    head_timeout_s: float,
    shutdown_state: ShutdownState,
    drain_s: float,
    connections: ConnectionLimiter | None = None,
) -> _Server:
    add_security_headers()
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        loop="none",
        http=http_protocol(
            head_timeout_s, shutdown_state, connections if connections is not None else ConnectionLimiter()
        ),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # `gateway.http.client_addresses` reads these headers
        # Without a timeout, uvicorn waits for open streams forever.
        timeout_graceful_shutdown=math.ceil(drain_s + FINAL_ERRORS_S),
        timeout_keep_alive=75,
        backlog=2048,
    )
    return _Server(config)


async def _serve(settings: GatewaySettings, listener: socket.socket, index: int, supervisor: int) -> None:
    gateway = secrets.token_hex(6)
    structlog.contextvars.bind_contextvars(gateway=gateway)
    observability_port = settings.observability_port + index if settings.observability_port else 0
    observability = _bind(settings.observability_host, observability_port, "OBSERVABILITY")
    async with contextlib.AsyncExitStack() as stack:
        if supervisor:
            orphan = asyncio.create_task(_stop_when_orphaned(supervisor))
            stack.callback(orphan.cancel)
        shutdown_state = ShutdownState()
        running = await stack.enter_async_context(run_gateway(settings, gateway, shutdown_state))
        timeout = settings.body_timeout_s
        connections, probe_connections = _connections(settings, running.unread), ConnectionLimiter(PROBE_BOUNDS)
        running.metrics.connections.limiter = connections
        running.keys.on_revoked = connections.end_calls_of
        for limiter in (connections, probe_connections):
            stack.callback(asyncio.create_task(limiter.watch()).cancel)
        api = _server(running.api, timeout, shutdown_state, settings.gateway_drain_s, connections)
        probes = _server(running.probes, timeout, shutdown_state, 0.0, probe_connections)
        shutdown = GracefulShutdown(
            api, running, shutdown_state, settings.gateway_lame_duck_s, settings.gateway_drain_s
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, shutdown.handle_signal)
        tune_garbage_collector()
        port = listener.getsockname()[1]
        log.info(
            "gateway.started",
            url=f"http://{settings.gateway_host}:{port}",
            observability_port=observability.getsockname()[1],
        )
        probing = asyncio.create_task(probes.serve(sockets=[observability]))
        try:
            await api.serve(sockets=[listener])
        finally:
            # Probes are answered until the API has stopped.
            probes.should_exit = True
            await probing


class GracefulShutdown:
    """Shuts a gateway down: `/readyz` says 503 -> (lame duck) -> stop listening -> (drain) -> end open requests -> exit.

    The gateway serves new requests until the load balancer has had the time to see that `/readyz` says 503. A second signal stops
    listening at once; a third one does not wait for open answers.
    """

    def __init__(
        self, api: _Server, running: RunningGateway, shutdown_state: ShutdownState, lame_duck_s: float, drain_s: float
    ) -> None:
        self._api = api
        self._running = running
        self._shutdown_state = shutdown_state
        self._lame_duck_s = lame_duck_s
        self._drain_s = drain_s

    def handle_signal(self) -> None:
        """Handle SIGTERM or SIGINT."""
        if self._api.should_exit:
            self._api.force_exit = True
        elif self._shutdown_state.begun or not self._lame_duck_s:
            self._drain()
        else:
            self._begin()

    def _begin(self) -> None:
        log.info("gateway.shutdown_started", lame_duck_s=self._lame_duck_s, drain_s=self._drain_s)
        self._shutdown_state.begin()
        for connection in list(self._api.server_state.connections):
            cast("HttpProtocol", connection).close_after_answer()
        asyncio.get_running_loop().call_later(self._lame_duck_s, self._drain)

    def _drain(self) -> None:
        if self._api.should_exit:
            return
        self._shutdown_state.begin()
        self._running.end_job_polls()
        asyncio.get_running_loop().call_later(self._drain_s, self._running.end_open_requests)
        self._api.should_exit = True


async def _stop_when_orphaned(parent: int) -> None:
    """Stop this process when its supervisor is killed, which then cannot stop it; also during the start."""
    while os.getppid() == parent:
        await asyncio.sleep(0.5)
    log.warning("gateway.supervisor_lost")
    os.kill(os.getpid(), signal.SIGTERM)
