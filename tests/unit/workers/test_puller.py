"""Free slots get jobs: never more than slots, and never none while jobs wait."""

from __future__ import annotations

import asyncio
import random
import secrets

import pytest
import uvloop

from backbone.bus.bus import JobDelivery, Queue
from backbone.testing.bus import MemoryBroker, MemoryGatewayBus, MemoryWorkerBus
from schemas.jobs import LANES, Capability, Envelope
from tests.conftest import Eventually
from workers.model_turns import ModelTurns
from workers.pull_backoff import MIN_PROBABILITY
from workers.puller import Puller

QUEUES = [Queue(Capability.CHAT, lane, model) for model in ("a", "b") for lane in LANES]


class Ear:
    is_waiting = True
    started_at: float | None = None

    def on_stored(self, seq: int) -> None: ...

    def on_refused(self, error: Exception) -> None:
        raise error

    def on_event(self, data: bytes) -> bytes | None: ...


class Desk:
    """A worker whose jobs take a fixed time, and that counts them."""

    def __init__(self, broker: MemoryBroker, slots: int, work_s: float) -> None:
        self.bus = MemoryWorkerBus(broker, self.on_job)
        self.puller = Puller(self.bus, slots, frozenset)
        self.work_s = work_s
        self.most = self.now = 0
        self.done: list[Queue] = []
        self.refused = 0

    def on_job(self, job: JobDelivery) -> None:
        if not self.puller.accept(job):
            self.refused += 1
            job.nak()
            return
        self.now += 1
        self.most = max(self.most, self.now)
        asyncio.get_running_loop().call_later(self.work_s, self.finish, job)

    def finish(self, job: JobDelivery) -> None:
        job.ack()
        self.now -= 1
        self.done.append(job.queue)
        self.puller.release()

    async def start(self) -> None:
        await self.bus.start()
        await self.puller.serve(QUEUES)
        self.puller.open()


async def submit(broker: MemoryBroker, queues: list[Queue]) -> MemoryGatewayBus:
    gateway = MemoryGatewayBus(broker)
    await gateway.start()
    for queue in QUEUES:
        await gateway.open_queue(queue)
    for queue in queues:
        envelope = Envelope(
            job=f"job_{secrets.token_hex(16)}", request_id="r", endpoint="/", capability=queue.capability, lane=queue.lane,
            model=queue.model, public_model=queue.model, reply=gateway.new_reply_subject(),
        )  # fmt: skip
        gateway.submit(envelope, b"{}", Ear())
    return gateway


@pytest.mark.parametrize("slots", [1, 2, 5, 23, 24, 64])
async def test_slots_are_never_exceeded_and_everything_is_done(slots: int, eventually: Eventually) -> None:
    """With few slots and with many, on every queue at once: all jobs are done, at most `slots` at a time."""
    broker = MemoryBroker()
    desk = Desk(broker, slots, 0.001)
    await desk.start()
    jobs = [random.choice(QUEUES) for _ in range(150)]
    await submit(broker, jobs)
    await eventually(lambda: len(desk.done) == len(jobs))
    assert desk.most <= slots
    assert desk.refused == 0
    await desk.puller.close()


@pytest.mark.parametrize("slots", [2, 64])
async def test_workers_share_the_load(slots: int, eventually: Eventually) -> None:
    """Three workers of equal speed do about a third each."""
    broker = MemoryBroker()
    desks = [Desk(broker, slots, 0.005) for _ in range(3)]
    for desk in desks:
        await desk.start()
    await submit(broker, [QUEUES[1]] * 300)
    await eventually(lambda: sum(len(desk.done) for desk in desks) == 300)
    assert min(len(desk.done) for desk in desks) >= 60
    for desk in desks:
        await desk.puller.close()


async def test_priority_goes_before_a_backlog(eventually: Eventually) -> None:
    """A priority job that comes into a long default backlog is among the next to start."""
    broker = MemoryBroker()
    desk = Desk(broker, 1, 0.002)
    await submit(broker, [QUEUES[1]] * 50)
    await desk.start()
    await eventually(lambda: len(desk.done) >= 5)
    before = len(desk.done)
    await submit(broker, [QUEUES[0]])
    await eventually(lambda: QUEUES[0] in desk.done)
    assert desk.done.index(QUEUES[0]) - before <= 3
    await desk.puller.close()


