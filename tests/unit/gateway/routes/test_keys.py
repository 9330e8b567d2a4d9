"""`/v1/keys` as an operator uses it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from backbone.testing.broadcast import MemoryBroadcast
from backbone.testing.documents import MemoryDocumentStore
from gateway.app import make_app
from gateway.auth.authenticator import Authenticator, Principal
from gateway.auth.key_store import KeyStore
from gateway.auth.team_store import TeamStore
from gateway.dependencies import Parts
from gateway.http.asgi import SESSION
from gateway.routes.keys import MAX_TEAM_KEYS
from gateway.usage.report import UsageReports
from schemas.keys import LIMITS, Scope
from schemas.people import ROLE_SCOPES, Role

TOKEN = "sk-test"
BUDGET = {"unit": "tokens", "amount": 5, "period": "day"}
BEARER = {"authorization": f"Bearer {TOKEN}"}


class Gateway:
    """The routes, on a store without a server."""

    def __init__(self, signed_in: Principal | None = None) -> None:
        """`signed_in`: whose session the requests without a key have."""
        self.documents = MemoryDocumentStore()
        self.ring = KeyStore(self.documents, MemoryBroadcast())
        auth, teams = Authenticator(TOKEN, self.ring), TeamStore(self.ring)
        parts = SimpleNamespace(auth=auth, keys=self.ring, teams=teams, usage=UsageReports(None))
        app = make_app(cast("Parts", parts))

        async def with_session(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, SESSION: signed_in}, receive, send)

        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(with_session), base_url="http://test", headers=BEARER
        )

    async def ask(self, method: str, path: str = "/v1/keys", **options: Any) -> tuple[int, Any]:
        answer = await self.http.request(method, path, **options)
        return answer.status_code, answer.json()

    async def create(self, name: str = "alice", **fields: Any) -> dict[str, Any]:
        status, made = await self.ask("POST", json={"name": name} | fields)
        assert status == 201, made
        return dict(made)


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    async with gateway.http:
        yield gateway


async def test_made_shown_listed_and_revoked(gateway: Gateway) -> None:
    """The key and its webhook secret are in the first answer alone."""
    made = await gateway.create()
    key, secret = made.pop("key"), made.pop("webhook_secret")
    assert key.startswith("nexus-")
    assert secret.startswith("whsec_")
    assert made.pop("id").startswith("key_")
    assert abs(made.pop("created_at") - time.time()) < 10
    assert made == {
        "object": "api_key",
        "name": "alice",
        "owner": "alice",
        "person": None,
        "scopes": ["inference", "jobs"],
        **dict.fromkeys(LIMITS),
        "expires_at": None,
        "last_used_at": None,
        "replaced_until": None,
        "status": "active",
        "hint": key[-4:],
    }
    listed = await gateway.http.get("/v1/keys")
    assert key not in listed.text
    assert secret not in listed.text
    assert "hash" not in listed.text
    one = listed.json()["data"][0]
    assert one == made | {"id": one["id"], "created_at": one["created_at"]}
    path = f"/v1/keys/{one['id']}"
    assert await gateway.ask("GET", path) == (200, one | {"budget_usage": []})
    assert await gateway.ask("DELETE", path) == (200, {"id": one["id"], "object": "api_key", "deleted": True})
    for method in ("GET", "DELETE"):
        status, body = await gateway.ask(method, path)
        assert (status, body["error"]["code"]) == (404, "key_not_found")
    assert await gateway.ask("GET") == (200, {"object": "list", "data": []})


async def test_everything_can_be_said(gateway: Gateway) -> None:
    """Owner, scopes, limits, and either kind of end."""
    made = await gateway.create(
        owner="team A", scopes=["admin", "jobs", "admin"], max_queued=0, max_running=1, expires_in=0.5
    )
    assert (made["owner"], made["scopes"]) == ("team A", ["admin", "jobs"])
    assert (made["max_queued"], made["max_running"]) == (0, 1)
    assert 0 < made["expires_at"] - time.time() <= 2
    end = int(time.time()) + 1000
    assert (await gateway.create("bob", expires_at=end))["expires_at"] == end


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": " x"}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"name": None}, "name"),
        ({"name": "default"}, "name"),
        ({"owner": ""}, "owner"),
        ({"owner": "a\tb"}, "owner"),
        ({"scopes": []}, "scopes"),
        ({"scopes": "jobs"}, "scopes"),
        ({"scopes": ["root"]}, "scopes.0"),
        ({"max_queued": -1}, "max_queued"),
        ({"max_queued": "5"}, "max_queued"),
        ({"max_queued": True}, "max_queued"),
        ({"max_running": 0}, "max_running"),
        ({"max_running": 10**7}, "max_running"),
        ({"expires_in": 0}, "expires_in"),
        ({"expires_in": "30d"}, "expires_in"),
        ({"expires_in": 1e12}, "expires_in"),
        ({"expires_at": 1}, "expires_at"),
        ({"expires_at": 10**15}, "expires_at"),
        ({"expires_at": 4_000_000_000, "expires_in": 5}, "expires_in"),
        ({"max_queue": 5}, "max_queue"),
        ({"models": []}, "models"),
        ({"models": ["*" * 9]}, "models.0"),
        ({"models": ["a\n"]}, "models.0"),
        ({"lanes": ["fast"]}, "lanes.0"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"requests_per_minute": 1.5}, "requests_per_minute"),
        ({"tokens_per_minute": -1}, "tokens_per_minute"),
        ({"max_open": 0}, "max_open"),
        ({"max_stored_bytes": "1G"}, "max_stored_bytes"),
        ({"max_batches": -1}, "max_batches"),
        ({"max_webhooks": 0}, "max_webhooks"),
        ({"budgets": {}}, "budgets"),
        ({"budgets": [{"unit": "tokens", "period": "day"}]}, "budgets.0.amount"),
        ({"budgets": [BUDGET | {"amount": 0}]}, "budgets.0.amount"),
        ({"budgets": [BUDGET | {"amount": "5"}]}, "budgets.0.amount"),
        ({"budgets": [BUDGET | {"amount": 1e13}]}, "budgets.0.amount"),
        ({"budgets": [BUDGET | {"amount": 0.5}]}, "budgets.0.amount"),
        ({"budgets": [BUDGET, BUDGET | {"unit": "apples"}]}, "budgets.1.unit"),
        ({"budgets": [BUDGET | {"period": "year"}]}, "budgets.0.period"),
        ({"budgets": [BUDGET | {"warn_at": 80}]}, "budgets.0.warn_at"),
        ({"budgets": [BUDGET | {"warn_at": 0}]}, "budgets.0.warn_at"),
        ({"budgets": [BUDGET | {"until": 1}]}, "budgets.0.until"),
        ({"budgets": [BUDGET, BUDGET | {"amount": 6}]}, "budgets"),
        ({"budgets": [BUDGET]}, "budgets"),  # there is no ledger
        ({"budget_webhook": ""}, "budget_webhook"),
        ({"networks": ["10.0.0.0/33"]}, "networks.0"),
        ({"networks": ["10.0.0.0/8", "2001:db8::1/128"]}, "networks.1"),
        ({"key": "nexus-mine"}, "key"),
    ],
)
async def test_a_wrong_wish_is_refused(gateway: Gateway, fields: dict[str, Any], param: str) -> None:
    """400, with the field that is wrong; no key is made."""
    status, body = await gateway.ask("POST", json={"name": "alice"} | fields)
    assert (status, body["error"]["type"], body["error"]["param"]) == (400, "invalid_request_error", param)
    assert (await gateway.ask("GET"))[1]["data"] == []


async def test_who_may_not_is_refused_before_the_body_is_read(gateway: Gateway) -> None:
    """401 without a valid key, 403 without the scope; the message names the missing scope."""
    made = await gateway.create()
    for headers, status in [
        ({"authorization": ""}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": f"Bearer {made['key']}"}, 403),
        (BEARER, 400),
    ]:
        assert (await gateway.ask("POST", headers=headers, content=b"{ not json"))[0] == status
    status, body = await gateway.ask("GET", headers={"authorization": f"Bearer {made['key']}"})
    assert (status, body["error"]["type"]) == (403, "permission_error")
    assert "'admin:keys'" in body["error"]["message"]


async def test_an_admin_key_makes_keys(gateway: Gateway) -> None:
    """Until it is revoked, by itself if need be."""
    admin = await gateway.create("root", scopes=["admin"])
    bearer = {"authorization": f"Bearer {admin['key']}"}
    assert (await gateway.ask("POST", headers=bearer, json={"name": "bob"}))[0] == 201
    assert (await gateway.ask("DELETE", f"/v1/keys/{admin['id']}", headers=bearer))[0] == 200
    status, body = await gateway.ask("GET", headers=bearer)
    assert (status, body["error"]["code"], body["error"]["message"]) == (
        401,
        "invalid_api_key",
        "This API key was revoked. Ask the operator of this gateway for another one.",
    )


async def test_an_expired_key_is_listed_as_such(gateway: Gateway) -> None:
    """So that an operator sees why it does not open any more."""
    made = await gateway.create(expires_in=100)
    gateway.ring._index._clock = lambda: time.time() + 101
    status, body = await gateway.ask("GET", headers={"authorization": f"Bearer {made['key']}"})
    assert (status, body["error"]["message"]) == (
        401,
        "This API key has expired. Ask the operator of this gateway for another one.",
    )


async def test_without_the_store_is_503(gateway: Gateway) -> None:
    """Nobody may believe that a key was made or ended; a list could be old."""
    made = await gateway.create()
    gateway.documents.available = False
    for method, path, options in [
        ("POST", "/v1/keys", {"json": {"name": "bob"}}),
        ("GET", "/v1/keys", {}),
        ("GET", f"/v1/keys/{made['id']}", {}),
        ("DELETE", f"/v1/keys/{made['id']}", {}),
    ]:
        status, body = await gateway.ask(method, path, **options)
        assert (status, body["error"]["code"]) == (503, "unavailable")


async def test_a_key_is_changed_and_rotated(gateway: Gateway) -> None:
    """Fields that are left out stay; null removes a limit; a rotation shows the new key once."""
    made = await gateway.create(max_queued=5, models=["llama*"], expires_in=1000)
    path = f"/v1/keys/{made['id']}"
    changed = {"max_queued": None, "networks": ["10.1.2.3/8"], "expires_at": None, "scopes": ["jobs"], "name": "bob"}
    status, body = await gateway.ask("PATCH", path, json=changed)
    assert (status, body["max_queued"], body["networks"], body["models"]) == (200, None, ["10.0.0.0/8"], ["llama*"])
    assert (body["expires_at"], body["scopes"], body["name"]) == (None, ["jobs"], "bob")
    status, body = await gateway.ask("POST", path + "/rotate", json={"overlap_s": 0})
    assert (status, body["id"]) == (200, made["id"])
    assert body["key"] != made["key"]
    assert "key" not in (await gateway.ask("GET", path))[1]
    for field, value in [("overlap_s", -1), ("overlap_s", 10**9), ("scopes", [])]:
        verb, where = ("PATCH", path) if field == "scopes" else ("POST", path + "/rotate")
        status, body = await gateway.ask(verb, where, json={field: value})
        assert (status, body["error"]["param"]) == (400, field)


async def test_no_key_makes_a_more_powerful_one(gateway: Gateway) -> None:
    """`admin:keys` manages keys of users and of its own power, and no other administrative key."""
    admin = await gateway.create("root", scopes=["admin"])
    manager = await gateway.create("manager", scopes=["admin:keys"])
    bearer = {"authorization": f"Bearer {manager['key']}"}
    assert (await gateway.ask("POST", headers=bearer, json={"name": "u"}))[0] == 201
    assert (await gateway.ask("GET", "/v1/workers", headers=bearer))[0] == 403
    path = f"/v1/keys/{admin['id']}"
    refused = [
        await gateway.ask("POST", headers=bearer, json={"name": "x", "scopes": ["admin:operate"]}),
        await gateway.ask("PATCH", path, headers=bearer, json={"max_open": 1}),
        await gateway.ask("POST", path + "/rotate", headers=bearer, json={}),
        await gateway.ask("DELETE", path, headers=bearer),
    ]
    assert [status for status, _ in refused] == [403] * 4


async def test_what_becomes_of_jobs_is_keep_or_cancel(gateway: Gateway) -> None:
    """`jobs` says what becomes of the key's jobs: they are kept unless it says `cancel`."""
    made = await gateway.create()
    status, body = await gateway.ask("DELETE", f"/v1/keys/{made['id']}?jobs=burn")
    assert (status, body["error"]["param"]) == (400, "jobs")


