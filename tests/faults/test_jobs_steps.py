"""Durable jobs, each killed at one step of its way: the caller sees a delay, one end, and the whole answer of one attempt."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.cluster import Cluster, Crew, chat
from tests.conftest import Eventually
from tests.faults.watching import CHAT, Desk, Watched, undecidable
from tests.servers import Process
from tests.soak.faults import flush

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "one two three four five six"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def second(cluster: Cluster) -> Process:
    """One more gateway."""
    return await cluster.start_gateway()


@pytest_asyncio.fixture(loop_scope="module")
async def desk(cluster: Cluster, crew: Crew, second: Process) -> AsyncIterator[Desk]:
    desk = Desk(cluster, crew.model)
    yield desk
    await desk.close()
    for gateway in cluster.gateways:
        await gateway.start()  # the one that was killed


async def check_whole(job: Watched, *, attempts: int = 1) -> None:
    """Completed, recorded, and the result is this text from whichever gateway."""
    await job.end()
    assert job.view.end == "job.completed"
    for gateway in (0, 1):
        record = await job.record(gateway)
        assert (record["status"], record["attempts"]) == ("completed", attempts)
        result = await job.result(gateway)
        assert result.status_code == 200
        if job.view.chunks:
            assert result.content == job.view.answer()
            assert job.text == TEXT
        else:
            assert result.json()["choices"][0]["message"]["content"] == TEXT


# A worker


async def test_worker_killed_after_its_start(crew: Crew, desk: Desk, eventually: Eventually) -> None:
    """A worker is killed before any output: the next one answers."""
    old = await crew.start(options="first_delay_ms=60000")
    job = await desk.submit()
    await eventually(lambda: "started" in job.kinds)
    await crew.start()
    crew.kill(old)
    await check_whole(job, attempts=2)
    assert job.kinds == ["started", "restarted", "completed"]
    await eventually(lambda: crew.idle())


async def test_worker_killed_in_the_middle_of_a_stream(crew: Crew, desk: Desk, eventually: Eventually) -> None:
    """A worker is killed halfway: anyone who watches is told to begin again, and gets the next worker's stream whole."""
    old = await crew.start(options="fail=hang_mid")
    job = await desk.stream()
    await eventually(lambda: job.kinds.count("chunk") == 3)
    await crew.start()
    crew.kill(old)
    await check_whole(job, attempts=2)
    assert job.kinds == ["started", *["chunk"] * 3, "restarted", *["chunk"] * 7, "completed"]
    await eventually(lambda: crew.idle())


async def test_worker_killed_between_the_last_event_and_the_word(
    cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually
) -> None:
    """All of a stream is stored, but not that it has ended: it is not taken for complete, and the next worker ends it."""
    old = await crew.start()
    async with undecidable(cluster):
        job = await desk.stream()
        await eventually(lambda: job.kinds.count("chunk") == 7)
        assert (await job.record())["status"] == "in_progress"
        assert (await job.result()).json()["error"]["code"] == "result_not_ready"
        crew.kill(old)
        await cluster.workers[old].wait()
    await crew.start()
    await check_whole(job, attempts=2)
    assert job.kinds == ["started", *["chunk"] * 7, "restarted", *["chunk"] * 7, "completed"]
    await eventually(lambda: crew.idle())


# A gateway


async def test_gateway_killed_right_after_the_202(
    cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually
) -> None:
    """The gateway that accepted a job is killed at once: the other one tells of it from its first event, and has its result."""
    await crew.start(options="delay_ms=100")
    job = await desk.stream(gateway=1, on=cluster.urls[:1])
    cluster.gateways[1].kill()
    await job.end()
    assert job.kinds == ["started", *["chunk"] * 7, "completed"]
    await cluster.gateways[1].start()
    await check_whole(job)
    await eventually(lambda: crew.idle())


async def test_all_gateways_killed_while_a_worker_generates(
    cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually
) -> None:
    """No gateway is left: the worker goes on, and its answer is there when one is back."""
    await crew.start(options="delay_ms=250")
    job = await desk.stream()
    await eventually(lambda: "chunk" in job.kinds)
    for gateway in cluster.gateways:
        gateway.kill()
    await eventually(lambda: cluster.attempts(crew.names[0]))
    await asyncio.gather(*(gateway.start() for gateway in cluster.gateways))
    await check_whole(job)
    assert job.kinds == ["started", *["chunk"] * 7, "completed"]


