"""Schedule pipelined requests, a few per iteration of the event loop.

Each pipelined request takes one iteration. Without a bound, connections that pipeline thousands of requests lengthen every iteration,
and new connections, of which one is accepted per iteration, wait behind all of them.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

MAX_PER_ITERATION = 16
"""Connections that read a pipelined request in one iteration of the event loop."""


class PipelinedConnection(Protocol):
    """A connection with a pipelined request."""

    def read_next_request(self) -> None:
        """Read the next pipelined request."""


class PipelineScheduler:
    """Lets connections read their pipelined requests in order, a bounded number at a time."""

    def __init__(self) -> None:
        self._waiting: dict[PipelinedConnection, None] = {}
        self._scheduled = False

    def enqueue(self, connection: PipelinedConnection) -> None:
        """Queue a connection; one that is queued already keeps its place."""
        self._waiting[connection] = None
        self._schedule()

    def remove(self, connection: PipelinedConnection) -> None:
        """Forget a connection."""
        self._waiting.pop(connection, None)

    def _schedule(self) -> None:
        if not self._scheduled and self._waiting:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._read_pipelined)

    def _read_pipelined(self) -> None:
        self._scheduled = False
        try:
            for _ in range(min(MAX_PER_ITERATION, len(self._waiting))):
                connection = next(iter(self._waiting), None)
                if connection is None:
                    return
                del self._waiting[connection]
                connection.read_next_request()
        finally:
            self._schedule()