async def test_a_paused_worker_gives_back_what_still_comes(eventually: Eventually) -> None:
    """Jobs that arrive while a worker drains go back to the queue, for another worker."""
    broker = MemoryBroker()
    desk, other = Desk(broker, 64, 0.001), Desk(broker, 64, 0.001)
    await desk.start()
    desk.puller.pause()
    await other.start()
    await submit(broker, [QUEUES[1]] * 20)
    await eventually(lambda: len(other.done) == 20)
    assert not desk.done
    await desk.puller.close()
    await other.puller.close()


async def test_a_redelivered_job_is_found_without_a_notification(eventually: Eventually) -> None:
    """A redelivery sends no notification; the slow round finds the job."""
    broker = MemoryBroker(ack_wait_s=0.05)
    gateway = await submit(broker, [QUEUES[2]])
    dead: list[JobDelivery] = []
    bus = MemoryWorkerBus(broker, dead.append)
    await bus.start()
    bus.pull(QUEUES[2], 1, 0.0, lambda *_: None)
    await eventually(lambda: dead)
    desk = Desk(broker, 1, 0.0)
    await desk.start()
    await eventually(lambda: desk.done == [QUEUES[2]])
    await desk.puller.close()
    await gateway.close()


@pytest.mark.parametrize("slots", [1, 16])
async def test_a_job_that_came_back_is_found_beside_a_backlog(slots: int, eventually: Eventually) -> None:
    """A gateway names its queue, which gets a turn even beside queues that always hold a job."""
    broker = MemoryBroker(ack_wait_s=0.05)
    await submit(broker, [QUEUES[2]])
    dead: list[JobDelivery] = []
    bus = MemoryWorkerBus(broker, dead.append)
    await bus.start()
    bus.pull(QUEUES[2], 1, 0.0, lambda *_: None)
    await eventually(lambda: dead)
    desk = Desk(broker, slots, 0.001 * slots)
    await desk.start()
    await submit(broker, [QUEUES[1]] * 3000)
    await eventually(lambda: desk.done)
    for number in range(100):
        if QUEUES[2] in desk.done:
            break
        if number % 10 == 0:
            desk.puller._on_backlog(QUEUES[2])
        await asyncio.sleep(0.02)
    assert QUEUES[2] in desk.done
    assert len(desk.done) < 3000
    await desk.puller.close()


async def test_slots_and_queues_may_change_while_jobs_run(eventually: Eventually) -> None:
    """A backend that gains slots or models is used accordingly from then on, and nothing is lost."""
    broker = MemoryBroker()
    desk = Desk(broker, 2, 0.002)
    await desk.start()
    jobs = [QUEUES[1]] * 60 + [QUEUES[4]] * 60
    await submit(broker, jobs)
    await eventually(lambda: len(desk.done) >= 10)
    await desk.puller.serve(QUEUES[:3], 30)
    await eventually(lambda: desk.most > 2)
    await eventually(lambda: desk.done.count(QUEUES[1]) == 60)
    await desk.puller.serve(QUEUES, 3)
    await eventually(lambda: len(desk.done) == len(jobs))
    assert desk.refused == 0
    await desk.puller.close()


