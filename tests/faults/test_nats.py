"""NATS dies, freezes, comes back, with and without its data."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.cluster import Cluster, Crew, Recorded
from tests.conftest import Eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

BACK_S = 20.0
"""New requests work again this long after NATS is back, on a busy machine."""
CLEAR = {
    502: {"events_lost", "worker_lost"},
    503: {"unavailable"},
}


@pytest_asyncio.fixture(loop_scope="module")
async def served(cluster: Cluster, crew: Crew) -> AsyncIterator[Crew]:
    """Two workers, and the promise that nothing but NATS is restarted."""
    await crew.start_all("", "")
    processes = [*cluster.gateways, *(cluster.workers[name] for name in crew.names)]
    before = [process.pid for process in processes]
    yield crew
    assert all(process.running for process in processes)
    assert [process.pid for process in processes] == before


def settled(answer: Recorded) -> bool:
    """An answer or a clear error; never silence, never a stream that only looks complete."""
    if answer.lines:
        return answer.complete or answer.error is not None
    if answer.status == 200:
        return answer.text == "hello there"
    return answer.error is not None and answer.error["code"] in CLEAR[answer.status or 0]


async def works_again(crew: Crew) -> float:
    """Ask until it is answered; the seconds that took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while True:
        answer = await crew.ask().end()
        if answer.status == 200:
            assert answer.text == "hello there"
            return loop.time() - began
        assert settled(answer), answer.body
        assert loop.time() - began < 3 * BACK_S, answer.body
        await asyncio.sleep(0.05)


async def test_nats_killed_and_started_again(cluster: Cluster, served: Crew, eventually: Eventually) -> None:
    """NATS is killed and comes back: requests in flight end in an answer or a clear error, new ones work within 10 s."""
    slow = [served.ask(echo={"first_delay_ms": 1000}), served.stream(echo={"first_delay_ms": 1000})]
    streams = [served.stream(echo={"delay_ms": 100, "tokens": 60}) for _ in range(2)]
    queued = [served.ask(echo={"first_delay_ms": 200}) for _ in range(14)]
    await eventually(lambda: all(stream.texts for stream in streams))
    cluster.nats.kill()
    await eventually(lambda: is_unready(cluster))
    refused = await served.ask().end()
    assert refused.status == 503
    assert refused.headers is not None
    assert "retry-after" in refused.headers
    await cluster.nats.restart()
    assert await works_again(served) < BACK_S
    in_flight = [*slow, *streams, *queued]
    await asyncio.gather(*(answer.end() for answer in in_flight))
    assert [answer.body for answer in in_flight if not settled(answer)] == []
    await eventually(lambda: served.idle(), what="the queue is empty")


async def is_unready(cluster: Cluster) -> bool:
    return (await cluster.get("/readyz")).status_code == 503


async def test_nats_frozen(cluster: Cluster, served: Crew, eventually: Eventually) -> None:
    """NATS is frozen for a few seconds: the same."""
    in_flight = [served.ask(echo={"first_delay_ms": 1000}), served.stream(echo={"delay_ms": 100, "tokens": 30})]
    await eventually(lambda: in_flight[1].texts)
    cluster.nats.pause()
    in_flight += [served.ask(), served.stream()]
    await eventually(lambda: is_unready(cluster))
    await asyncio.sleep(3)  # longer than ack_wait; the freeze is the fault
    cluster.nats.resume()
    assert await works_again(served) < BACK_S
    await asyncio.gather(*(answer.end() for answer in in_flight))
    assert [answer.body for answer in in_flight if not settled(answer)] == []
    await eventually(lambda: served.idle(), what="the queue is empty")


async def test_nats_comes_back_without_its_data(cluster: Cluster, served: Crew, eventually: Eventually) -> None:
    """NATS comes back empty: what was queued ends in a clear error, and new requests work within 10 s."""
    held = [served.ask(echo={"first_delay_ms": 60000}) for _ in range(16)]
    await eventually(lambda: served.runs(16))
    queued = served.ask()
    await eventually(lambda: served.waits(1))
    cluster.nats.kill()
    await cluster.nats.process.wait()
    cluster.nats.wipe()
    await cluster.nats.restart()
    await queued.end()
    assert queued.status == 502
    assert settled(queued), queued.body
    for answer in held:
        await answer.hang_up()
    assert await works_again(served) < BACK_S
    await eventually(lambda: served.idle())


async def test_nats_killed_again_and_again(cluster: Cluster, served: Crew, eventually: Eventually) -> None:
    """NATS is killed three times under load: every request ends in an answer or a clear error."""
    answers: list[Recorded] = []

    async def load() -> None:
        while True:
            answers.append(served.ask())
            answers.append(served.stream())
            await asyncio.sleep(0.02)

    loading = asyncio.create_task(load())
    for _ in range(3):
        before = len(answers)
        await eventually(lambda before=before: any(answer.status == 200 for answer in answers[before:]))
        cluster.nats.kill()
        await cluster.nats.restart()
    loading.cancel()
    await asyncio.gather(*(answer.end() for answer in answers))
    assert [answer.body for answer in answers if not settled(answer)] == []
    await eventually(lambda: served.idle(), what="the queue is empty")
