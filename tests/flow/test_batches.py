"""Batches on whole gateways, one of which dies."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.cluster import Cluster, Crew, chat
from tests.conftest import Eventually
from tests.servers import Process

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

CHAT = "/v1/chat/completions"


async def create(cluster: Cluster, url: str, lines: list[dict[str, Any]], window: str = "24h") -> str:
    """The id of a batch of chat requests."""
    text = "\n".join(
        json.dumps({"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": body})
        for number, body in enumerate(lines)
    )
    file = await cluster.http.post(
        url + "/v1/files", files={"file": ("in.jsonl", text.encode())}, data={"purpose": "batch"}
    )
    body = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": window}
    answer = await cluster.http.post(url + "/v1/batches", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


async def shown(cluster: Cluster, url: str, batch: str) -> dict[str, Any]:
    answer = await cluster.http.get(f"{url}/v1/batches/{batch}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def rows(cluster: Cluster, url: str, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    content = await cluster.http.get(f"{url}/v1/files/{file_id}/content")
    return [json.loads(line) for line in content.text.splitlines()]


async def two_gateways(cluster: Cluster) -> None:
    """Start a second gateway, unless an earlier test has."""
    if len(cluster.gateways) < 2:
        await cluster.start_gateway()


def runner_of(cluster: Cluster, batch: str) -> Process | None:
    """The living gateway that has taken a batch last."""
    for gateway in cluster.gateways:
        taken = [event for event in cluster.log_events(gateway) if event.get("event") == "batch.started"]
        if gateway.running and any(event["batch"] == batch for event in taken):
            return gateway
    return None


def another(cluster: Cluster, gateway: Process) -> str:
    """The URL of a living gateway that is not this one."""
    return next(
        url for one, url in zip(cluster.gateways, cluster.urls, strict=True) if one is not gateway and one.running
    )


def runs(cluster: Cluster, crew: Crew) -> Counter[str]:
    """How often each job was run, by the workers' logs."""
    return Counter(event["job"] for name in crew.names for event in cluster.attempts(name))


async def test_a_gateway_killed_in_the_middle_loses_and_repeats_nothing(
    cluster: Cluster, crew: Crew, eventually: Eventually
) -> None:
    """500 lines; the gateway that runs them is killed -9. Each line is run once and is once in the output, in order."""
    await crew.start_all(*["delay_ms=20,slots=8"] * 2)
    await two_gateways(cluster)
    lines = [chat(f"text {number}", model=crew.model) for number in range(500)]
    lines[250] = chat("wrong", model="nope")
    batch = await create(cluster, cluster.url, lines)
    victim = await eventually(lambda: runner_of(cluster, batch))
    url = another(cluster, victim)

    async def far_enough() -> bool:
        return bool((await shown(cluster, url, batch))["request_counts"]["completed"] >= 100)

    await eventually(far_enough, timeout_s=60)
    victim.kill()
    assert (await shown(cluster, url, batch))["status"] == "in_progress"

    async def done() -> dict[str, Any] | None:
        now = await shown(cluster, url, batch)
        return now if now["status"] == "completed" else None

    ended = await eventually(done, timeout_s=90)
    assert ended["request_counts"] == {"total": 500, "completed": 499, "failed": 1}
    output = await rows(cluster, url, ended["output_file_id"])
    assert [row["custom_id"] for row in output] == [f"r{number}" for number in range(500) if number != 250]
    for row in output:
        text = row["response"]["body"]["choices"][0]["message"]["content"]
        assert text == f"text {row['custom_id'].removeprefix('r')}"
    assert [row["custom_id"] for row in await rows(cluster, url, ended["error_file_id"])] == ["r250"]
    await eventually(lambda: len(runs(cluster, crew)) == 499)
    assert set(runs(cluster, crew).values()) == {1}
    files = (await cluster.http.get(url + "/v1/files?purpose=batch_output")).json()["data"]
    assert sorted(file["filename"] for file in files if batch in file["filename"]) == [
        f"{batch}_error.jsonl",
        f"{batch}_output.jsonl",
    ]
    await victim.start()


async def test_redis_emptied_in_the_middle(cluster: Cluster, crew: Crew, eventually: Eventually) -> None:
    """The batch is written down again, and ends with all its answers."""
    await crew.start_all("delay_ms=20,slots=4")
    url = cluster.url
    batch = await create(cluster, url, [chat(f"text {number}", model=crew.model) for number in range(100)])

    async def begun() -> bool:
        return bool((await shown(cluster, url, batch))["request_counts"]["completed"] >= 10)

    await eventually(begun)
    async with Redis.from_url(cluster.redis.url) as redis:
        await redis.flushall()

    async def done() -> dict[str, Any] | None:
        answer = await cluster.http.get(f"{url}/v1/batches/{batch}")
        return answer.json() if answer.json().get("status") == "completed" else None

    ended = await eventually(done, timeout_s=60)
    assert ended["request_counts"] == {"total": 100, "completed": 100, "failed": 0}
    assert len(await rows(cluster, url, ended["output_file_id"])) == 100
    assert set(runs(cluster, crew).values()) == {1}


async def test_a_gateway_that_is_stopped_hands_its_batches_over(
    cluster: Cluster, crew: Crew, eventually: Eventually
) -> None:
    """SIGTERM: another one goes on at once."""
    await crew.start_all("delay_ms=20,slots=4")
    await two_gateways(cluster)
    batch = await create(cluster, cluster.url, [chat("one two", model=crew.model) for number in range(100)])
    victim = await eventually(lambda: runner_of(cluster, batch))
    url = another(cluster, victim)
    await victim.stop(20)

    async def done() -> bool:
        return bool((await shown(cluster, url, batch))["status"] == "completed")

    await eventually(done, timeout_s=60)
    assert (await shown(cluster, url, batch))["request_counts"] == {"total": 100, "completed": 100, "failed": 0}
    assert set(runs(cluster, crew).values()) == {1}
    await victim.start()
