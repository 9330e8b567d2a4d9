"""The request inspector: what is kept of an inspected team's requests, for how long, and who may read it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from backbone.testing.broadcast import MemoryBroadcast
from backbone.testing.documents import MemoryDocumentStore
from gateway.app import make_app
from gateway.auth.authenticator import Authenticator
from gateway.auth.key_store import KeyStore
from gateway.auth.team_store import TeamStore
from gateway.dependencies import Parts
from gateway.inspector import inspector as inspector_module
from gateway.inspector.inspector import Inspector
from gateway.inspector.redaction import CUT, MAX_READ_BYTES, describe_body, join_stream, redact
from gateway.routes.inspector import MAX_INSPECTED_TEAMS
from schemas.errors import BackendFailed
from schemas.inspection import Inspection
from schemas.jobs import Capability, Envelope, JobStatus
from schemas.keys import Scope
from schemas.outcome import outcome_of

KEY = "sk-test"
TEAM = "red"


class Gateway:
    """The routes, on a store without a server, with a clock of its own."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.documents = MemoryDocumentStore(lambda: self.seconds)
        self.keys = KeyStore(self.documents, MemoryBroadcast())
        self.auth = Authenticator(KEY, self.keys)
        self.inspector = Inspector(self.documents, self.keys.inspection, self.now)
        parts = SimpleNamespace(auth=self.auth, keys=self.keys, teams=TeamStore(self.keys), inspector=self.inspector)
        app = make_app(cast("Parts", parts))
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    def now(self) -> float:
        return self.start + self.seconds

    start = 1_000_000.0

    async def ask(self, method: str, path: str, key: str = KEY, **options: Any) -> Any:
        answer = await self.http.request(
            method, f"/v1/inspector{path}", headers={"authorization": f"Bearer {key}"}, **options
        )
        return answer.json() | {"status_code": answer.status_code}

    async def member(self, **fields: Any) -> str:
        """A new key of the team."""
        issued = await self.keys.create("member", owner=TEAM, scopes=[Scope.INFERENCE], **fields)
        return issued.key

    async def keep(self, number: int, inspection: Inspection, answer: bytes = b"{}", **fields: Any) -> str:
        """One request, answered at once. Its id."""
        body = json.dumps({"messages": [{"role": "user", "content": f"question {number}, api_key=hush-{number}"}]})
        opened = self.inspector.open(
            inspection, owner=TEAM, key="key_1", request_id=f"req_{number}", endpoint="/v1/chat/completions",
            body=body.encode(),
        )  # fmt: skip
        assert opened is not None
        opened.add_output(answer)
        job = f"job_{number:032x}"
        self.inspector.store(opened, job, "m", content_type="application/json", status=200, **fields)
        await self.inspector.close()
        self.seconds += 1
        return job