async def test_gateways_killed_while_they_record(
    cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually
) -> None:
    """Gateways die with words that they could not record: those that come after them do."""
    await crew.start()
    jobs = [await desk.submit() for _ in range(4)]
    held = [await desk.submit(echo={"first_delay_ms": 1000}) for _ in range(4)]
    await asyncio.gather(*(job.end() for job in jobs))
    await eventually(lambda: all("started" in job.kinds for job in held))
    cluster.redis.pause()
    try:
        await eventually(lambda: len(cluster.attempts(crew.names[0])) == 8)
        for gateway in cluster.gateways:
            gateway.kill()
        await asyncio.gather(*(gateway.wait() for gateway in cluster.gateways))
    finally:
        cluster.redis.resume()
    assert {await job.in_redis() for job in held} == {"in_progress"}
    await asyncio.gather(*(gateway.start() for gateway in cluster.gateways))
    for job in held:
        await check_whole(job)
    await eventually(lambda: all_in_redis(held, "completed"), timeout_s=45)


async def all_in_redis(jobs: list[Watched], status: str) -> bool:
    return {await job.in_redis() for job in jobs} == {status}


# NATS


async def test_nats_killed_while_a_worker_generates(
    cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually
) -> None:
    """NATS dies in the middle of a stream: nothing of it is lost or told twice."""
    await crew.start(options="delay_ms=200")
    job = await desk.stream()
    await eventually(lambda: "chunk" in job.kinds)
    cluster.nats.kill()
    await cluster.nats.restart()
    await job.end()
    assert job.view.end == "job.completed"
    assert job.text == TEXT
    assert (await job.result()).content == job.view.answer()
    await eventually(lambda: crew.idle())


async def test_nats_killed_while_it_decides(cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually) -> None:
    """NATS dies while a worker tries to say how its job has ended: the worker says it again when NATS is back."""
    await crew.start()
    async with undecidable(cluster):
        job = await desk.stream()
        await eventually(lambda: job.kinds.count("chunk") == 7)
        cluster.nats.kill()
        await cluster.nats.restart()
    await job.end()
    assert job.view.end == "job.completed"
    assert job.text == TEXT
    assert (await job.result()).content == job.view.answer()
    await eventually(lambda: crew.idle())


# Redis


async def test_redis_forgets_everything(cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually) -> None:
    """FLUSHALL with jobs queued and running: they are found all the same, run, and their records come back."""
    await crew.start(options="first_delay_ms=1500", WORKER_CONCURRENCY="2")
    jobs = [await desk.submit() for _ in range(6)]
    await eventually(lambda: sum("started" in job.kinds for job in jobs) == 2)
    await flush(cluster)
    seen = [await job.record() for job in jobs]
    assert all(record["status"] in {"queued", "in_progress"} for record in seen), seen
    for job in jobs:
        await check_whole(job)
        assert job.kinds == ["started", "completed"]
    await eventually(lambda: all_in_redis(jobs, "completed"))
    listed = (await cluster.get("/v1/jobs", params={"model": crew.model})).json()["data"]
    assert {record["id"] for record in listed} == {job.id for job in jobs}


REBUILT_S = 15.0
"""Promised: as long after Redis has forgotten everything, the list holds what it held. 2 s until it is noticed, the rest for a busy machine."""


async def test_the_list_of_jobs_after_redis_forgot(
    cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually
) -> None:
    """FLUSHALL: those that had ended, in each way, and those that wait, are all listed again, as what they are."""
    await crew.start(options="first_delay_ms=200")
    ended = [await desk.submit() for _ in range(12)]
    for job in ended:
        await job.end()
    await crew.stop()
    waiting = [await desk.submit() for _ in range(6)]
    cancelled = [await desk.submit() for _ in range(3)]
    for job in cancelled:
        await cluster.post(f"/v1/jobs/{job.id}/cancel", {})
    await eventually(lambda: all_in_redis(cancelled, "cancelled"))
    await eventually(lambda: all_in_redis(ended, "completed"))
    statuses = {job.id: "completed" for job in ended} | {job.id: "queued" for job in waiting}
    statuses |= {job.id: "cancelled" for job in cancelled}

    async def listed(gateway: int) -> dict[str, str]:
        answer = await cluster.http.get(cluster.urls[gateway] + f"/v1/jobs?limit=100&model={crew.model}")
        return {job["id"]: job["status"] for job in answer.json()["data"]}

    assert await listed(0) == statuses
    await flush(cluster)

    async def whole() -> bool:
        return await listed(0) == await listed(1) == statuses

    await eventually(whole, timeout_s=REBUILT_S)
    for job in waiting:
        await cluster.post(f"/v1/jobs/{job.id}/cancel", {})


