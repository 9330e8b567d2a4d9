"""One gateway's clock is an hour off, beside a right one: nothing ends early or late, and what it stamps is right."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gateway.auth.authenticator import bootstrap_webhook_secret
from tests.cluster import KEY, ROOT, Cluster, Crew, chat
from tests.conftest import Eventually
from tests.crews import crew
from tests.faults.conftest import SETTINGS
from tests.flow.test_webhooks import Receiver, says
from tests.servers import Source, here

__all__ = ["crew"]
pytestmark = pytest.mark.asyncio(loop_scope="module")

RIGHT_S = 30.0
"""A stamp is right when it is this near; the machine is busy, and the fault is an hour."""
SHIFTED = Path(__file__).parent / "shifted"


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["3600", "-3600"], ids=["ahead", "behind"])
async def cluster(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest, servers: Source
) -> AsyncIterator[Cluster]:
    """The first gateway is right, the second is not."""
    if not servers.processes:
        pytest.skip("the clock is changed for a process of this machine")
    settings: dict[str, Any] = SETTINGS | {"WEBHOOK_PRIVATE_HOSTS": here()}
    async with Cluster(tmp_path_factory.mktemp("clocks"), **settings) as cluster:
        await cluster.start_gateway()
        path = os.pathsep.join((str(SHIFTED), str(ROOT)))
        await cluster.start_gateway(PYTHONPATH=path, NEXUS_TEST_CLOCK_AHEAD_S=request.param)
        yield cluster


RIGHT, WRONG = 0, 1


async def submit(cluster: Cluster, gateway: int, model: str, **more: Any) -> dict[str, Any]:
    body = {"endpoint": "/v1/chat/completions", "body": chat(model=model)} | more
    answer = await cluster.http.post(cluster.urls[gateway] + "/v1/jobs", json=body)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def poll(cluster: Cluster, gateway: int, job: str, wait: float = 0) -> dict[str, Any]:
    return dict((await cluster.http.get(f"{cluster.urls[gateway]}/v1/jobs/{job}?wait={wait}")).json())


def is_now(stamp: float) -> bool:
    return abs(stamp - time.time()) < RIGHT_S


@asynccontextmanager
async def receiver() -> AsyncIterator[Receiver]:
    got = Receiver()
    got.answers = [says("204 No Content")]
    server = await asyncio.start_server(got.serve, here(), 0)
    got.url = f"http://{here()}:{server.sockets[0].getsockname()[1]}/hook"
    async with server:
        yield got
        got.close()


async def test_the_operator_learns_of_it(cluster: Cluster, eventually: Eventually) -> None:
    """`/readyz` of the wrong one says by how much; the right one is ready."""
    parts = (await cluster.http.get(cluster.urls[WRONG] + "/readyz")).json()["parts"]
    assert not parts["clock"]["ok"]
    assert "3600" in parts["clock"]["error"] or "3599" in parts["clock"]["error"]
    assert (await cluster.get("/readyz")).json()["parts"]["clock"]["ok"]
    offsets = [event for event in cluster.log_events(cluster.gateways[WRONG]) if event["event"] == "clock.offset"]
    assert abs(abs(offsets[0]["ahead_s"]) - 3600) < RIGHT_S


async def test_no_job_expires_early_or_late(cluster: Cluster, crew: Crew, eventually: Eventually) -> None:
    """Jobs with a time-out, taken at either gateway while nobody serves them, wait as long as they may, and no longer."""
    await crew.start()
    waiting = [await submit(cluster, gateway, crew.model, timeout=600) for gateway in (RIGHT, WRONG)]
    for job in waiting:
        assert is_now(job["created_at"])
        assert is_now(job["expires_at"] - 600)
        assert (await poll(cluster, RIGHT, job["id"], wait=30))["status"] == "completed"
        ended = await poll(cluster, WRONG, job["id"])
        assert is_now(ended["finished_at"])
        assert ended["created_at"] <= ended["started_at"] <= ended["finished_at"] + 1
    slow = chat(model=crew.model, echo={"first_delay_ms": 60_000})
    short = [await submit(cluster, gateway, crew.model, body=slow, timeout=4) for gateway in (RIGHT, WRONG)]
    began = asyncio.get_running_loop().time()
    ends = await asyncio.gather(*(poll(cluster, 1 - at, job["id"], wait=30) for at, job in enumerate(short)))
    assert [end["status"] for end in ends] == ["expired", "expired"]
    assert 2.0 < asyncio.get_running_loop().time() - began < RIGHT_S


async def test_jobs_are_listed_in_the_order_in_which_they_came(cluster: Cluster, crew: Crew) -> None:
    """Ids hold the time at which they were made: those of both gateways sort as one."""
    await crew.start()
    made = []
    for turn in range(6):
        made.append((await submit(cluster, turn % 2, crew.model))["id"])
        await asyncio.sleep(0.05)  # ids tell milliseconds apart
    for url in cluster.urls:
        listed = (await cluster.http.get(f"{url}/v1/jobs?limit=100&model={crew.model}")).json()["data"]
        assert [job["id"] for job in listed] == made[::-1]


async def test_receivers_take_webhooks_of_either(cluster: Cluster, crew: Crew, eventually: Eventually) -> None:
    """The official library rejects stamps that are more than five minutes off: so many jobs that both gateways tell some."""
    await crew.start()
    jobs: list[str] = []

    def told_by(gateway: int) -> int:
        return sum(event["event"] == "webhook.attempted" for event in cluster.log_events(cluster.gateways[gateway]))

    async with receiver() as got:
        while not (told_by(RIGHT) and told_by(WRONG)):
            assert len(jobs) < 200, "one gateway tells of every job"
            jobs += [
                (await submit(cluster, turn % 2, crew.model, webhook={"url": got.url}))["id"] for turn in range(20)
            ]
            made = len(jobs)
            await eventually(lambda made=made: told_by(RIGHT) + told_by(WRONG) >= made)
        hooks = [message.verified(bootstrap_webhook_secret(KEY)) for message in got.got]
        assert {hook["data"]["id"] for hook in hooks} == set(jobs)
        for message in got.got:
            assert is_now(int(message.headers["webhook-timestamp"]))


async def test_keys_and_files_end_when_they_should(cluster: Cluster, eventually: Eventually) -> None:
    """What one gateway stamps, the other compares: a key for an hour, made at either, is good at both now."""
    for maker in (RIGHT, WRONG):
        body = {"name": f"clock-{maker}", "expires_in": 1800}
        made = await cluster.http.post(cluster.urls[maker] + "/v1/keys", json=body)
        assert made.status_code == 201, made.text
        assert is_now(made.json()["created_at"])
        assert is_now(made.json()["expires_at"] - 1800)
        headers = {"authorization": f"Bearer {made.json()['key']}"}

        async def good_at_both(headers: dict[str, str] = headers) -> bool:
            answers = [await cluster.http.get(url + "/v1/models", headers=headers) for url in cluster.urls]
            return all(answer.status_code == 200 for answer in answers)

        await eventually(good_at_both)
        upload: dict[str, Any] = {"data": {"purpose": "batch"}, "files": {"file": ("a.jsonl", b"{}\n")}}
        file = (await cluster.http.post(cluster.urls[maker] + "/v1/files", **upload)).json()
        assert is_now(file["created_at"])
        for url in cluster.urls:
            assert (await cluster.http.get(f"{url}/v1/files/{file['id']}/content")).status_code == 200
