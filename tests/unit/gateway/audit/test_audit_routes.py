"""`/v1/audit` and its export over a real database, and the way of events into it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import pytest_asyncio

from backbone.bus.subjects import AUDIT_QUEUE
from backbone.ledger.access import LedgerAccess
from backbone.ledger.audit_store import AuditStore
from backbone.ledger.database import LedgerDatabase
from backbone.testing.bus import MemoryBroker
from backbone.testing.job_log import MemoryJobLog
from gateway.app import make_app
from gateway.audit import report
from gateway.audit.report import AuditReports
from gateway.audit.writer import AuditEmitter, AuditWriter
from gateway.auth.authenticator import Authenticator
from gateway.dependencies import Parts
from gateway.metrics import GatewayMetrics
from schemas.audit import FIELDS, AuditEvent
from tests.conftest import Eventually

TOKEN = "sk-test"
BEGAN_S = 1_793_491_200


def sample(number: int, **fields: Any) -> AuditEvent:
    values: dict[str, Any] = {
        "id": f"aud_{1000 * BEGAN_S + number:012x}{number:020x}", "at_ms": 1000 * BEGAN_S + number, "actor": "api_key", "team": "red",
        "key": "key_1", "action": "key.change", "target_type": "key", "target": "key_2", "address": "192.0.2.1", "request_id": "req_1", "status": 200,
    }  # fmt: skip
    return AuditEvent(**(values | fields))


class Gateway:
    def __init__(self, store: AuditStore | None) -> None:
        parts = SimpleNamespace(auth=Authenticator(TOKEN), audit=AuditReports(store))
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(make_app(cast("Parts", parts))),
            base_url="http://test",
            headers={"authorization": f"Bearer {TOKEN}"},
        )

    async def get(self, path: str = "/v1/audit", status: int = 200, **query: Any) -> Any:
        answer = await self.http.get(path, params=query)
        assert answer.status_code == status, answer.text
        if answer.headers["content-type"] == "application/json":
            return answer.json()
        return [json.loads(line) for line in answer.text.splitlines()]


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[AuditStore]:
    database = LedgerDatabase(LedgerAccess(sqlite_file=tmp_path / "ledger.db"))
    yield AuditStore(database)
    await database.close()


@pytest_asyncio.fixture
async def gateway(store: AuditStore) -> AsyncIterator[Gateway]:
    gateway = Gateway(store)
    async with gateway.http:
        yield gateway


async def test_pages_and_filters(gateway: Gateway, store: AuditStore) -> None:
    """Newest first, page by page, by every filter; the object says who, what, from where and with which result."""
    await store.store([
        sample(1, changes='{"max_open":{"old":3,"new":5}}', target_team="blue"),
        sample(2, action="team.create", status=403, error="permission_denied"),
        sample(3, action="key.refused", actor="nobody", team="", key="", status=401, error="invalid_api_key", count=9, address="192.0.2.9"),
        sample(4, status=0, person="anna"),
    ])  # fmt: skip
    first = await gateway.get(limit=3)
    rest = await gateway.get(limit=3, after=first["last_id"])
    assert [len(first["data"]), first["has_more"], len(rest["data"]), rest["has_more"]] == [3, True, 1, False]
    assert rest["data"] == [
        {
            "id": sample(1).id,
            "object": "audit_event",
            "sequence": 1,
            "created_at": BEGAN_S + 0.001,
            "actor": {"type": "api_key", "team": "red", "key": "key_1", "person": None},
            "action": "key.change",
            "target": {"type": "key", "id": "key_2", "team": "blue"},
            "address": "192.0.2.1",
            "request_id": "req_1",
            "result": "success",
            "status": 200,
            "error": None,
            "count": 1,
            "changes": {"max_open": {"old": 3, "new": 5}},
            "details": {},
        }
    ]
    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({"action": "key.*"}, [4, 3, 1]),
        ({"action": ["team.create", "key.refused"]}, [3, 2]),
        ({"result": "refused"}, [3, 2]),
        ({"result": "unknown,success"}, [4, 1]),
        ({"address": "192.0.2.9"}, [3]),
        ({"person": "anna"}, [4]),
        ({"target_team": "blue"}, [1]),
        ({"actor": "nobody", "error": "invalid_api_key"}, [3]),
        ({"start": BEGAN_S + 1}, []),
        ({"end": BEGAN_S + 1, "team": "red"}, [4, 2, 1]),
    ]
    for query, numbers in cases:
        found = (await gateway.get(**query))["data"]
        assert [one["id"] for one in found] == [sample(number).id for number in numbers], query


async def test_nonsense_is_refused(gateway: Gateway) -> None:
    """400 with the parameter's name."""
    cases = {
        "after": "x",
        "limit": "0",
        "action": "key",
        "result": "fine",
        "start": "soon",
        "who": "me",
        "request_id": "1",
    }
    for name, value in cases.items():
        assert (await gateway.get(status=400, **{name: value}))["error"]["param"] == name
    assert (await gateway.get("/v1/audit/export", status=400, limit="5"))["error"]["param"] == "limit"
    assert (await gateway.get("/v1/audit/export", status=400, after="x"))["error"]["param"] == "after"


async def test_an_export_continues(gateway: Gateway, store: AuditStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """All events as lines, over several reads; what came late, and a late result, are in the next export."""
    monkeypatch.setattr(report, "EXPORT_PAGE", 7)
    await store.store(
        [sample(number, status=0 if number == 3 else 200) for number in range(10, 40)] + [sample(3, status=0)]
    )
    lines = await gateway.get("/v1/audit/export")
    assert [line["id"] for line in lines] == [sample(number).id for number in (3, *range(10, 40))]
    await store.store([sample(3), sample(5)])
    more = await gateway.get("/v1/audit/export", after=lines[-1]["sequence"])
    assert [(line["id"], line["result"]) for line in more] == [(sample(3).id, "success"), (sample(5).id, "success")]
    assert await gateway.get("/v1/audit/export", after=more[-1]["sequence"]) == []


async def test_without_a_ledger_there_is_no_log() -> None:
    """404, and the reason."""
    async with Gateway(None).http as http:
        for path in ("/v1/audit", "/v1/audit/export"):
            assert (await http.get(path)).json()["error"]["code"] == "no_ledger"


async def test_events_reach_the_database(store: AuditStore, tmp_path: Path, eventually: Eventually) -> None:
    """From the journal over the queue, each once, also those of a gateway that was stopped while the queue was away; a malformed one is counted."""
    log = MemoryJobLog(MemoryBroker())
    queue, metrics = log.work_queue(AUDIT_QUEUE), GatewayMetrics()
    log.broker.available = False
    stopped = AuditEmitter(queue, tmp_path, metrics.audit_dropped.inc)
    stopped.emit(tuple(getattr(sample(1), name) for name in FIELDS))
    await stopped.close()
    log.broker.available = True
    emitter = AuditEmitter(queue, tmp_path, metrics.audit_dropped.inc)
    writer = AuditWriter(queue, store, metrics, keep_s=1e9)
    await emitter.start()
    await writer.start()
    for number in (2, 2, 3):
        emitter.emit(tuple(getattr(sample(number), name) for name in FIELDS))
    emitter.emit(("nonsense",))
    gateway = Gateway(store)
    async with gateway.http:

        async def all_there() -> bool:
            return len((await gateway.get())["data"]) == 3

        await eventually(all_there)
    await emitter.close()
    await writer.close()
    assert metrics.registry.get_sample_value("nexus_audit_rows_total") == 3
    assert metrics.registry.get_sample_value("nexus_audit_dropped_total") == 1
