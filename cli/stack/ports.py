"""TCP ports of this machine: which are free, and a clear word about one that is not."""

from __future__ import annotations

import errno
import random
import socket
from dataclasses import dataclass

from backbone.port_holders import find_port_holder
from cli.errors import ConsoleError

STABLE_PORTS = range(28_000, 32_768)
"""Below what Linux and macOS take for outgoing connections."""


@dataclass(frozen=True, slots=True)
class RequestedPort:
    """A port that somebody asked for by `flag`, or by the `variable`, and `count - 1` more right above it."""

    flag: str
    host: str
    port: int
    count: int = 1
    variable: str = ""

    @property
    def ways(self) -> str:
        """How the user chooses another port."""
        return f"{self.flag} or {self.variable}" if self.variable else self.flag

    @property
    def ports(self) -> range:
        """All of them."""
        return range(self.port, self.port + self.count)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on right now."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def stable_port() -> int:
    """Return a free port of 127.0.0.1 to be used at each start: one that the system gives to nobody by itself."""
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


def check_ports(*wishes: RequestedPort) -> None:
    """Raise ConsoleError, naming the port and the flag to change, unless all of them can be listened on."""
    taken: dict[int, str] = {}
    for wish in wishes:
        for port in wish.ports:
            if port in taken:
                raise ConsoleError(f"{wish.flag} and {taken[port]} both ask for port {port}; change one of them")
            taken[port] = wish.flag
            check_port(wish.host, port, wish.ways)


def check_port(host: str, port: int, flag: str) -> None:
    """Raise ConsoleError unless `port` can be listened on."""
    if not 0 < port <= 65535:
        raise ConsoleError(f"there is no port {port}; choose one between 1 and 65535 with {flag}")
    try:
        _listen(host, port)
    except OSError as error:
        raise ConsoleError(_why(error, host, port, flag)) from error


def _listen(host: str, port: int) -> None:
    """Raise OSError unless `port` can be listened on."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen(1)


def _why(error: OSError, host: str, port: int, flag: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use by {find_port_holder(port)}; choose another one with {flag}"
    if error.errno == errno.EACCES:
        return f"port {port} is reserved for the administrator; choose one above 1023 with {flag}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"this machine has no address {host}; choose another one with --host"
    return f"cannot listen on {host} port {port} ({error.strerror or error}); see {flag} and --host"


def _family(host: str) -> socket.AddressFamily:
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise ConsoleError(f"there is no host {host!r} ({error.strerror or error}); see --host") from error
