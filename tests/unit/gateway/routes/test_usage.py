"""`/v1/usage` and OpenAI's routes of usage, over a real ledger."""

from __future__ import annotations

import csv
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import pytest_asyncio

from backbone.ledger.access import LedgerAccess
from backbone.ledger.database import LedgerDatabase
from backbone.ledger.usage_ledger import UsageLedger
from backbone.ledger.usage_query import PricedEvent
from gateway.app import make_app
from gateway.auth.authenticator import Principal
from gateway.dependencies import Parts
from gateway.usage.organization import KINDS
from gateway.usage.report import UsageReports
from schemas.keys import Scope
from tests.unit.gateway.usage.sample import BEGAN_MS, HOUR_MS, event

DAY_S = 86_400
DAY = BEGAN_MS // 1000 // DAY_S * DAY_S
WHOLE: dict[str, Any] = {"start": str(DAY), "end": str(DAY + 3 * DAY_S)}
EVENTS = [
    PricedEvent(event(1, cached_tokens=40, bytes_in=7), 100, "usd"),
    PricedEvent(event(2, team="blue", key="key_2", lane="flex", batch=True, durable=True), 200, "usd"),
    PricedEvent(event(3, status="failed", error="worker_lost", input_tokens=0, output_tokens=0), 0, "usd"),
    PricedEvent(event(4, endpoint="/v1/images/generations", capability="images", model="sd", images=3, image_size="64x64"), 60, "usd"),
    PricedEvent(event(5, endpoint="/v1/audio/transcriptions", capability="transcriptions", model="whisper", audio_ms=2500), 0, "usd"),
    PricedEvent(event(6, endpoint="/v1/audio/speech", capability="speech", model="piper", characters=11), 0, "usd"),
    PricedEvent(event(7, finished_ms=BEGAN_MS + 24 * HOUR_MS), 100, "usd"),
]  # fmt: skip


class Authenticator:
    """Takes the owner of the key for its name."""

    def authenticate(self, scope: Any) -> Principal:
        name = dict(scope["headers"])[b"authorization"].decode().removeprefix("Bearer ")
        return Principal(name, scopes=frozenset(Scope) if name == "root" else frozenset({Scope.INFERENCE}))


class Gateway:
    def __init__(self, ledger: UsageLedger | None) -> None:
        self.ledger = ledger
        parts = SimpleNamespace(auth=Authenticator(), usage=UsageReports(ledger))
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(make_app(cast("Parts", parts))), base_url="http://test"
        )

    async def get(self, path: str, caller: str = "root", status: int = 200, **query: Any) -> Any:
        answer = await self.http.get(path, params=query, headers={"authorization": f"Bearer {caller}"})
        assert answer.status_code == status, answer.text
        return answer.json() if answer.headers["content-type"] == "application/json" else answer.text


@pytest_asyncio.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    ledger = UsageLedger(LedgerDatabase(LedgerAccess(sqlite_file=tmp_path / "ledger.db")))
    await ledger.store(EVENTS)
    gateway = Gateway(ledger)
    async with gateway.http:
        yield gateway
    await ledger.close()


async def test_sums_by_group(gateway: Gateway) -> None:
    """Groups and measures, with money as numbers."""
    found = await gateway.get("/v1/usage", **WHOLE, group_by="team,status", bucket="day")
    rows = {(row["start"], row["team"], row["status"]): row for row in found["data"]}
    assert sorted(rows) == [
        (DAY, "blue", "completed"), (DAY, "red", "completed"), (DAY, "red", "failed"), (DAY + DAY_S, "red", "completed"),
    ]  # fmt: skip
    assert (found["object"], found["bucket"], found["group_by"], found["has_more"]) == (
        "usage",
        "day",
        ["team", "status"],
        False,
    )
    red = rows[DAY, "red", "completed"]
    assert (red["requests"], red["cached_tokens"], red["images"], red["audio_seconds"], red["characters"]) == (
        4,
        40,
        3,
        2.5,
        11,
    )
    assert (red["slot_seconds"], red["bytes_in"], red["cost"]) == (8.0, 7, {"value": 1.6e-07, "currency": "usd"})


async def test_a_team_sees_itself(gateway: Gateway) -> None:
    """An ordinary key counts its own team, and is refused another's, in both shapes."""
    own = await gateway.get("/v1/usage", "blue", **WHOLE, group_by="team")
    assert [(row["team"], row["requests"]) for row in own["data"]] == [("blue", 1)]
    await gateway.get("/v1/usage", "blue", status=403, team="red")
    page = await gateway.get("/v1/organization/usage/completions", "blue", start_time=DAY, end_time=DAY + DAY_S)
    assert page["data"][0]["results"][0]["num_model_requests"] == 1
    await gateway.get("/v1/organization/costs", "blue", status=403, start_time=DAY, project_ids="red")
    assert (await gateway.get("/v1/usage", "nobody", **WHOLE))["data"] == []


async def test_pages(gateway: Gateway) -> None:
    """`next_page` leads to the rest, and the last page says so."""
    pages = []
    query = WHOLE | {"group_by": "model,team,status", "limit": "2"}
    while True:
        found = await gateway.get("/v1/usage", **query)
        pages.append(len(found["data"]))
        if not found["has_more"]:
            break
        query["page"] = found["next_page"]
    assert pages == [2, 2, 2]
    assert found["next_page"] is None


