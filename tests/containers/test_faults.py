"""What only containers can suffer: a plug that is pulled, and `docker restart`. What else can happen to them, tests/faults does
with `--servers containers`.

A part without its network runs on and hears nothing, not even that its connections are gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
import pytest_asyncio

from tests.cluster import Cluster, Crew, chat
from tests.conftest import Eventually
from tests.containers.process import ContainerProcess
from tests.faults.test_jobs_steps import polled
from tests.faults.test_nats import settled, works_again
from tests.faults.test_registry import asking, in_etcd, readiness
from tests.faults.watching import CHAT, Desk, Watched
from tests.servers import Process, Server

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

TEXT = "one two three four five six"
BACK_S = 60.0
"""A part that was cut off notices within its own pings."""


@pytest_asyncio.fixture(loop_scope="module")
async def desk(cluster: Cluster, crew: Crew) -> AsyncIterator[Desk]:
    desk = Desk(cluster, crew.model)
    yield desk
    await desk.close()
    for gateway in cluster.gateways:
        await gateway.start()  # the one that was killed


def container(part: Process | Server) -> ContainerProcess:
    """What `part` runs in."""
    process = getattr(part, "process", part)
    assert isinstance(process, ContainerProcess)
    return process


@contextmanager
def unplugged(part: Process | Server) -> Iterator[None]:
    """Without its network meanwhile."""
    container(part).unplug()
    try:
        yield
    finally:
        container(part).plug_in()


async def done(job: Watched) -> None:
    """Completed, with the whole text."""
    await job.end(BACK_S)
    assert job.view.end == "job.completed"
    assert job.text == TEXT


async def test_a_worker_cut_off_in_the_middle(cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually) -> None:
    """Its jobs go to another worker and are answered once; when it is back it works again, and has said nothing of its own."""
    old = await crew.start(options="first_delay_ms=60000")
    asked, job = crew.ask(TEXT), await desk.stream(TEXT)
    await eventually(lambda: "started" in job.kinds)
    await eventually(lambda: crew.runs(2))
    with unplugged(cluster.workers[old]):
        new = await crew.start()
        await done(job)
        assert (await asked.end()).text == TEXT
        assert (await job.record())["attempts"] == 2
        await cluster.wait_for_worker(old, None)
    await cluster.wait_for_worker(old, "ready", timeout_s=BACK_S)
    await eventually(lambda: len(cluster.attempts(old)) == 2, timeout_s=BACK_S)
    assert {attempt["outcome"] for attempt in cluster.attempts(old)} <= {"fenced", "cancelled"}
    await eventually(lambda: len(cluster.attempts(new)) == 2)
    await eventually(lambda: crew.idle())
    crew.kill(new)
    await cluster.wait_for_worker(new, None)
    assert (await crew.ask(echo={"first_delay_ms": 0}).end(BACK_S)).status == 200


async def test_nats_cut_off_and_back(cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually) -> None:
    """Nobody is left without an end: what was asked is answered or refused clearly, what was accepted is completed."""
    await crew.start_all("delay_ms=300", "delay_ms=300")
    job = await desk.stream(TEXT)
    in_flight = [crew.ask(), crew.stream()]
    await eventually(lambda: "chunk" in job.kinds)
    with unplugged(cluster.nats):
        in_flight += [crew.ask(), crew.stream()]
        await eventually(lambda: _unready(cluster), timeout_s=BACK_S)
        assert (await crew.ask().end()).status == 503
    await works_again(crew)
    await asyncio.gather(*(answer.end(BACK_S) for answer in in_flight))
    assert [answer.body for answer in in_flight if not settled(answer)] == []
    await done(job)
    await eventually(lambda: crew.idle(), timeout_s=BACK_S)


async def _unready(cluster: Cluster) -> bool:
    return (await cluster.get("/readyz")).status_code == 503


async def test_redis_cut_off_and_back(cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually) -> None:
    """Synchronous requests do not notice; submits are 503; what was accepted ends, and is recorded when Redis is back."""
    await crew.start(options="delay_ms=300")
    job = await desk.stream(TEXT)
    await eventually(lambda: "chunk" in job.kinds)
    with unplugged(cluster.redis):
        async with asking(crew):
            await eventually(lambda: _weak(cluster, "redis"), timeout_s=BACK_S)
            refused = await cluster.post("/v1/jobs", {"endpoint": CHAT, "body": chat(model=crew.model)})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        await eventually(lambda: len(cluster.attempts(crew.names[0])) > 1)
    await eventually(lambda: _weak(cluster), timeout_s=BACK_S)
    await done(job)
    await eventually(lambda: _recorded(job), timeout_s=BACK_S)


async def _recorded(job: Watched) -> bool:
    return await job.in_redis() == "completed"


async def _weak(cluster: Cluster, *parts: str) -> bool:
    status, _, weak = await readiness(cluster)
    return status == 200 and weak == set(parts)


async def test_etcd_cut_off_for_longer_than_its_leases(cluster: Cluster, crew: Crew, eventually: Eventually) -> None:
    """Requests work throughout, and the workers are in the registry when it is back."""
    names = await crew.start_all("", "")
    async with asking(crew):
        with unplugged(cluster.etcd):
            await eventually(lambda: _weak(cluster, "etcd"), timeout_s=BACK_S)
            await asyncio.sleep(3)  # longer than a lease; the outage is the fault
            assert set(names) <= set(await cluster.listed())
        await eventually(lambda: _weak(cluster), timeout_s=BACK_S)
        await eventually(lambda: in_etcd(cluster, names), timeout_s=BACK_S)
    assert set(names) <= set(await cluster.listed())


async def test_a_gateway_killed_while_a_stream_is_followed(
    cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually
) -> None:
    """Anyone who follows goes on at the other one after the last event seen: nothing twice, nothing missing."""
    await crew.start(options="delay_ms=400")
    first, second = cluster.urls[:2]
    job = await desk.stream(TEXT, on=[second, first])  # a follower's first try is at the second of these
    await eventually(lambda: job.kinds.count("chunk") >= 2)
    seen = job.kinds.count("chunk")
    cluster.gateways[0].kill()
    await done(job)
    assert job.kinds == ["started", *["chunk"] * 7, "completed"]
    assert seen < 7, "it was killed after the end"


async def test_a_gateway_cut_off(cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually) -> None:
    """What it accepted is completed, and told of by the other one; back, it serves again."""
    await crew.start(options="delay_ms=300")
    job = await desk.stream(TEXT, gateway=1, on=cluster.urls[:1])
    await eventually(lambda: "started" in job.kinds)
    with unplugged(cluster.gateways[1]):
        await done(job)
        assert (await job.result()).status_code == 200
    await eventually(lambda: _served_by(cluster, crew, 1), timeout_s=BACK_S)
    await eventually(lambda: polled(cluster, 1, job), timeout_s=BACK_S)


async def _served_by(cluster: Cluster, crew: Crew, gateway: int) -> bool:
    return (await crew.ask(url=cluster.urls[gateway]).end(BACK_S)).status == 200


@pytest.mark.parametrize("part", ["nats", "etcd", "redis", "worker", "gateway"])
async def test_restarted(cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually, part: str) -> None:
    """`docker restart` of any part in the middle of a job: the job is completed, and everything works afterwards."""
    names = await crew.start_all("delay_ms=200", "delay_ms=200", WORKER_DRAIN_S="1")
    jobs = [await desk.stream(TEXT) for _ in range(4)]
    await eventually(lambda: all("started" in job.kinds for job in jobs))
    parts: dict[str, Server | Process] = {"nats": cluster.nats, "etcd": cluster.etcd, "redis": cluster.redis}
    parts |= {"worker": cluster.workers[names[0]], "gateway": cluster.gateways[1]}
    await container(parts[part]).restart()
    await asyncio.gather(*(done(job) for job in jobs))
    await works_again(crew)
    await eventually(lambda: _weak(cluster), timeout_s=BACK_S)
    await asyncio.gather(*(cluster.wait_for_worker(name, timeout_s=BACK_S) for name in names))
    submitted = await desk.submit(TEXT)
    await submitted.end(BACK_S)
    assert submitted.view.end == "job.completed"
    await eventually(lambda: crew.idle())
