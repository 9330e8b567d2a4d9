"""The usage ledger under faults: requests never wait for it, and its sums are those of what was answered, whatever was killed."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import nats
import pytest
import pytest_asyncio
import redis.asyncio

from tests.cluster import Cluster, chat
from tests.conftest import Eventually
from tests.faults.conftest import SETTINGS
from tests.postgresql import PostgreSQL
from tests.servers import source

pytestmark = pytest.mark.skipif(
    not source().processes, reason="the gateways share a folder and a database with the test"
)


@pytest.fixture
def database() -> Iterator[PostgreSQL]:
    database = PostgreSQL()
    yield database
    database.remove()


@pytest_asyncio.fixture
async def counted(tmp_path: Path, database: PostgreSQL) -> AsyncIterator[Cluster]:
    settings = SETTINGS | {"LEDGER_URL": database.url, "USAGE_JOURNAL_DIR": str(tmp_path / "usage")}
    async with Cluster(tmp_path, **settings) as cluster:
        await cluster.start_gateway()
        await cluster.start_worker("echo")
        yield cluster


async def metric(cluster: Cluster, name: str, **labels: str) -> float:
    """The sum of a metric's samples with these labels."""
    text = (await cluster.http.get(f"{cluster.observability_url}/metrics")).text
    samples = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", text, re.MULTILINE)
    return sum(
        float(value) for found, value in samples if all(f'{key}="{one}"' in found for key, one in labels.items())
    )