async def test_csv(gateway: Gateway) -> None:
    """The same numbers as a table, whose cells no spreadsheet runs."""
    assert gateway.ledger is not None
    await gateway.ledger.store([PricedEvent(event(9, model="=cmd()"), 0, "usd")])
    text = await gateway.get("/v1/usage", **WHOLE, group_by="model", bucket="day", format="csv")
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["model"] for row in rows] == ["'=cmd()", "piper", "sd", "smollm2", "whisper", "smollm2"]
    assert rows[2]["start"].endswith("T00:00:00Z")
    assert (rows[2]["images"], float(rows[2]["cost"]), rows[2]["currency"]) == ("3", 6e-08, "usd")
    accepted = await gateway.http.get("/v1/usage", headers={"accept": "text/csv", "authorization": "Bearer root"})
    assert accepted.headers["content-type"].startswith("text/csv")


async def test_openai_completions(gateway: Gateway) -> None:
    """Buckets of days, the empty ones too, with OpenAI's names; what is not grouped by is null; failures do not count."""
    query: dict[str, Any] = {"start_time": DAY, "end_time": DAY + 3 * DAY_S, "group_by[]": ["project_id", "batch"]}
    page = await gateway.get("/v1/organization/usage/completions", **query)
    assert [(one["start_time"], len(one["results"])) for one in page["data"]] == [
        (DAY, 2),
        (DAY + DAY_S, 1),
        (DAY + 2 * DAY_S, 0),
    ]
    assert page["data"][0]["results"][1] == {
        "object": "organization.usage.completions.result", "input_tokens": 100, "output_tokens": 10, "input_cached_tokens": 40,
        "input_audio_tokens": 0, "output_audio_tokens": 0, "num_model_requests": 1, "project_id": "red", "user_id": None,
        "api_key_id": None, "model": None, "batch": False, "service_tier": None,
    }  # fmt: skip
    only = await gateway.get("/v1/organization/usage/completions", **query, batch="true")
    assert [result["project_id"] for one in only["data"] for result in one["results"]] == ["blue"]


async def test_openai_other_kinds(gateway: Gateway) -> None:
    """Each kind has its own measures, and counts its own requests alone."""
    measures = {}
    for kind in KINDS:
        page = await gateway.get(f"/v1/organization/usage/{kind}", start_time=DAY, end_time=DAY + DAY_S)
        measures[kind] = [result for one in page["data"] for result in one["results"]]
    assert measures["images"][0]["images"] == 3
    assert measures["audio_speeches"][0]["characters"] == 11
    assert measures["audio_transcriptions"][0]["seconds"] == 2
    assert measures["embeddings"] == measures["moderations"] == []
    sizes = await gateway.get(
        "/v1/organization/usage/images", start_time=DAY, end_time=DAY + DAY_S, group_by="size", sizes="64x64"
    )
    assert sizes["data"][0]["results"][0]["size"] == "64x64"


async def test_openai_pages_and_widths(gateway: Gateway) -> None:
    """A page holds `limit` buckets; the next one begins where it ended. Hours and minutes work as days do."""
    first = await gateway.get("/v1/organization/usage/completions", start_time=DAY, end_time=DAY + 2 * DAY_S, limit=1)
    assert (len(first["data"]), first["has_more"], first["next_page"]) == (1, True, str(DAY + DAY_S))
    second = await gateway.get(
        "/v1/organization/usage/completions", start_time=DAY, end_time=DAY + 2 * DAY_S, limit=1, page=first["next_page"]
    )
    assert (second["data"][0]["results"][0]["num_model_requests"], second["has_more"]) == (1, False)
    began = BEGAN_MS // 1000
    for width, seconds in (("1h", 3600), ("1m", 60)):
        page = await gateway.get(
            "/v1/organization/usage/completions", start_time=began, end_time=began + seconds, bucket_width=width
        )
        assert page["data"][0]["results"][0]["num_model_requests"] == 2


async def test_openai_costs(gateway: Gateway) -> None:
    """Money by day and model, with its currency."""
    page = await gateway.get("/v1/organization/costs", start_time=DAY, end_time=DAY + DAY_S, group_by="line_item")
    assert {result["line_item"]: result["amount"] for result in page["data"][0]["results"]}["sd"] == {
        "value": 6e-08,
        "currency": "usd",
    }


@pytest.mark.parametrize(
    ("path", "query", "param"),
    [
        ("/v1/usage", {"group_by": "color"}, "group_by"),
        ("/v1/organization/usage/completions", {}, "start_time"),
        ("/v1/organization/usage/completions", {"start_time": 1, "bucket_width": "1w"}, "bucket_width"),
        ("/v1/organization/usage/completions", {"start_time": 1, "limit": 32}, "limit"),
        ("/v1/organization/usage/embeddings", {"start_time": 1, "group_by": "batch"}, "group_by"),
        ("/v1/organization/usage/embeddings", {"start_time": 1, "batch": "true"}, "batch"),
        ("/v1/organization/usage/completions", {"start_time": 1, "batch": "perhaps"}, "batch"),
        ("/v1/organization/usage/completions", {"start_time": 5, "end_time": 5}, "start_time"),
        ("/v1/organization/costs", {"start_time": 1, "bucket_width": "1h"}, "bucket_width"),
        ("/v1/organization/costs", {"start_time": 1, "page": "x"}, "page"),
    ],
)
async def test_nonsense_is_400(gateway: Gateway, path: str, query: dict[str, Any], param: str) -> None:
    """The wrong parameter is named."""
    assert (await gateway.get(path, status=400, **query))["error"]["param"] == param


async def test_without_a_ledger() -> None:
    """A gateway without a ledger says so, whatever is asked."""
    gateway = Gateway(None)
    async with gateway.http:
        for path in (
            "/v1/usage?limit=0",
            "/v1/organization/costs",
            *(f"/v1/organization/usage/{kind}" for kind in KINDS),
        ):
            assert (await gateway.get(path, status=404))["error"]["code"] == "no_ledger"