async def test_a_job_that_was_left_to_others_is_pulled_a_little_later(
    eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the slow round: a worker that leaves a job to nearer ones pulls it when they are busy."""
    monkeypatch.setattr("workers.puller.POLL_ROUND_S", 1000.0)
    broker = MemoryBroker()
    desk = Desk(broker, 1, 0.001)
    await desk.start()
    monkeypatch.setattr(desk.puller._backoff, "_probabilities", dict.fromkeys(QUEUES, MIN_PROBABILITY))
    for count in range(1, 41):
        monkeypatch.setitem(desk.puller._backoff._probabilities, QUEUES[0], MIN_PROBABILITY)
        await submit(broker, QUEUES[:1])
        await eventually(lambda count=count: len(desk.done) == count)
    await desk.puller.close()


@pytest.mark.parametrize("slots", [2, 64], ids=["few", "many"])
async def test_a_paused_model_is_left_alone_and_the_others_go_on(slots: int, eventually: Eventually) -> None:
    """Jobs of the model wait or go to another worker; once the pause is over, they are taken without a further notification."""
    broker = MemoryBroker()
    desk = Desk(broker, slots, 0.001)
    await desk.start()
    paused = QUEUES[0].model
    others = [queue for queue in QUEUES if queue.model != paused]
    mine = [queue for queue in QUEUES if queue.model == paused]
    assert others
    desk.puller.pause_model(paused, 0.6)
    resumed = asyncio.get_running_loop().time() + 0.6
    await submit(broker, [*mine, *others])
    await eventually(lambda: len(desk.done) == len(others))
    assert all(queue.model != paused for queue in desk.done)
    await eventually(lambda: len(desk.done) == len(QUEUES))
    assert asyncio.get_running_loop().time() >= resumed
    await desk.puller.close()


async def test_the_longer_of_two_pauses_counts() -> None:
    broker = MemoryBroker()
    desk = Desk(broker, 2, 0.001)
    await desk.start()
    desk.puller.pause_model(QUEUES[0].model, 30.0)
    desk.puller.pause_model(QUEUES[0].model, 0.01)
    await submit(broker, [QUEUES[0]])
    await asyncio.sleep(0.1)
    assert desk.done == []
    await desk.puller.close()


async def test_the_job_of_the_first_load_counts_as_in_hand(eventually: Eventually) -> None:
    """Its load shows that the models do not fit together: the other model waits until the job has ended."""
    broker, turns = MemoryBroker(), ModelTurns(10.0)
    desk = Desk(broker, 2, 60.0)
    mine, others = QUEUES[0], QUEUES[-1]
    turns.update_models(frozenset((mine.model, others.model)), frozenset((others.model,)))
    desk.puller.set_model_turns(turns)
    await desk.start()
    await submit(broker, [mine])
    await eventually(lambda: desk.now == 1)
    turns.update_residency(frozenset((mine.model,)), {mine.model}, 1.0)
    assert not turns.admits(others.model, frozenset((others.model,)))
    await desk.puller.close()


async def test_the_others_do_not_give_way_to_a_model_that_is_paused(eventually: Eventually) -> None:
    """While the server asks to pause the model, its claim keeps no slot idle."""
    broker, turns = MemoryBroker(), ModelTurns(10.0)
    desk = Desk(broker, 2, 0.001)
    mine, others = QUEUES[0], QUEUES[-1]
    models = frozenset((mine.model, others.model))
    turns.update_models(models, frozenset((others.model,)))
    turns.start_job(mine.model, 0.0)
    turns.update_residency(frozenset((mine.model,)), {mine.model}, 1.0)
    turns.start_job(others.model, 2.0)
    turns.update_residency(frozenset((others.model,)), {others.model}, 3.0)  # they do not fit beside each other
    desk.puller.set_model_turns(turns)
    turns.record_request(others.model)
    turns.claim(mine.model, models)
    await desk.start()
    desk.puller.pause_model(mine.model, 60.0)
    await submit(broker, [others])
    await eventually(lambda: desk.done == [others])
    await desk.puller.close()


def test_every_pause_ends_by_the_clock_of_uvloop() -> None:
    """That clock counts milliseconds: a timer rarely fires exactly at its time."""

    async def pause() -> set[str]:
        puller = Puller(MemoryWorkerBus(MemoryBroker(), lambda _: None), 2, frozenset)
        for number in range(500):
            puller.pause_model(f"m{number}", 0.01 + number / 2500)
            await asyncio.sleep(0)
        puller.pause_model("m0", 0.2)
        puller.pause_model("m0", 0.1)
        assert "m0" in puller._paused
        await asyncio.sleep(0.5)
        return set(puller._paused)

    assert uvloop.run(pause()) == set()
