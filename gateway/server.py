"""Running the gateway: one process, or several that share the port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import time
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
from gateway.http.security_headers import add_security_headers
from gateway.http.unread_budget import UnreadBudget
from schemas.errors import NexusError
from schemas.redaction import REDACTOR

log = structlog.get_logger(__name__)

CANNOT_START = "gateway.start_failed"
LAST_WORDS_S = 1.0
"""For open requests to be told that the gateway ends, after `GATEWAY_DRAIN_S`."""
MAX_UNSENT = 128 * 1024
"""Bytes of an answer that the kernel takes before it can send them."""
TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25 if sys.platform == "linux" else 0x201)
PROBE_BOUNDS = ConnectionBounds(most=128, most_per_address=128, max_stored=1024 * 1024)
OTHER_FILES = 512
"""Of the files that a process may have open, those that are no callers' connections; those being turned away among them."""
REST_S = 5.0
"""Before a process that ended by itself, in an error, is started again."""
INHERITED = "NEXUS_GATEWAY_SOCKET"
INDEX = "NEXUS_GATEWAY_INDEX"
SUPERVISOR = "NEXUS_GATEWAY_SUPERVISOR"


def main() -> int:
    """Run a gateway that environment variables configure. Returns the exit status."""
    try:
        settings = read_settings(GatewaySettings)
    except ConfigurationError as error:
        return report_startup_error(CANNOT_START, error)
    return run(settings)


def run(settings: GatewaySettings) -> int:
    """Run until SIGTERM or SIGINT. Returns the exit status: 2 for settings that cannot work, 1 for another failed start."""
    configure_logging(settings.log_format, settings.log_level)
    REDACTOR.add(settings.nats_url, settings.etcd_url, settings.redis_url, socket.gethostname())
    # What is wrong with a caller's form is told to the caller.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    try:
        if INHERITED in os.environ:
            listener = socket.socket(fileno=int(os.environ[INHERITED]))
            uvloop.run(_serve(settings, listener, int(os.environ[INDEX])))
            return 0
        listener = _bind(settings.gateway_host, settings.gateway_port, "GATEWAY")
        if settings.gateway_workers > 1:
            return _supervise(settings, listener)
        uvloop.run(_serve(settings, listener, 0))
    except (NexusError, OSError, ConfigurationError) as error:
        return report_startup_error(CANNOT_START, error)
    return 0


def _bind(host: str, port: int, setting: str) -> socket.socket:
    """Listen there. `setting`: what comes before _HOST and _PORT. Raises ConfigurationError."""
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
    """Let the kernel take no more for a caller who does not read than it has on its way; connections inherit it."""
    with contextlib.suppress(AttributeError, OSError):
        listener.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, MAX_UNSENT)


def _connections(settings: GatewaySettings, unread: UnreadBudget) -> ConnectionLimiter:
    """Raise the process's limit on open files as far as it goes, and keep the bound on connections below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    most = settings.max_connections
    if soft != resource.RLIM_INFINITY and most > soft - OTHER_FILES:
        most = max(1, soft - OTHER_FILES)
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
    """Several of these share one loop, whose signals are handled in one place."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Whoever has connected is heard: a listener that closes resets those whom nobody has accepted yet."""
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
    """Those who have connected, and nobody after them."""
    listener.setblocking(False)
    found = []
    with listener, contextlib.suppress(OSError):  # nobody is left
        while True:
            connection, _ = listener.accept()
            connection.setblocking(False)
            found.append(connection)
    return found


def _server(
    app: object,
    head_timeout_s: float,
    leaving: ShutdownState,
    drain_s: float,
    connections: ConnectionLimiter | None = None,
) -> _Server:
    add_security_headers()
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        loop="none",
        http=http_protocol(head_timeout_s, leaving, connections if connections is not None else ConnectionLimiter()),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,  # `gateway.http.client_addresses` reads them
        # Without it uvicorn waits for open streams for ever.
        timeout_graceful_shutdown=math.ceil(drain_s + LAST_WORDS_S),
        timeout_keep_alive=75,
        backlog=2048,
    )
    return _Server(config)


