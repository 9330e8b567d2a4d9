"""All connections of one listener: how many there may be, and which of them no longer read their answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

import structlog

from gateway.http.client_addresses import TrustedProxies
from gateway.http.pipelining import PipelineScheduler
from gateway.http.unread_budget import UnreadBudget
from schemas.errors import NexusError, Unavailable

log = structlog.get_logger(__name__)

SWEEP_S = 1.0
MAX_LINGERING = 256
"""Connections beyond the bounds that are told why at any time; others are only closed."""
REPORT_S = 10.0
"""Between two log lines about connections beyond the bounds."""
TCP_INFO_BYTES_ACKED = 120
"""Offset in Linux's `struct tcp_info` of what the caller's side has acknowledged."""


@dataclass(frozen=True, slots=True)
class ConnectionBounds:
    """What connections may take, in one process."""

    most: int = 8192
    most_per_address: int = 2048
    write_timeout_s: float = 60.0
    max_stored: int = 32 * 1024 * 1024
    """Bytes of incomplete heads and of pipelined requests, over all connections."""


class TooManyConnections(Unavailable):
    """There are too many connections; close some, or try again shortly."""

    code = "too_many_connections"


class LimitedConnection(Protocol):
    """What is needed of an `HttpProtocol`."""

    transport: asyncio.Transport


class ConnectionLimiter:
    """Count connections, and close those whose callers do not read."""

    def __init__(
        self,
        bounds: ConnectionBounds | None = None,
        trusted: TrustedProxies | None = None,
        unread: UnreadBudget | None = None,
    ) -> None:
        self.bounds = bounds or ConnectionBounds()
        self.trusted = trusted or TrustedProxies()
        self.unread = unread or UnreadBudget(128 * 1024 * 1024)
        self.turns = PipelineScheduler()
        self.stored = 0
        """Bytes of incomplete heads and of pipelined requests."""
        self.refused = 0
        """Connections beyond the bounds, since the start."""
        self.stalled = 0
        """Connections closed because their callers did not read, since the start."""
        self._here: set[LimitedConnection] = set()
        self._lingering: set[LimitedConnection] = set()
        self._by_address: Counter[str] = Counter()
        self._progress: dict[LimitedConnection, tuple[object, float]] = {}
        """Of those that have something to write: how far they had come, and when they came there."""
        self._reported_at = float("-inf")

    def __len__(self) -> int:
        return len(self._here)

    # The bounds

    def enter(self, connection: LimitedConnection, address: str) -> NexusError | None:
        """Count a connection; or return why it may not stay. `leave` is called in either case."""
        bounds = self.bounds
        if len(self._here) >= bounds.most:
            error = TooManyConnections(
                f"this gateway has {bounds.most} connections open, as many as it may have (MAX_CONNECTIONS); try again"
            )
        elif self._by_address[address] >= bounds.most_per_address and address not in self.trusted:
            error = TooManyConnections(
                f"your address has {bounds.most_per_address} connections open, as many as it may have "
                "(MAX_CONNECTIONS_PER_ADDRESS); close some, or use them again"
            )
        else:
            self._here.add(connection)
            self._by_address[address] += 1
            return None
        self.refused += 1
        self._lingering.add(connection)
        self._report(address)
        return error

    def leave(self, connection: LimitedConnection, address: str) -> None:
        """A connection is closed."""
        self._progress.pop(connection, None)
        self._lingering.discard(connection)
        if connection in self._here:
            self._here.discard(connection)
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    @property
    def may_linger(self) -> bool:
        """Whether one more connection beyond the bounds can be told why."""
        return len(self._lingering) <= MAX_LINGERING

    def _report(self, address: str) -> None:
        now = monotonic()
        if now - self._reported_at >= REPORT_S:
            self._reported_at = now
            log.warning("connections.refused", address=address, refused=self.refused, open=len(self._here))

    # Callers who do not read

    async def watch(self) -> None:
        """Close connections whose callers read nothing of what waits for them. Never returns."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                self.sweep(monotonic())
            except Exception:
                log.exception("connections.sweep_failed")

    def sweep(self, now: float) -> None:
        """Look at each connection once."""
        for connection in list(self._here):
            size = connection.transport.get_write_buffer_size()
            if not size:
                self._progress.pop(connection, None)
                continue
            reached = _acknowledged(connection.transport)
            reached = size if reached is None else reached
            before = self._progress.get(connection)
            if before is None or before[0] != reached:
                self._progress[connection] = (reached, now)
            elif now - before[1] >= self.bounds.write_timeout_s:
                self.stalled += 1
                log.info("connection.stalled", unread=size, seconds=round(now - before[1], 1))
                reset(connection.transport)


def reset(transport: asyncio.Transport) -> None:
    """Close a connection now: neither we nor the kernel keep what was not read."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _acknowledged(transport: asyncio.Transport) -> int | None:
    """Return how many bytes the caller's side has taken, ever; None where the system does not say."""
    if not hasattr(socket, "TCP_INFO"):
        return None
    peer = transport.get_extra_info("socket")
    try:
        info = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES_ACKED + 8)
    except (AttributeError, OSError, ValueError):
        return None
    if len(info) < TCP_INFO_BYTES_ACKED + 8:
        return None
    return int(struct.unpack_from("<Q", info, TCP_INFO_BYTES_ACKED)[0])
