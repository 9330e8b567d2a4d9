"""Calls of the JetStream API for tests, over a connection that the test has opened."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.requests import RequestInbox, call_api

_inboxes: WeakKeyDictionary[NatsConnection, RequestInbox] = WeakKeyDictionary()


async def request(connection: NatsConnection, operation: str, body: Any = None) -> dict[str, Any]:
    """Call the API. Raises JetStreamError, Unavailable."""
    return await call_api(await inbox_of(connection), operation, body)


async def inbox_of(connection: NatsConnection) -> RequestInbox:
    """Return the one inbox that tests use on this connection."""
    inbox = _inboxes.get(connection)
    if inbox is None:
        inbox = _inboxes[connection] = RequestInbox(connection)
        await inbox.start()
    return inbox