async def _serve(settings: GatewaySettings, listener: socket.socket, index: int) -> None:
    gateway = secrets.token_hex(6)
    structlog.contextvars.bind_contextvars(gateway=gateway)
    side_port = settings.observability_port + index if settings.observability_port else 0
    side = _bind(settings.observability_host, side_port, "OBSERVABILITY")
    async with contextlib.AsyncExitStack() as stack:
        if INHERITED in os.environ:
            orphan = asyncio.create_task(_stop_when_orphaned(int(os.environ[SUPERVISOR])))
            stack.callback(orphan.cancel)
        leaving = ShutdownState()
        gate = await stack.enter_async_context(run_gateway(settings, gateway, leaving))
        timeout = settings.body_timeout_s
        connections, probe_connections = _connections(settings, gate.unread), ConnectionLimiter(PROBE_BOUNDS)
        gate.metrics.edge.connections = connections
        for some in (connections, probe_connections):
            stack.callback(asyncio.create_task(some.watch()).cancel)
        api = _server(gate.api, timeout, leaving, settings.gateway_drain_s, connections)
        probes = _server(gate.probes, timeout, leaving, 0.0, probe_connections)
        departure = GracefulShutdown(api, gate, leaving, settings.gateway_lame_duck_s, settings.gateway_drain_s)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, departure.signalled)
        tune_garbage_collector()
        port = listener.getsockname()[1]
        log.info("gateway.started", url=f"http://{settings.gateway_host}:{port}", observability_port=side.getsockname()[1])
        probing = asyncio.create_task(probes.serve(sockets=[side]))
        try:
            await api.serve(sockets=[listener])
        finally:
            # To the last, whoever asks how this gateway is hears it.
            probes.should_exit = True
            await probing


class GracefulShutdown:
    """A gateway's way out: say so -> (lame duck) -> stop listening -> (drain) -> tell who still waits -> end.

    Nobody is turned away before the load balancer had the time to see that `/readyz` says 503. A second signal stops
    listening at once; a third does not wait for open answers.
    """

    def __init__(
        self, api: _Server, gate: RunningGateway, leaving: ShutdownState, lame_duck_s: float, drain_s: float
    ) -> None:
        self._api = api
        self._gate = gate
        self._shutdown_state = leaving
        self._lame_duck_s = lame_duck_s
        self._drain_s = drain_s

    def signalled(self) -> None:
        """SIGTERM or SIGINT."""
        if self._api.should_exit:
            self._api.force_exit = True
        elif self._shutdown_state.begun or not self._lame_duck_s:
            self._drain()
        else:
            self._leave()

    def _leave(self) -> None:
        log.info("gateway.shutdown_started", lame_duck_s=self._lame_duck_s, drain_s=self._drain_s)
        self._shutdown_state.begin()
        for connection in list(self._api.server_state.connections):
            cast("HttpProtocol", connection).leave()
        asyncio.get_running_loop().call_later(self._lame_duck_s, self._drain)

    def _drain(self) -> None:
        if self._api.should_exit:
            return
        self._shutdown_state.begin()
        self._gate.end_job_polls()
        asyncio.get_running_loop().call_later(self._drain_s, self._gate.end_open_requests)
        self._api.should_exit = True


async def _stop_when_orphaned(parent: int) -> None:
    """A supervisor that is killed outright, even while we start, cannot stop its processes."""
    while os.getppid() == parent:
        await asyncio.sleep(0.5)
    log.warning("gateway.supervisor_lost")
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
    resting: dict[int, float] = {}
    """Those that could not even start, a wrong password perhaps: until when they wait before they try again."""
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    for index in range(settings.gateway_workers):
        children[index] = start(index)
    status = 0
    while children or (resting and not stopping):
        if stopping:
            # Whoever connects when the children have closed theirs is refused, and does not wait for nobody.
            listener.close()
        for index in [one for one, until in resting.items() if time.monotonic() > until and not stopping]:
            del resting[index]
            children[index] = start(index)
        if not children:
            time.sleep(0.2)
        for index, child in list(children.items()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(timeout=0.2)
                del children[index]
                if stopping:
                    status = max(status, abs(code))
                elif code > 0:
                    log.error("gateway.process_failed", index=index, code=code)
                    resting[index] = time.monotonic() + REST_S
                else:
                    log.error("gateway.process_died", index=index, code=code)
                    children[index] = start(index)
    return status