async def test_a_key_that_is_used_again_after_redis_forgot(
    cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually
) -> None:
    """An Idempotency-Key outlives Redis's data: the job is the same, has not run again, and is listed as what it is."""
    name = await crew.start()
    headers = {"idempotency-key": crew.model}
    body = {"endpoint": CHAT, "body": chat(TEXT, model=crew.model)}
    first = (await cluster.post("/v1/jobs", body, headers=headers)).json()
    job = await Watched(cluster, first, cluster.urls).end()
    await eventually(lambda: all_in_redis([job], "completed"))
    await flush(cluster)
    again = await cluster.http.post(cluster.urls[1] + "/v1/jobs", json=body, headers=headers)
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (202, job.id, "completed")
    listed = (await cluster.get("/v1/jobs", params={"model": crew.model})).json()["data"]
    assert [(record["id"], record["status"]) for record in listed] == [(job.id, "completed")]
    await check_whole(job)
    await eventually(lambda: crew.idle())
    await eventually(lambda: cluster.attempts(name))
    assert len(cluster.attempts(name)) == 1


@pytest.mark.parametrize("deed", ["killed", "frozen"])
async def test_redis_away_while_jobs_end(
    cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually, deed: str
) -> None:
    """Without Redis, submits and polls are refused as unavailable, and what runs ends; it is recorded when Redis is back."""
    await crew.start(options="first_delay_ms=1000", WORKER_CONCURRENCY="2")
    jobs = [await desk.submit() for _ in range(4)]
    await eventually(lambda: sum("started" in job.kinds for job in jobs) == 2)
    if deed == "killed":
        cluster.redis.kill()
    else:
        cluster.redis.pause()
    try:
        submit = {"endpoint": CHAT, "body": chat(model=crew.model)}
        for gateway in (0, 1):
            url = cluster.urls[gateway]
            answers = [
                await cluster.http.post(url + "/v1/jobs", json=submit),
                await cluster.http.get(f"{url}/v1/jobs/{jobs[0].id}"),
                await cluster.http.get(f"{url}/v1/jobs/{jobs[0].id}", params={"wait": 5}),
                await cluster.http.get(f"{url}/v1/jobs"),
            ]
            assert [(a.status_code, a.json()["error"]["code"]) for a in answers] == [(503, "unavailable")] * 4
        await eventually(lambda: len(cluster.attempts(crew.names[0])) == 4)
        ran = await cluster.post(CHAT, chat(model=crew.model))
        assert ran.status_code == 200, "a synchronous request needs no Redis"
    finally:
        if deed == "killed":
            await cluster.redis.restart()
        else:
            cluster.redis.resume()
    for job in jobs:
        await job.end()
        assert job.view.end == "job.completed"
        assert (await job.result()).json()["choices"][0]["message"]["content"] == TEXT
    await eventually(lambda: all_in_redis(jobs, "completed"), timeout_s=45)
    for gateway in (0, 1):
        await eventually(lambda gateway=gateway: polled(cluster, gateway, jobs[0]))
    await eventually(lambda: len(cluster.attempts(crew.names[0])) == 5)
    assert [attempt["outcome"] for attempt in cluster.attempts(crew.names[0])] == ["completed"] * 5


async def polled(cluster: Cluster, gateway: int, job: Watched) -> bool:
    """Whether this gateway has noticed that Redis is back."""
    answer = await cluster.http.get(f"{cluster.urls[gateway]}/v1/jobs/{job.id}")
    return answer.status_code == 200 and answer.json()["status"] == "completed"


# Dead letters


