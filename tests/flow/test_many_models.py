"""A server may list thousands of models: each is served when it is asked for, and what is gone leaves nothing behind."""

from __future__ import annotations

import time

import pytest

from backbone.bus.nats.connection import NatsConnection
from backbone.bus.subjects import JOBS_STREAM
from tests.cluster import Cluster, Crew, chat
from tests.conftest import Eventually
from tests.flow.conftest import SETTINGS
from tests.jetstream import request

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODELS = 2000
MAX_QUEUES = 12


@pytest.fixture(scope="module")
def cluster_settings() -> dict[str, str]:
    return SETTINGS | {"MAX_QUEUES": str(MAX_QUEUES), "QUEUE_GRACE_S": "1"}


async def names(cluster: Cluster) -> set[str]:
    """The consumers of the jobs stream."""
    wire = NatsConnection(cluster.nats.url, "names")
    await wire.connect()
    try:
        return set((await request(wire, f"CONSUMER.NAMES.{JOBS_STREAM}", {"offset": 0}))["consumers"] or [])
    finally:
        await wire.close()


async def listed(cluster: Cluster) -> set[str]:
    return {model["id"] for model in (await cluster.get("/v1/models")).json()["data"]}


async def test_two_thousand_models_on_one_worker(cluster: Cluster, crew: Crew, eventually: Eventually) -> None:
    """All are listed, and answer at once when they are asked; only those have queues, until their worker is gone."""
    models = [f"{crew.model}-{number}" for number in range(MODELS)]
    worker = await crew.start(WORKER_MODELS=",".join(models))
    assert set(models) <= await listed(cluster)
    assert await names(cluster) == set()
    for model in models[:: MODELS // 8]:
        answer = await cluster.post("/v1/chat/completions", chat(model=model), timeout=5.0)
        assert answer.status_code == 200, answer.text
    job = await cluster.post("/v1/jobs?wait=5", {"endpoint": "/v1/chat/completions", "body": chat(model=models[7])})
    assert job.status_code == 202, job.text

    async def completed() -> bool:
        return bool((await cluster.get(f"/v1/jobs/{job.json()['id']}")).json()["status"] == "completed")

    await eventually(completed)
    assert len(await names(cluster)) == 9
    await cluster.stop_workers(worker)

    async def all_freed() -> bool:
        return not await names(cluster)

    await eventually(all_freed)
    fresh = f"{crew.model}-fresh"
    await crew.start(WORKER_MODELS=fresh)
    assert (await cluster.post("/v1/chat/completions", chat(model=fresh), timeout=5.0)).status_code == 200


async def test_a_model_without_a_queue_is_refused_and_not_listed(
    cluster: Cluster, crew: Crew, eventually: Eventually
) -> None:
    """Where NATS takes no more queues: 503 at once, with the reason and when to come back; the others are served on."""

    async def all_freed() -> bool:
        return not await names(cluster)

    await eventually(all_freed)
    models = [f"{crew.model}-{number}" for number in range(MAX_QUEUES + 3)]
    await crew.start(WORKER_MODELS=",".join(models))
    for model in models[:MAX_QUEUES]:
        assert (await cluster.post("/v1/chat/completions", chat(model=model))).status_code == 200
    late = models[MAX_QUEUES:]
    for body in (chat(model=late[0]), chat(model=late[1], stream=True)):
        began = time.monotonic()
        refused = await cluster.post("/v1/chat/completions", body)
        assert time.monotonic() - began < 5.0
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"
        assert refused.json()["error"]["code"] == "no_queue"
    refused = await cluster.post("/v1/jobs", {"endpoint": "/v1/chat/completions", "body": chat(model=late[2])})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_queue")
    assert late[2] not in {job["model"] for job in (await cluster.get("/v1/jobs")).json()["data"]}
    shown = await listed(cluster)
    assert set(models[:MAX_QUEUES]) <= shown
    assert not shown & set(late)
    assert (await cluster.post("/v1/chat/completions", chat(model=models[0]))).status_code == 200
    await crew.stop()
    await eventually(all_freed)
    await crew.start(WORKER_MODELS=late[0])
    assert (await cluster.post("/v1/chat/completions", chat(model=late[0]))).status_code == 200
    assert late[0] in await listed(cluster)
