"""No slot is idle while a job waits: random slots, queues and arrivals, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from backbone.bus.bus import JobDelivery, Queue
from backbone.testing.bus import MemoryBroker, MemoryWorkerBus
from schemas.jobs import LANES, Capability, Lane
from tests.virtual_time import run
from workers.demand import LINGER_S
from workers.pull_backoff import DEFERRAL_S, MIN_PROBABILITY
from workers.puller import Puller

RTT_S = 0.001
SAMPLE_S = 0.02
WAKE_UP_S = DEFERRAL_S / MIN_PROBABILITY + 2 * SAMPLE_S
WATCHED_S = 15.0
"""After the last arrival: by then all is as it stays."""
LIMIT_S = LINGER_S + WAKE_UP_S
"""A wake-up, and one poll."""


class SlowBus(MemoryWorkerBus):
    """A bus that delays every message, in both directions."""

    def wake(self, queue: Queue) -> None:
        asyncio.get_running_loop().call_later(RTT_S / 2, super().wake, queue)

    def pull(self, queue: Queue, batch: int, wait_s: float, on_end: Callable[[Queue, int], None]) -> None:
        asyncio.get_running_loop().call_later(RTT_S, super().pull, queue, batch, wait_s, on_end)


@dataclass(frozen=True)
class Arrival:
    """`count` jobs at once, `gap_s` after the last arrival."""

    gap_s: float
    queue: int
    count: int
    work_s: float


@dataclass
class Desk:
    """A worker whose jobs take a fixed time, with a check of idle slots."""

    slots: int
    work: dict[str, float]
    busy: int = 0
    most: int = 0
    done: int = 0
    refused: int = 0
    puller: Puller = field(init=False)

    def on_job(self, job: JobDelivery) -> None:
        if not self.puller.accept(job):
            self.refused += 1
            job.nak()
            return
        self.busy += 1
        self.most = max(self.most, self.busy)
        asyncio.get_running_loop().call_later(self.work[job.message.decode()], self._finish, job)

    def _finish(self, job: JobDelivery) -> None:
        job.ack()
        self.busy -= 1
        self.done += 1
        self.puller.release()


async def watch(broker: MemoryBroker, desk: Desk) -> None:
    """Fail where a job has waited beside an idle slot for too long."""
    beside: dict[int, float] = {}
    while True:
        await asyncio.sleep(SAMPLE_S)
        waiting = [job.seq for jobs in broker.waiting.values() for job in jobs]
        idle = desk.busy < desk.slots
        beside = {seq: beside.get(seq, 0.0) + SAMPLE_S for seq in waiting} if idle else {}
        longest = max(beside.values(), default=0.0)
        assert longest <= LIMIT_S, f"a job waited {longest:.3f} s beside {desk.slots - desk.busy} of {desk.slots} slots"


async def play(slots: int, queues: list[Queue], arrivals: list[Arrival], seed: int) -> Desk:
    random.seed(seed)
    broker = MemoryBroker(ack_wait_s=1e6)
    work: dict[str, float] = {}
    desk = Desk(slots, work)
    bus = SlowBus(broker, desk.on_job)
    desk.puller = Puller(bus, slots, frozenset)
    await bus.start()
    await desk.puller.serve(queues)
    desk.puller.open()
    watcher = asyncio.create_task(watch(broker, desk))
    names = map(str, itertools.count())
    for arrival in arrivals:
        await asyncio.sleep(arrival.gap_s)
        queue = queues[arrival.queue % len(queues)]
        broker.open_queue(queue)
        for _ in range(arrival.count):
            name = next(names)
            work[name] = arrival.work_s
            broker.store(queue, name.encode(), name, "default")
    end = asyncio.get_running_loop().time() + WATCHED_S
    while desk.done < len(work) and not watcher.done() and asyncio.get_running_loop().time() < end:
        await asyncio.sleep(0.05)
    await asyncio.sleep(0)
    if watcher.done():
        watcher.result()
    watcher.cancel()
    await desk.puller.close()
    return desk


def queues_of(count: int) -> list[Queue]:
    return [Queue(Capability.CHAT, LANES[number % 3], f"m{number // 3}") for number in range(count)]


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        gap_s=st.sampled_from([0.0, 0.001, 0.005, 0.02, 0.1, 0.3, 1.0]),
        queue=st.integers(0, 23),
        count=st.sampled_from([1, 1, 1, 2, 5, 20, 70]),
        work_s=st.sampled_from([0.0, 0.001, 0.01, 0.1, 1.0, 10.0]),
    ),
    min_size=1,
    max_size=60,
)
BURST = [Arrival(1.0, 1, 24, 10.0)]


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@example(slots=24, count=6, arrivals=BURST, seed=0)
@example(slots=24, count=6, arrivals=[Arrival(0.01, 1, 1, 0.001)] * 200 + BURST, seed=0)
@given(slots=st.integers(1, 80), count=st.integers(1, 24), arrivals=ARRIVALS, seed=st.integers(0, 9))
def test_no_slot_is_idle_beside_a_waiting_job(slots: int, count: int, arrivals: list[Arrival], seed: int) -> None:
    """Every job starts as soon as a slot is free, and no more jobs run than there are slots."""
    desk = run(play(slots, queues_of(count), arrivals, seed))
    assert desk.most <= slots
    assert desk.refused == 0


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    slots=st.sampled_from([8, 24, 64]),
    count=st.sampled_from([1, 3, 8]),
    share=st.sampled_from([0.5, 1.0, 1.25]),
    work_s=st.sampled_from([0.001, 0.01, 0.1, 1.0]),
    seed=st.integers(0, 9),
)
def test_callers_that_come_back(slots: int, count: int, share: float, work_s: float, seed: int) -> None:
    """Fewer callers than slots, as many, and more, each sending its next request after an answer, over several queues."""
    callers = max(1, round(slots * share))
    queues = [Queue(Capability.CHAT, Lane.DEFAULT, f"m{number}") for number in range(count)]
    waves = [
        Arrival(work_s / callers, caller, 1, work_s)
        for _ in range(max(2, int(2.0 / work_s / 8)))
        for caller in range(callers)
    ][:1500]
    desk = run(play(slots, queues, waves, seed))
    assert desk.most <= slots
    assert desk.refused == 0
