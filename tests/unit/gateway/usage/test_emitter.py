"""The way of usage events to NATS: no request waits, and nothing that was written down is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from backbone.bus.job_log import WorkItem, WorkQueueFull
from gateway.usage import emitter as module
from gateway.usage.emitter import UsageEmitter
from gateway.usage.events import decode_events
from schemas.errors import Unavailable
from schemas.usage import UsageEvent
from tests.unit.gateway.usage.sample import event, values
from tests.unit.gateway.usage.test_journal import killed_after


class Queue:
    """A work queue that can be away or full."""

    def __init__(self) -> None:
        self.items: dict[str, bytes] = {}
        self.error: Exception | None = None
        self.tried = asyncio.Event()
        self.changed = asyncio.Event()

    async def put(self, item_id: str, data: bytes) -> None:
        self.tried.set()
        if self.error is not None:
            raise self.error
        self.items.setdefault(item_id, data)
        self.changed.set()

    def consume(self, *, max_unacked: int, ack_wait_s: float) -> AsyncGenerator[WorkItem, None]:
        raise NotImplementedError

    async def oldest(self) -> int | None:
        raise NotImplementedError

    def events(self) -> list[UsageEvent | ValueError]:
        return [one for data in self.items.values() for one in decode_events(data)]

    async def until(self, count: int) -> None:
        while len(self.events()) < count:
            self.changed.clear()
            await self.changed.wait()


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest_asyncio.fixture
async def emitter(queue: Queue, tmp_path: Path) -> AsyncIterator[UsageEmitter]:
    made = UsageEmitter(queue, tmp_path, lambda count: pytest.fail(f"{count} events were dropped"))
    await made.start()
    yield made
    await made.close()


async def test_events_travel_together(emitter: UsageEmitter, queue: Queue) -> None:
    """What is emitted within a moment is one message."""
    for number in range(50):
        emitter.emit(values(number))
    await queue.until(50)
    assert queue.events() == [event(number) for number in range(50)]
    assert len(queue.items) == 1


async def test_a_durable_job_waits_until_nats_has_its_event(emitter: UsageEmitter, queue: Queue) -> None:
    """`store` returns with the event stored, and raises while NATS is away; the event is not lost, nor stored twice by then."""
    await emitter.store(values(1))
    assert queue.events() == [event(1)]
    queue.error = Unavailable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CONFIRMATION_TIMEOUT_S", 0.05)
        with pytest.raises(Unavailable):
            await emitter.store(values(2))
    queue.error = None
    await queue.until(2)
    assert queue.events() == [event(1), event(2)]


async def test_a_full_stream_holds_no_job_up(emitter: UsageEmitter, queue: Queue) -> None:
    """While the stream accepts nothing, the journal holds the events, and `store` returns."""
    queue.error = WorkQueueFull()
    await emitter.store(values(1))
    assert queue.events() == []
    queue.error = None
    await queue.until(1)


async def test_more_than_a_segment(emitter: UsageEmitter, queue: Queue) -> None:
    """A burst while NATS is away fills several segments, and all of them arrive."""
    queue.error = Unavailable()
    for number in range(4000):
        emitter.emit(values(number))
    await queue.tried.wait()
    queue.error = None
    await queue.until(4000)
    assert queue.events() == [event(number) for number in range(4000)]


async def test_a_full_journal_drops_and_counts(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests go on when nothing more can be written down; what is missing is counted."""
    monkeypatch.setattr("gateway.usage.journal.MAX_SEGMENTS", 2)
    queue.error = Unavailable()
    dropped: list[int] = []
    emitter = UsageEmitter(queue, None, dropped.append)
    for number in range(4000):
        emitter.emit(values(number))
    assert 0 < len(dropped) < 4000
    emitter.emit(("\ud800",))  # text that is no Unicode
    queue.error = None
    await emitter.close()
    assert len(queue.events()) + len(dropped) == 4001


async def test_events_of_a_killed_gateway_are_adopted(queue: Queue, tmp_path: Path) -> None:
    """The next gateway with the folder stores what the killed one had written down, and removes its file."""
    killed_after(tmp_path, 7)
    emitter = UsageEmitter(queue, tmp_path, lambda _: None)
    await emitter.start()
    await queue.until(1)
    assert len(next(iter(queue.items.values())).splitlines()) == 8
    await emitter.close()
    assert list(tmp_path.iterdir()) == []


async def test_the_end_stores_what_is_there(queue: Queue, tmp_path: Path) -> None:
    """An orderly stop stores the last events; where NATS is away they stay in the folder for the next gateway."""
    emitter = UsageEmitter(queue, tmp_path, lambda _: None)
    await emitter.start()
    emitter.emit(values(1))
    await emitter.close()
    assert queue.events() == [event(1)]

    queue.error = Unavailable()
    emitter = UsageEmitter(queue, tmp_path, lambda _: None)
    await emitter.start()
    emitter.emit(values(2))
    await emitter.close()
    queue.error = None
    emitter = UsageEmitter(queue, tmp_path, lambda _: None)
    await emitter.start()
    await queue.until(2)
    await emitter.close()
    assert queue.events() == [event(1), event(2)]