async def test_teams(gateway: Gateway) -> None:
    """A team is made by its first key, or by itself; its limits change; it is deleted without keys."""
    key = await gateway.create(owner="a/b")
    status, body = await gateway.ask("GET", "/v1/teams")
    assert (status, [team["id"] for team in body["data"]]) == (200, ["a/b", "default"])
    status, body = await gateway.ask("POST", "/v1/teams", json={"id": "new", "lanes": ["priority"]})
    assert (status, body["lanes"], body["effective_limits"]["lanes"]) == (201, ["priority"], ["priority"])
    assert (await gateway.ask("POST", "/v1/teams", json={"id": "new"}))[1]["error"]["param"] == "id"
    assert (await gateway.ask("POST", "/v1/teams", json={"id": ""}))[1]["error"]["param"] == "id"
    assert (await gateway.ask("PATCH", "/v1/teams/a%2Fb", json={"max_open": 0}))[1]["error"]["param"] == "max_open"
    status, body = await gateway.ask("PATCH", "/v1/teams/a%2Fb", json={"max_open": 3})
    assert (status, body["max_open"]) == (200, 3)
    assert [bound.most for bound in gateway.ring.find(key["key"].encode()).limits.open] == [3]
    assert (await gateway.ask("DELETE", "/v1/teams/a%2Fb"))[1]["error"]["code"] == "team_has_keys"
    await gateway.ask("DELETE", f"/v1/keys/{key['id']}")
    assert (await gateway.ask("DELETE", "/v1/teams/a%2Fb"))[0] == 200
    assert (await gateway.ask("GET", "/v1/teams/a%2Fb"))[1]["error"]["code"] == "team_not_found"
    assert (await gateway.ask("POST", "/v1/teams", json={"id": "a/b"}))[0] == 201


