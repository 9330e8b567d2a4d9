"""Broadcasts between gateways, in memory and on NATS."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from backbone.bus.broadcast import Broadcast
from backbone.bus.nats.broadcast import NatsBroadcast
from backbone.testing.broadcast import MemoryBroadcast
from tests.conftest import Eventually
from tests.servers import Server


@pytest.fixture(params=["memory", "nats"])
def url(request: pytest.FixtureRequest) -> str | None:
    """Of the server; None: in memory."""
    return str(request.getfixturevalue("nats_url")) if request.param == "nats" else None


@pytest.fixture
async def pair(url: str | None) -> AsyncIterator[tuple[Broadcast, Broadcast]]:
    """The notices of two gateways."""
    if url is None:
        shared = MemoryBroadcast()
        yield shared, shared
        return
    one, other = NatsBroadcast(url, "one"), NatsBroadcast(url, "other")
    await one.start()
    await other.start()
    yield one, other
    await one.close()
    await other.close()


async def test_everybody_hears(pair: tuple[Broadcast, Broadcast], eventually: Eventually) -> None:
    """The sender receives its own notification; other topics are not received."""
    one, other = pair
    heard: list[str] = []
    await one.subscribe("apples", lambda: heard.append("one"))
    await other.subscribe("apples", lambda: heard.append("other"))
    await other.subscribe("pears", lambda: heard.append("pears"))
    one.publish("apples")
    await eventually(lambda: sorted(heard) == ["one", "other"])
    heard.clear()
    one.publish("plums")
    one.publish("pears")
    await eventually(lambda: heard == ["pears"])


async def test_without_nats_telling_does_not_fail(own_nats: Server, eventually: Eventually) -> None:
    """After an outage every subscriber is called: a notification may have been missed."""
    notices = NatsBroadcast(own_nats.url, "one")
    await notices.start()
    heard: list[str] = []
    await notices.subscribe("apples", lambda: heard.append("apples"))
    await own_nats.stop()
    notices.publish("apples")
    notices.publish("pears")
    await own_nats.start()
    await eventually(lambda: heard)
    heard.clear()
    notices.publish("apples")
    await eventually(lambda: heard)
    await notices.close()
