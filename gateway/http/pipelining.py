"""Turns for requests that came ahead of theirs (pipelining), few at a time.

Each request that is pipelined takes one round of the event loop. Without a bound, connections that pipeline thousands of requests
make each round longer, and new connections, of which one is accepted in a round, wait behind all of them.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

AT_ONCE = 16
"""Connections that go on in one round."""


class PipelinedConnection(Protocol):
    """A connection with a request that came ahead."""

    def read_on(self) -> None:
        """Read it."""


class PipelineScheduler:
    """Connections that wait to go on, in order."""

    def __init__(self) -> None:
        self._waiting: dict[PipelinedConnection, None] = {}
        self._called = False

    def wait(self, connection: PipelinedConnection) -> None:
        """Let the connection go on when it is its turn; one that waits already keeps its place."""
        self._waiting[connection] = None
        self._call()

    def leave(self, connection: PipelinedConnection) -> None:
        """Forget a connection."""
        self._waiting.pop(connection, None)

    def _call(self) -> None:
        if not self._called and self._waiting:
            self._called = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._called = False
        try:
            for _ in range(min(AT_ONCE, len(self._waiting))):
                connection = next(iter(self._waiting), None)
                if connection is None:
                    return
                del self._waiting[connection]
                connection.read_on()
        finally:
            self._call()