@pytest.mark.parametrize("role", [Role.MEMBER, Role.OPERATOR])
async def test_a_member_manages_the_keys_of_the_team_alone(role: Role) -> None:
    """Those of other teams are not there, those with power are not theirs, and a team has a bounded number."""
    gateway = Gateway(Principal("vision", "person_1", scopes=ROLE_SCOPES[role], person="person_1", role=role))
    async with gateway.http:
        other = await gateway.create("other")
        strong = await gateway.create("strong", owner="vision", scopes=["admin:read", "jobs"])
        del gateway.http.headers["authorization"]
        own = await gateway.create("own", max_open=3)
        assert (own["owner"], own["person"]) == ("vision", "person_1")
        listed = (await gateway.ask("GET"))[1]["data"]
        assert {key["id"] for key in listed} == {own["id"], strong["id"]}
        for path in (f"/v1/keys/{other['id']}", f"/v1/keys/{other['id']}/rotate"):
            status, _ = await gateway.ask("POST" if path.endswith("rotate") else "GET", path, json={})
            assert status == 404
        for method, path, body in (
            ("POST", f"/v1/keys/{strong['id']}/rotate", {}),
            ("PATCH", f"/v1/keys/{strong['id']}", {"name": "mine"}),
            ("DELETE", f"/v1/keys/{strong['id']}", None),
            ("PATCH", f"/v1/keys/{own['id']}", {"scopes": ["admin:read"]}),
            ("POST", "/v1/keys", {"name": "x", "scopes": ["admin:operate"]}),
            ("POST", "/v1/keys", {"name": "x", "owner": "other"}),
        ):
            status, answer = await gateway.ask(method, path, json=body)
            assert (status, answer["error"]["type"]) == (403, "permission_error"), path
        for number in range(MAX_TEAM_KEYS - 2):
            await gateway.ring.create(f"k{number}", owner="vision", scopes=[Scope.JOBS])
        status, answer = await gateway.ask("POST", json={"name": "one more"})
        assert (status, str(MAX_TEAM_KEYS) in answer["error"]["message"]) == (400, True)
        assert (await gateway.ask("DELETE", f"/v1/keys/{own['id']}"))[0] == 200
        assert (await gateway.ask("POST", json={"name": "one more"}))[0] == 201


async def test_a_viewer_has_no_keys() -> None:
    gateway = Gateway(Principal("vision", "person_1", scopes=ROLE_SCOPES[Role.VIEWER], role=Role.VIEWER))
    async with gateway.http:
        del gateway.http.headers["authorization"]
        status, answer = await gateway.ask("GET")
        assert (status, "viewer" in answer["error"]["message"]) == (403, True)
