"""Limit the connections of one listener, and close those whose callers no longer read their answers."""

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
from schemas.errors import AuthenticationFailed, NexusError, Unavailable

log = structlog.get_logger(__name__)

SWEEP_INTERVAL_S = 1.0
MAX_LINGERING = 256
"""Connections beyond the limits that receive an error at any time; others are only closed."""
REPORT_INTERVAL_S = 10.0
"""Between two log lines about refused connections."""
TCP_INFO_BYTES_ACKED = 120
"""Offset in Linux's `struct tcp_info` of what the caller's side has acknowledged."""


@dataclass(frozen=True, slots=True)
class ConnectionBounds:
    """Limits on the connections of one listener."""

    most: int = 8192
    most_per_address: int = 2048
    write_timeout_s: float = 60.0
    max_stored: int = 32 * 1024 * 1024
    """Bytes of incomplete heads and pipelined requests, over all connections."""


class TooManyConnections(Unavailable):
    """There are too many connections; close some, or try again shortly."""

    code = "too_many_connections"


class LimitedConnection(Protocol):
    """The part of `HttpProtocol` that limits apply to."""

    transport: asyncio.Transport

    def end_call_of(self, key_id: str, error: NexusError) -> None:
        """End the call that is open with this key: with the error if its answer has not begun, by a reset otherwise."""


class ConnectionLimiter:
    """Counts connections, and closes those whose callers do not read."""

    def __init__(
        self,
        bounds: ConnectionBounds | None = None,
        trusted: TrustedProxies | None = None,
        unread: UnreadBudget | None = None,
    ) -> None:
        self.bounds = bounds or ConnectionBounds()
        self.trusted = trusted or TrustedProxies()
        self.unread = unread or UnreadBudget(128 * 1024 * 1024)
        self.pipeline = PipelineScheduler()
        self.stored = 0
        """Bytes of incomplete heads and pipelined requests."""
        self.refused = 0
        """Connections that were refused since the start."""
        self.stalled = 0
        """Connections that were closed since the start because their callers did not read."""
        self._open: set[LimitedConnection] = set()
        self._lingering: set[LimitedConnection] = set()
        self._by_address: Counter[str] = Counter()
        self._progress: dict[LimitedConnection, tuple[object, float]] = {}
        """Position up to which the caller had read, and since when, of connections with unsent bytes."""
        self._reported_at = float("-inf")

    def __len__(self) -> int:
        return len(self._open)

    # Limits

    def admit(self, connection: LimitedConnection, address: str) -> NexusError | None:
        """Count a connection, or return the error that refuses it. `remove` must be called in either case."""
        bounds = self.bounds
        if len(self._open) >= bounds.most:
            error = TooManyConnections(
                f"This gateway has {bounds.most} open connections, its limit (MAX_CONNECTIONS). Retry shortly."
            )
        elif self._by_address[address] >= bounds.most_per_address and address not in self.trusted:
            error = TooManyConnections(
                f"Your address has {bounds.most_per_address} open connections, its limit (MAX_CONNECTIONS_PER_ADDRESS). "
                "Close some, or reuse them."
            )
        else:
            self._open.add(connection)
            self._by_address[address] += 1
            return None
        self.refused += 1
        self._lingering.add(connection)
        self._report(address)
        return error

    def remove(self, connection: LimitedConnection, address: str) -> None:
        """Forget a closed connection."""
        self._progress.pop(connection, None)
        self._lingering.discard(connection)
        if connection in self._open:
            self._open.discard(connection)
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    @property
    def may_linger(self) -> bool:
        """Whether one more refused connection may receive an error."""
        return len(self._lingering) <= MAX_LINGERING

    def end_calls_of(self, key_id: str) -> None:
        """End the open calls of a revoked key: streams, polls and uploads."""
        error = AuthenticationFailed("Access with this API key or session ended while the request was open.")
        for connection in list(self._open):
            connection.end_call_of(key_id, error)

    def _report(self, address: str) -> None:
        now = monotonic()
        if now - self._reported_at >= REPORT_INTERVAL_S:
            self._reported_at = now
            log.warning("connections.refused", address=address, refused=self.refused, open=len(self._open))

    # Callers that do not read

    async def watch(self) -> None:
        """Sweep every `SWEEP_INTERVAL_S`. Never returns."""
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            try:
                self.sweep(monotonic())
            except Exception:
                log.exception("connections.sweep_failed")

    def sweep(self, now: float) -> None:
        """Close connections whose callers have read nothing for `write_timeout_s`. `now`: by `monotonic`."""
        for connection in list(self._open):
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
    """Reset a connection: neither the process nor the kernel keeps its unread bytes."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def _acknowledged(transport: asyncio.Transport) -> int | None:
    """Return how many bytes the caller's kernel has acknowledged; None if the system does not report it."""
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
