"""A client of NATS with a worker's rights that was given no job: what it says of jobs is refused, counted, and in nobody's way."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import nats
import pytest
import pytest_asyncio
from nats.aio.client import Client

from backbone.ids import new_job_id
from schemas.frames import encode_frame
from tests.cluster import Cluster, Crew, chat
from tests.conftest import Eventually

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

HOOK = "http://127.0.0.1:9/"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def liar(cluster: Cluster) -> AsyncIterator[Client]:
    client = await nats.connect(cluster.nats.url)
    yield client
    await client.close()


async def refused(cluster: Cluster, kind: str) -> float:
    async with httpx.AsyncClient() as http:
        lines = (await http.get(cluster.observability_url + "/metrics")).text.splitlines()
    name = f'nexus_forgeries_refused_total{{kind="{kind}"}} '
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def outcome(job: str, model: str, **fields: Any) -> bytes:
    word = {
        "job": job, "status": "completed", "owner": "default", "endpoint": "/v1/chat/completions", "capability": "chat",
        "model": model, "public_model": model, "webhook": HOOK, "attempts": 1, "worker": "evil", "size": 12, "token": "t",
    }  # fmt: skip
    return json.dumps(word | fields).encode() + b'\n{"forged":1}'


@pytest.mark.parametrize(
    "data", [outcome("", "echo"), b"garbage", b"\n", b"{}\n"], ids=["word", "garbage", "line", "empty"]
)
async def test_a_job_that_never_was_is_none(
    cluster: Cluster, liar: Client, eventually: Eventually, data: bytes
) -> None:
    """It has no record and no result, and its webhook is not told; its subject is free again."""
    job = new_job_id()
    stored = await liar.request(f"nexus.done.{job}", data.replace(b'"job": ""', b'"job": "%b"' % job.encode()))
    assert b"seq" in stored.data
    hooks = (await liar.jetstream().stream_info("NEXUS_HOOKS")).state.messages

    async def is_free() -> bool:
        info = await liar.jetstream().stream_info("NEXUS_DONE", subjects_filter=f"nexus.done.{job}")
        return not info.state.subjects

    await eventually(is_free)
    for path in ("", "/result", "/events"):
        assert (await cluster.get(f"/v1/jobs/{job}{path}")).status_code == 404
    assert job not in (await cluster.get("/v1/jobs")).text
    assert (await liar.jetstream().stream_info("NEXUS_HOOKS")).state.messages == hooks
    assert b"forged" not in data or await refused(cluster, "outcome") >= 1  # an unreadable outcome is deleted uncounted


async def test_a_real_job_ends_by_its_own_worker(
    cluster: Cluster, crew: Crew, liar: Client, eventually: Eventually
) -> None:
    """A forged outcome that is there first is no outcome, whatever it copies of the job; nor are forged events told."""
    name = await crew.start()
    body = {
        "endpoint": "/v1/chat/completions",
        "body": chat("hello you", model=crew.model, echo={"first_delay_ms": 1500}),
    }
    job = (await cluster.post("/v1/jobs", body)).json()["id"]
    for delivery in range(1, 5):
        frame = encode_frame("s", 1, delivery, 0, f"evil{delivery}", b'{"worker":"evil","backend":"b"}')
        await liar.publish(f"nexus.events.{job}", frame)
    await liar.request(f"nexus.done.{job}", outcome(job, crew.model))

    async def ended() -> Any:
        record = (await cluster.get(f"/v1/jobs/{job}?wait=30")).json()
        return record if record["status"] not in {"queued", "in_progress"} else None

    record = await eventually(ended)
    assert (record["status"], record["worker"], record["attempts"]) == ("completed", name, 1)
    assert "hello" in (await cluster.get(f"/v1/jobs/{job}/result")).text
    events = (await cluster.get(f"/v1/jobs/{job}/events")).text
    assert "evil" not in events
    assert events.count("event: job.started") == 1
    assert await refused(cluster, "event") >= 4


async def test_a_job_that_waits_can_still_be_cancelled(cluster: Cluster, crew: Crew, liar: Client) -> None:
    """Though somebody has said that it completed."""
    await crew.start()
    body = {"endpoint": "/v1/chat/completions", "body": chat("hello", model=crew.model, echo={"fail": "hang"})}
    job = (await cluster.post("/v1/jobs", body)).json()["id"]
    await liar.request(f"nexus.done.{job}", outcome(job, crew.model))
    assert (await cluster.post(f"/v1/jobs/{job}/cancel", {})).json()["status"] == "cancelled"
    assert (await cluster.get(f"/v1/jobs/{job}")).json()["status"] == "cancelled"


async def test_a_webhook_that_no_gateway_asked_for_is_not_told(
    cluster: Cluster, liar: Client, eventually: Eventually
) -> None:
    """Also where it got into the gateways' own backlog."""
    before = await refused(cluster, "item")
    hook = {"owner": "default", "job": new_job_id(), "run": 1, "key": "", "url": HOOK, "body": "{}"}
    await liar.request(f"nexus.hooks.{hook['job']}-1", json.dumps(hook).encode())

    async def is_refused() -> bool:
        return await refused(cluster, "item") > before

    await eventually(is_refused)