async def test_a_job_that_kills_its_workers(cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually) -> None:
    """Three workers die of a job: it ends as failed, lies among the dead letters, and is replayed with success."""
    job = None
    for count in range(1, 4):
        name = await crew.start(options="first_delay_ms=60000")
        job = job or await desk.submit()
        await eventually(lambda job=job, count=count: sum(k in {"started", "restarted"} for k in job.kinds) == count)
        crew.kill(name)
    assert job is not None
    await crew.start()
    await job.end()
    record = await job.record()
    assert (record["status"], record["error"]["code"], record["attempts"]) == ("failed", "worker_lost", 3)
    assert "3 times" in record["error"]["message"]
    result = await job.result()
    assert (result.status_code, result.json()["error"]["code"]) == (502, "worker_lost")
    await eventually(lambda: crew.idle())
    letter = (await cluster.get(f"/v1/dlq/{job.id}")).json()
    assert letter["request"]["messages"][0]["content"] == TEXT
    assert letter["error"]["code"] == "worker_lost"
    replayed = await cluster.post(f"/v1/dlq/{job.id}/replay", None)
    assert (replayed.status_code, replayed.json()["id"], replayed.json()["run"]) == (202, job.id, 2)
    record = await job.record(gateway=1, wait=20)
    assert (record["status"], record["run"], record["attempts"], record["error"]) == ("completed", 2, 1, None)
    assert (await job.result()).json()["choices"][0]["message"]["content"] == TEXT
    assert (await cluster.get(f"/v1/dlq/{job.id}")).status_code == 404
    await eventually(lambda: all_in_redis([job], "completed"))
    again = Watched(cluster, record, cluster.urls)
    await again.end()
    assert again.kinds[-2:] == ["restarted", "completed"]


async def test_retries_that_are_used_up(cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually) -> None:
    """Transient errors are tried three times, and then the job is a dead letter; permanent ones fail at once and are none."""
    name = await crew.start()
    transient = await desk.submit(echo={"fail": "before"})
    once = await desk.submit(echo={"fail": "mid", "fail_times": 1})
    permanent = await desk.submit(echo={"fail": "error"})
    refused = await desk.submit(echo={"fail": "refuse"})
    for job, starts in ((permanent, 1), (refused, 1), (once, 2), (transient, 3)):
        await job.end()
        assert sum(kind in {"started", "restarted"} for kind in job.kinds) == starts
        assert (await job.record())["attempts"] == starts
    await check_whole(once, attempts=2)
    for job, kept in ((permanent, 404), (refused, 404), (transient, 200)):
        record = await job.record(gateway=1)
        assert record["status"] == "failed"
        assert (await job.result()).json()["error"]["code"] == record["error"]["code"]
        assert (await cluster.get(f"/v1/dlq/{job.id}")).status_code == kept
    outcomes = [a["outcome"] for a in cluster.attempts(name) if a["job"] == transient.id]
    assert outcomes == ["returned", "returned", "failed"]
    await eventually(lambda: crew.idle())


async def is_answered(job: Watched) -> bool:
    """Whether the gateway has NATS back: until then, it refuses at once what it has to read there."""
    return (await job.result()).json()["error"]["code"] != "unavailable"


async def test_cancelled_before_it_began(cluster: Cluster, crew: Crew, desk: Desk, eventually: Eventually) -> None:
    """Jobs that are cancelled while they wait never run, also where NATS dies between their cancelling and their turn."""
    name = await crew.start(options="first_delay_ms=1500", WORKER_CONCURRENCY="1")
    running = await desk.submit()
    await eventually(lambda: "started" in running.kinds)
    waiting = [await desk.submit() for _ in range(3)]
    for gateway, job in enumerate(waiting):
        answer = await cluster.http.post(f"{cluster.urls[gateway % 2]}/v1/jobs/{job.id}/cancel")
        assert json.loads(answer.text)["status"] == "cancelled"
    cluster.nats.kill()
    await cluster.nats.restart()
    for job in waiting:
        await job.end()
        assert job.kinds == ["cancelled"]
        assert (await job.record())["status"] == "cancelled"
        await eventually(lambda job=job: is_answered(job))
        assert (await job.result()).json()["error"]["code"] == "job_cancelled"
    await running.end()
    assert running.view.end == "job.completed"
    await eventually(lambda: crew.idle())
    await eventually(lambda: any(attempt["job"] == running.id for attempt in cluster.attempts(name)))
    assert {attempt["job"] for attempt in cluster.attempts(name) if attempt["tokens"]} == {running.id}
    await eventually(lambda: all_in_redis(waiting, "cancelled"))
