"""TCP ports of this machine: choose free ones, and explain why one cannot be used."""

from __future__ import annotations

import errno
import random
import socket
from dataclasses import dataclass

from backbone.port_holders import find_port_holder
from cli.errors import ConsoleError

STABLE_PORTS = range(28_000, 32_768)
"""Below the ports that Linux and macOS use for outgoing connections."""


@dataclass(frozen=True, slots=True)
class RequestedPort:
    """A port that the user chose by `flag` or `variable`, and the `count - 1` ports above it."""

    flag: str
    host: str
    port: int
    count: int = 1
    variable: str = ""

    @property
    def source(self) -> str:
        """The flag and the variable that choose the port."""
        return f"{self.flag} or {self.variable}" if self.variable else self.flag

    @property
    def ports(self) -> range:
        """All ports of the request."""
        return range(self.port, self.port + self.count)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port of `host` that is free now. Raises ConsoleError for an unknown host."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def stable_port() -> int:
    """Return a free port of 127.0.0.1 to reuse at each start: one that the system does not assign by itself."""
    for _ in range(100):
        port = random.choice(STABLE_PORTS)
        if is_free(port):
            return port
    return free_port()


def is_free(port: int) -> bool:
    """Return whether `port` of 127.0.0.1 can be listened on now."""
    try:
        _listen("127.0.0.1", port)
    except OSError:
        return False
    return True


def check_ports(*requests: RequestedPort) -> None:
    """Raise ConsoleError, naming the port and its flag, unless all ports can be listened on."""
    taken: dict[int, str] = {}
    for request in requests:
        for port in request.ports:
            if port in taken:
                raise ConsoleError(f"{request.flag} and {taken[port]} both name port {port}. Change one of them.")
            taken[port] = request.flag
            check_port(request.host, port, request.source)


def check_port(host: str, port: int, flag: str) -> None:
    """Raise ConsoleError unless `port` can be listened on."""
    if not 0 < port <= 65535:
        raise ConsoleError(f"Port {port} does not exist. Choose one between 1 and 65535 with {flag}.")
    try:
        _listen(host, port)
    except OSError as error:
        raise ConsoleError(_explain(error, host, port, flag)) from error


def _listen(host: str, port: int) -> None:
    """Listen on `port` for a moment. Raises OSError if that is not possible."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen(1)


def _explain(error: OSError, host: str, port: int, flag: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use by {find_port_holder(port)}. Choose another port with {flag}."
    if error.errno == errno.EACCES:
        return f"port {port} is reserved for the administrator. Choose one above 1023 with {flag}."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"this machine has no address {host}. Choose another one with --host."
    return f"cannot listen on {host} port {port} ({error.strerror or error}). See {flag} and --host."


def _family(host: str) -> socket.AddressFamily:
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise ConsoleError(f"Host {host!r} does not exist ({error.strerror or error}). See --host.") from error
