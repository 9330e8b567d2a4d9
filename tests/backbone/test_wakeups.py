"""What a worker hears of its queues, on a real nats-server."""

from __future__ import annotations

import secrets
from typing import Any

from backbone.bus.bus import Queue
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.wakeups import WakeupSubscriptions
from backbone.bus.subjects import WAKEUPS
from schemas.jobs import Capability, Lane
from tests.conftest import Eventually

QUEUE = Queue(Capability.CHAT, Lane.DEFAULT, secrets.token_hex(4))


async def test_a_queue_that_is_hushed_after_it_was_dropped_is_heard_when_it_is_served_again(
    own_nats: Any, eventually: Eventually
) -> None:
    """A model that goes just when its queue turns hot, and comes back, rings as every other one."""
    connection, heard = NatsConnection(own_nats.url, "bells"), list[Queue]()
    await connection.connect()
    wakeups = WakeupSubscriptions(connection)
    await wakeups.serve([QUEUE], heard.append, None)
    await wakeups.serve([], heard.append, None)
    await wakeups.set_muted(QUEUE, muted=True)
    await wakeups.serve([QUEUE], heard.append, None)
    connection.publish(f"{WAKEUPS}.chat.default.{QUEUE.model}".encode(), b"")
    await eventually(lambda: heard == [QUEUE])
    await connection.close()