async def rows(cluster: Cluster, group_by: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What `GET /v1/usage` says, by group."""
    answer = await cluster.http.get(f"{cluster.urls[0]}/v1/usage?group_by={group_by}")
    assert answer.status_code == 200, answer.text
    return {tuple(row[name] for name in group_by.split(",")): row for row in answer.json()["data"]}


async def test_an_outage_of_the_database(counted: Cluster, database: PostgreSQL, eventually: Eventually) -> None:
    """It is away from the start, comes, is killed, becomes read-only: every request succeeds, and in the end the ledger's sums are those of
    the job records and of the Prometheus counters, and each administrative call is in the audit log.
    """
    jobs: list[str] = []
    audited: set[str] = set()
    direct = 0

    async def requests() -> None:
        nonlocal direct
        answers = await asyncio.gather(
            *(counted.post("/v1/chat/completions", chat("one two three")) for _ in range(20)),
            *(counted.post("/v1/chat/completions", chat("one", echo={"fail": "error"})) for _ in range(3)),
        )
        assert Counter(answer.status_code == 200 for answer in answers) == {True: 20, False: 3}
        direct += len(answers)
        for number in range(6):
            body = chat("four five", echo={"fail": "error"} if number == 0 else {})
            made = await counted.post("/v1/jobs", {"endpoint": "/v1/chat/completions", "body": body})
            assert made.status_code == 202
            jobs.append(made.json()["id"])
        team = f"team-{direct}"
        changes = (
            await counted.post("/v1/teams", {"id": team}),
            await counted.http.delete(f"{counted.urls[0]}/v1/teams/{team}"),
        )
        assert all(one.is_success for one in changes)
        audited.update(one.headers["x-request-id"] for one in changes)

    async def is_down() -> bool:
        return await metric(counted, "nexus_ledger_up") == 0

    await requests()
    await eventually(is_down, what="the ledger is down")
    database.start()
    await requests()
    database.stop()
    await requests()
    database.start()
    database.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
    await requests()
    assert (await counted.http.get(f"{counted.urls[0]}/v1/jobs")).status_code == 200
    database.execute("ALTER DATABASE postgres SET default_transaction_read_only = off")
    database.stop()
    database.start()

    async def all_there() -> bool:
        answer = await counted.http.get(f"{counted.urls[0]}/v1/usage")
        return answer.status_code == 200 and sum(row["requests"] for row in answer.json()["data"]) == direct + len(jobs)

    await eventually(all_there, timeout_s=60, what="all requests in the ledger")

    async def all_audited() -> bool:
        events = (await counted.http.get(f"{counted.urls[0]}/v1/audit?limit=1000&action=team.*")).json()["data"]
        assert len({event["id"] for event in events}) == len(events)
        return audited == {event["request_id"] for event in events if event["result"] == "success"}

    await eventually(all_audited, timeout_s=60, what="all changes in the audit log")
    assert await metric(counted, "nexus_audit_dropped_total") == 0
    by_kind = await rows(counted, "durable,status")
    records = [(await counted.http.get(f"{counted.urls[0]}/v1/jobs/{job}")).json() for job in jobs]
    for status in ("completed", "failed"):
        ended = [record for record in records if record["status"] == status]
        row = by_kind[True, status]
        assert row["requests"] == len(ended) == await metric(counted, "nexus_jobs_ended_total", status=status)
        assert row["output_tokens"] == sum((record["usage"] or {}).get("completion_tokens", 0) for record in ended)
    assert by_kind[False, "completed"]["requests"] == await metric(
        counted, "nexus_requests_total", status="200", model="echo"
    )
    for name, kind in (("input_tokens", "prompt"), ("output_tokens", "completion")):
        assert sum(row[name] for row in by_kind.values()) == await metric(counted, "nexus_tokens_total", kind=kind)
    assert await metric(counted, "nexus_usage_dropped_total") == 0
    assert await metric(counted, "nexus_ledger_rows_total") == direct + len(jobs)


async def test_gateways_that_are_killed(tmp_path: Path, eventually: Eventually) -> None:
    """Each answer that a caller has received completely is one row, although the gateway is killed again and again among them; each
    change is in the audit log, with its result if its caller has got one. A budget whose requests were open at each kill, and which Redis
    has then lost, is what the ledger says.
    """
    file = tmp_path / "ledger.db"
    settings = SETTINGS | {"LEDGER_URL": f"sqlite:///{file}", "USAGE_JOURNAL_DIR": str(tmp_path / "usage")}
    answered: set[str] = set()
    changed: set[str] = set()
    stop = asyncio.Event()

    async def caller(cluster: Cluster, *, stream: bool, **options: Any) -> None:
        while not stop.is_set():
            try:
                answer = await cluster.post(
                    "/v1/chat/completions", chat("a b c", stream=stream, **options), headers=headers
                )
            except httpx.HTTPError:
                await asyncio.sleep(0.05)
                continue
            if answer.status_code == 200 and (not stream or answer.text.endswith("[DONE]\n\n")):
                answered.add(answer.headers["x-nexus-job-id"])

    async def operator(cluster: Cluster) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                answer = await cluster.post("/v1/teams", {"id": f"team-{number}"})
            except httpx.HTTPError:
                await asyncio.sleep(0.05)
                continue
            if answer.status_code == 201:
                changed.add(f"team-{number}")

    def recorded() -> set[str]:
        with closing(sqlite3.connect(file)) as ledger, suppress(sqlite3.OperationalError):
            return {team for (team,) in ledger.execute("SELECT target FROM audit_events WHERE status = 201")}
        return set()

    def stored() -> set[str]:
        with closing(sqlite3.connect(file)) as ledger, suppress(sqlite3.OperationalError):  # there is no table yet
            return {job for (job,) in ledger.execute("SELECT job FROM usage_runs WHERE status = 'completed'")}
        return set()

    async with Cluster(tmp_path, **settings) as cluster:
        gateway = await cluster.start_gateway()
        await cluster.start_worker("echo")
        headers = await _with_budget(cluster)
        callers = [asyncio.create_task(caller(cluster, stream=number % 2 == 0)) for number in range(6)]
        callers.append(
            asyncio.create_task(caller(cluster, stream=True, echo={"delay_ms": 50}))
        )  # reserves at each kill
        callers.append(asyncio.create_task(operator(cluster)))
        for kill in range(1, 3):
            count = len(answered)
            await eventually(lambda count=count: len(answered) > count + 20)
            gateway.kill()
            await gateway.wait()
            if kill < 2:
                await gateway.start()
        stop.set()
        await asyncio.gather(*callers)
        assert answered - stored(), "the kill left nothing to recover"
        await gateway.start()
        await eventually(lambda: answered <= stored(), timeout_s=60, what="every answer in the ledger")
        await eventually(lambda: changed <= recorded(), timeout_s=60, what="every change in the audit log")

        client = await nats.connect(cluster.nats.url)

        async def is_written() -> bool:
            """Also what no caller got the end of."""
            return not (await client.jetstream().stream_info("NEXUS_USAGE")).state.messages

        await eventually(is_written, timeout_s=60, what="nothing waits for the ledger")
        await client.close()
        gateway.kill()
        await gateway.wait()
        async with redis.asyncio.Redis.from_url(cluster.redis.url) as store:
            assert await store.delete(*[key async for key in store.scan_iter("nexus:budget:*")])
        await gateway.start()

        async def agrees() -> bool:
            [budget] = (await cluster.get("/v1/budgets", headers=headers)).json()["data"]
            [row] = (await cluster.get("/v1/usage", headers=headers)).json()["data"]
            return bool(0 < budget["spent"] == row["input_tokens"] + row["output_tokens"])

        await eventually(agrees, what="the budget agrees with the ledger")


async def _with_budget(cluster: Cluster) -> dict[str, str]:
    """The header of a key whose team has a budget."""
    budget = {"unit": "tokens", "amount": 10**9, "period": "month"}
    assert (await cluster.post("/v1/teams", {"id": "spenders", "budgets": [budget]})).status_code == 201
    key = (await cluster.post("/v1/keys", {"name": "spender", "owner": "spenders"})).json()["key"]
    return {"authorization": f"Bearer {key}"}