@pytest.fixture
async def gateway(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    gateway = Gateway()
    monkeypatch.setattr("gateway.clock.now", gateway.now)
    async with gateway.http:
        yield gateway


def inspection(gateway: Gateway, **fields: Any) -> Inspection:
    return Inspection(**({"until": int(gateway.now()) + 100, "max_requests": 3, "keep_s": 50} | fields))


async def test_the_newest_requests_are_kept_for_a_while(gateway: Gateway) -> None:
    """As many as asked for, newest first; the others are deleted at once, all of them after their time."""
    on = inspection(gateway)
    jobs = [await gateway.keep(number, on, queue_s=0.5) for number in range(5)]
    kept = await gateway.inspector.list_requests(TEAM)
    assert await gateway.inspector.list_requests("blue") == []
    assert kept == []  # nothing says any more that the team is inspected
    found = [await gateway.documents.get("inspected", TEAM, job) is not None for job in jobs]
    assert found == [False, False, True, True, True]
    one = await gateway.inspector.read(TEAM, jobs[4])
    assert (one.request_id, one.status, one.queue_s, one.answer) == ("req_4", 200, 0.5, "{}")
    assert "question 4, api_key=[redacted]" in one.request
    gateway.seconds += 60
    assert await gateway.documents.get("inspected", TEAM, jobs[4]) is None
    assert gateway.inspector.open(
        inspection(gateway, until=1), owner=TEAM, key="", request_id="", endpoint="", body=b""
    ) is None  # fmt: skip


async def test_open_requests_are_bounded(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A further one is answered as ever, and not kept; while the store is away, too."""
    monkeypatch.setattr(inspector_module, "MAX_OPEN", 1)
    on = inspection(gateway)
    call = {"owner": TEAM, "key": "", "request_id": "r", "endpoint": "e", "body": b""}
    opened = gateway.inspector.open(on, **call)  # type: ignore[arg-type]
    assert opened is not None
    assert gateway.inspector.open(on, **call) is None  # type: ignore[arg-type]
    gateway.documents.available = False
    gateway.inspector.store(opened, "job_1", "m")
    await gateway.inspector.close()
    assert gateway.inspector.open(on, **call) is not None  # type: ignore[arg-type]


@pytest.mark.parametrize("failed", [False, True])
async def test_a_durable_jobs_answer_is_added_at_its_end(gateway: Gateway, failed: bool) -> None:
    """It may come from another gateway, and after the inspection has ended."""
    on = inspection(gateway)
    await gateway.keys.teams.put(_team(on))
    job = await gateway.keep(1, on, durable=True)
    envelope = Envelope(
        job=job, owner=TEAM, endpoint="/v1/chat/completions", capability=Capability.CHAT, model="m", public_model="m", reply="a.b"
    )  # fmt: skip
    if failed:
        outcome = outcome_of(envelope, JobStatus.FAILED, error=BackendFailed().info, attempts=3)
    else:
        outcome = outcome_of(envelope, JobStatus.COMPLETED, worker="w", attempts=1, seconds=0.2, size=17)
    other = Inspector(gateway.documents, gateway.keys.inspection, gateway.now)
    other.record_outcome(outcome, b'{"secret": "abc"}', 0.2)
    await other.close()
    found = await gateway.ask("GET", f"/requests/{job}?team={TEAM}")
    if failed:
        assert (found["status"], found["error"], found["attempts"]) == (502, "backend_error", 3)
    else:
        assert (found["status"], found["answer"], found["worker"]) == (200, '{"secret": "[redacted]"}', "w")
    assert found["seconds"] == 1.0


def _team(on: Inspection | None, **fields: Any) -> Any:
    from schemas.keys import Team

    return Team(id=TEAM, created_at=1, inspection=on, **fields)


async def test_an_administrator_turns_it_on_for_a_time(gateway: Gateway) -> None:
    """The team sees it; its keys learn it; it ends by itself or at once, with all that was kept."""
    await gateway.keys.teams.put(_team(None))
    member = await gateway.member()
    assert (await gateway.ask("GET", "", member))["active"] is False
    on = await gateway.ask("PUT", f"/teams/{TEAM}", json={"duration_s": 60, "redact": ["ACME-*"]})
    assert (on["status_code"], on["active"], on["until"]) == (200, True, int(gateway.now()) + 60)
    assert "redact" not in on
    own = await gateway.ask("GET", "", member)
    assert (own["team"], own["active"]) == (TEAM, True)
    current = gateway.keys.inspection(TEAM)
    assert current is not None
    job = await gateway.keep(1, current, answer=b"the code is ACME-77")
    listed = await gateway.ask("GET", f"/requests?team={TEAM}")
    assert [(one["id"], one["request_id"], one["model"]) for one in listed["data"]] == [(job, "req_1", "m")]
    assert (await gateway.ask("GET", f"/requests/{job}?team={TEAM}"))["answer"] == "the code is [redacted]"
    assert (await gateway.ask("GET", f"/requests/{job}?team=blue"))["error"]["code"] == "inspected_request_not_found"
    for path in ("/teams", f"/requests?team={TEAM}", f"/requests/{job}?team={TEAM}"):
        assert (await gateway.ask("GET", path, member))["status_code"] == 403
    assert [one["team"] for one in (await gateway.ask("GET", "/teams"))["data"]] == [TEAM]
    await gateway.ask("DELETE", f"/teams/{TEAM}")
    assert (await gateway.ask("GET", "", member))["active"] is False
    assert (await gateway.ask("GET", f"/requests/{job}?team={TEAM}"))["status_code"] == 404


async def test_it_ends_by_itself(gateway: Gateway) -> None:
    """Without a further call."""
    await gateway.keys.teams.put(_team(inspection(gateway)))
    member = await gateway.member()
    gateway.seconds += 100
    assert (await gateway.ask("GET", "", member))["active"] is False
    assert (await gateway.ask("GET", "/teams"))["data"] == []


async def test_where_nothing_is_kept_nothing_is_inspected(gateway: Gateway) -> None:
    """Neither for a team with `retain: none`, nor for a key with it in a team that is inspected."""
    await gateway.keys.teams.put(_team(inspection(gateway)))
    private = await gateway.member(retain="none")
    assert (await gateway.ask("GET", "", private))["active"] is False
    await gateway.keys.teams.put(_team(None, retain="none", version=5))
    refused = await gateway.ask("PUT", f"/teams/{TEAM}", json={})
    assert (refused["status_code"], refused["error"]["code"]) == (400, "retention_not_allowed")


@pytest.mark.parametrize(
    "wrong",
    [{"duration_s": 0}, {"duration_s": 10**6}, {"max_requests": 201}, {"keep_s": "1"}, {"redact": ["*"]}, {"redact": ["a*b*c*d"]},
     {"redact": ["has blank"]}, {"unknown": 1}],
)  # fmt: skip
async def test_bad_settings_are_refused(gateway: Gateway, wrong: dict[str, Any]) -> None:
    await gateway.keys.teams.put(_team(None))
    assert (await gateway.ask("PUT", f"/teams/{TEAM}", json=wrong))["status_code"] == 400


async def test_few_teams_are_inspected_at_once(gateway: Gateway) -> None:
    """Their memory in Redis is bounded by that."""
    for number in range(MAX_INSPECTED_TEAMS):
        await gateway.keys.teams.put(_team(inspection(gateway)).model_copy(update={"id": f"team-{number}"}))
    await gateway.keys.teams.put(_team(None))
    assert (await gateway.ask("PUT", f"/teams/{TEAM}", json={}))["status_code"] == 400
    assert (await gateway.ask("PUT", "/teams/team-1", json={}))["status_code"] == 200


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ('{"api_key": "abc def", "max_tokens": 5}', '{"api_key": "[redacted]", "max_tokens": 5}'),
        (r'{"content":"{\"token\": \"zz\", \"a\": 1}"}', r'{"content":"{\"token\": \"[redacted]\", \"a\": 1}"}'),
        ('{"password":"a\\"b","y":2}', '{"password":"[redacted]","y":2}'),
        ("my password: hunter2, and more", "my password: [redacted], and more"),
        ("https://user:pw@host/x", "https://[redacted]@host/x"),
        ("use sk-abcdefgh12345 or ghp_abcdefgh12", "use [redacted] or [redacted]"),
        ("Authorization: Bearer abc.def", "Authorization: [redacted]"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIi.abc", "[redacted]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY----- x", "[redacted] x"),
        ('{"url":"data:image/png;base64,' + "A" * 400 + '"}', '{"url":"[base64, 422 characters]"}'),
        ("tokens are fine, the secretary too", "tokens are fine, the secretary too"),
    ],
)  # fmt: skip
def test_secrets_and_media_are_hidden(text: str, hidden: str) -> None:
    assert redact(text) == hidden


def test_a_stream_is_joined_before_it_is_searched() -> None:
    """A secret that came in two pieces is one text."""
    pieces: list[dict[str, Any]] = [
        {"delta": {"content": "sk-abc"}},
        {"delta": {"content": "defghijk"}, "finish_reason": "stop"},
    ]
    data = b"".join(b"data: %b\n\n" % json.dumps({"choices": [{"index": 0, **piece}]}).encode() for piece in pieces)
    joined = json.loads(join_stream(data + b"data: {broken\n\ndata: [DONE]\n\n"))
    assert joined["joined_stream"] == [{"index": 0, "content": "sk-abcdefghijk"}, {"index": 0, "finish_reason": "stop"}]
    assert b"sk-" not in redact(json.dumps(joined)).encode()


def test_large_and_binary_bodies_are_cut() -> None:
    """A cut leaves no half of a secret; other bodies are described."""
    body = b"x " * (MAX_READ_BYTES // 2 - 4) + b"sk-abcdefghijklmnop and more"
    text = describe_body(body, "application/json")
    assert text.endswith(CUT)
    assert "sk-" not in text
    assert describe_body(b"\xff" * 9, "audio/mpeg; x=1") == "[audio/mpeg, 9 bytes]"
