"""What the audit log records of routes, changes and refused keys, and what it never holds."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from backbone.settings import PUBLIC_ROUTES
from backbone.testing.broadcast import MemoryBroadcast
from backbone.testing.documents import MemoryDocumentStore
from backbone.testing.registry import MemoryHub, MemoryRegistry
from gateway.app import make_app
from gateway.audit.actions import ROUTES, action_of
from gateway.audit.audit_log import MAX_REFUSALS, AuditLog
from gateway.audit.events import Actor
from gateway.audit.summaries import WINDOW_S
from gateway.auth.authenticator import PREFIX, Authenticator
from gateway.auth.guess_limiter import KeyGuessLimiter
from gateway.auth.key_store import KeyStore
from gateway.auth.team_store import TeamStore
from gateway.dependencies import Parts
from gateway.http.asgi import CALLER_INFO, REQUEST_ID, Caller
from gateway.model_catalog import ModelCatalog
from gateway.routes.keys import audited_key
from gateway.routes.teams import audited_team
from gateway.usage.events import Values
from schemas.audit import FIELDS, ActorKind, AuditEvent
from schemas.errors import AuthenticationFailed
from schemas.keys import ApiKey, Scope, Team

TOKEN = "sk-bootstrap-secret"


class Gateway:
    """The administrative routes on stores without a server, and the events that were emitted."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.events: list[AuditEvent] = []
        self.log = AuditLog(self.take, secret=TOKEN, clock=lambda: self.clock)
        self.keys = KeyStore(MemoryDocumentStore(), MemoryBroadcast())
        self.auth = Authenticator(TOKEN, self.keys, KeyGuessLimiter(1000))
        self.auth.on_refused = self.log.record_refusal
        registry = MemoryRegistry(MemoryHub())
        self.registry = registry
        catalog = ModelCatalog()
        registry.subscribe(catalog.load)
        parts = SimpleNamespace(
            auth=self.auth,
            keys=self.keys,
            teams=TeamStore(self.keys),
            dispatcher=SimpleNamespace(registry=registry, catalog=catalog),
        )
        self.app = make_app(cast("Parts", parts), PUBLIC_ROUTES, audit_log=self.log)
        self.address = "192.0.2.1"
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self._serve, raise_app_exceptions=False), base_url="http://test"
        )

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        """Do what the connection and `AsgiApp` do before."""
        await self.app(scope | {CALLER_INFO: Caller(self.address), REQUEST_ID: "req_1"}, receive, send)

    def take(self, values: Values) -> None:
        """Take an event as the emitter does. It must be valid where it arrives."""
        self.events.append(AuditEvent.model_validate(dict(zip(FIELDS, values, strict=True))))

    def taken(self) -> list[AuditEvent]:
        """Return the events so far, each with its result if it has one, and forget them."""
        found = {event.id: event for event in self.events}
        self.events = []
        return list(found.values())

    async def ask(self, method: str, path: str, key: str | None = TOKEN, **options: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key is not None else {}
        return await self.http.request(method, path, headers=headers, **options)

    async def make_key(self, *scopes: Scope, **fields: Any) -> tuple[str, str]:
        """Return a new key's id, and the key."""
        made = await self.keys.create("walker", owner="red", scopes=scopes, **fields)
        return made.record.id, made.key


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    await gateway.registry.start()
    await gateway.keys.refresh()
    async with gateway.http:
        yield gateway


def routes(found: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for route in found:
        if hasattr(route, "original_router"):
            yield from routes(route.original_router.routes)
        else:
            yield from ((method, route.path) for method in route.methods - {"HEAD"})


async def test_every_administrative_route_is_recorded(gateway: Gateway) -> None:
    """A route that refuses a key without administrative scopes records each of its calls, whatever becomes of them."""
    _, ordinary = await gateway.make_key(Scope.INFERENCE, Scope.JOBS)
    key_id, admin = await gateway.make_key(*Scope)
    administrative = set()
    for method, path in routes(gateway.app.routes):
        target = path.replace(":path", "").replace("{", "").replace("}", "")
        refused = await gateway.ask(method, target, ordinary)
        gateway.events = []
        if refused.status_code != 403 or "scope 'admin" not in refused.text:
            continue
        administrative.add(f"{method} {path}")
        answer = await gateway.ask(method, target, admin, params={"team": "red"})
        [event] = gateway.taken()
        assert (event.action, event.key, event.team) == (action_of(method, path), key_id, "red"), path
        assert (event.status, event.address, event.request_id) == (answer.status_code, "192.0.2.1", "req_1"), path
        parameter = re.search(r"{(\w+)", path)
        assert event.target == (parameter[1] if parameter else ""), path
    assert len(administrative) > 25
    assert administrative <= set(ROUTES)
    other_reads = {route for route, action in ROUTES.items() if action == "usage.read"}
    assert set(ROUTES) - administrative == other_reads
    for route in other_reads:
        path = route.split(" ")[1].replace("*", "completions")
        await gateway.ask("GET", path, ordinary)
        assert gateway.taken() == []
        await gateway.ask("GET", path, admin)
        assert [event.action for event in gateway.taken()] == ["usage.read"], route


async def test_a_key_from_its_creation_to_its_end(gateway: Gateway) -> None:
    """Each change names the fields with their old and new values, and no event holds a key, a hash or a secret."""
    made = (await gateway.ask("POST", "/v1/keys", json={"name": "anna", "models": ["a*"], "max_open": 3})).json()
    path = f"/v1/keys/{made['id']}"
    await gateway.ask("PATCH", path, json={"max_open": 5, "models": None, "name": "anna"})
    rotated = (await gateway.ask("POST", f"{path}/rotate", json={"overlap_s": 60})).json()
    await gateway.ask("DELETE", path)
    await gateway.ask("DELETE", path)
    text = json.dumps([event.model_dump() for event in gateway.events])
    create, change, rotate, revoke, again = gateway.taken()
    assert [one.action for one in (create, change, rotate, revoke, again)] == [
        "key.create", "key.change", "key.rotate", "key.revoke", "key.revoke",
    ]  # fmt: skip
    for event in (create, change, rotate, revoke):
        assert (event.target_type, event.target, event.target_team) == ("key", made["id"], "anna")
        assert (event.actor, event.team, event.key) == (ActorKind.BOOTSTRAP_KEY, "default", "")
    assert json.loads(create.changes)["models"] == {"old": None, "new": ["a*"]}
    assert json.loads(create.changes)["scopes"] == {"old": None, "new": ["inference", "jobs"]}
    assert json.loads(change.changes) == {"models": {"old": ["a*"], "new": None}, "max_open": {"old": 3, "new": 5}}
    assert json.loads(rotate.details) == {"replaced_until": rotated["replaced_until"]}
    assert list(json.loads(revoke.changes)) == ["revoked_at"]
    assert (create.status, again.status, again.error) == (201, 404, "key_not_found")
    record = gateway.keys.get(made["id"])
    assert record is not None
    for secret in (made["key"], rotated["key"], made["webhook_secret"], record.hash, record.old_hash, TOKEN):
        assert secret not in text


async def test_teams_aliases_and_services(gateway: Gateway) -> None:
    """What was, and what is; passwords and unknown fields of a service are left out."""
    await gateway.ask("POST", "/v1/teams", json={"id": "blue", "max_batches": 2})
    await gateway.ask("PATCH", "/v1/teams/blue", json={"max_batches": 3})
    await gateway.ask("DELETE", "/v1/teams/blue")
    await gateway.ask("PUT", "/v1/aliases/org/big", json={"targets": ["one"]})
    await gateway.ask("PUT", "/v1/aliases/org/big", json={"targets": ["two"]})
    await gateway.ask("DELETE", "/v1/aliases/org/big")
    url = "http://user:pass-word@pictures:80/api?token=pass-word"
    await gateway.ask("PUT", "/v1/services/pictures", json={"base_url": url, "api_key": "pass-word"})
    events = gateway.taken()
    assert all(event.status in {200, 201} for event in events)
    changes = [json.loads(event.changes) for event in events]
    assert [one["max_batches"] for one in changes[:3]] == [
        {"old": None, "new": 2}, {"old": 2, "new": 3}, {"old": 3, "new": None},
    ]  # fmt: skip
    assert [one["targets"] for one in changes[3:6]] == [
        {"old": None, "new": ["one"]}, {"old": ["one"], "new": ["two"]}, {"old": ["two"], "new": None},
    ]  # fmt: skip
    assert [event.target for event in events] == ["blue", "blue", "blue", "org/big", "org/big", "org/big", "pictures"]
    assert changes[6]["base_url"] == {"old": None, "new": "http://pictures:80/api"}
    assert "pass-word" not in events[6].model_dump_json()


async def test_a_change_is_there_before_it_is_done(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that is killed during a change leaves an event without a result; an ended one has the same id and its result."""
    seen: list[AuditEvent] = []
    create = gateway.keys.create

    async def watched(*args: Any, **fields: Any) -> Any:
        seen.extend(gateway.events)
        return await create(*args, **fields)

    monkeypatch.setattr(gateway.keys, "create", watched)
    await gateway.ask("POST", "/v1/keys", json={"name": "anna"})
    [begun], [_, ended] = seen, gateway.events
    assert (begun.status, ended.status) == (0, 201)
    assert (begun.id, begun.at_ms, begun.action) == (ended.id, ended.at_ms, "key.create")


async def test_readings_of_a_console_are_summed_up(gateway: Gateway) -> None:
    """The first is recorded at once, what follows within a minute as one event with its number; another target is another sum."""
    for _ in range(5):
        await gateway.ask("GET", "/v1/keys")
    await gateway.ask("GET", "/v1/teams/red")
    gateway.clock = WINDOW_S - 1
    gateway.log.readings.write_due()
    assert [(event.action, event.count) for event in gateway.taken()] == [("key.list", 1), ("team.read", 1)]
    gateway.clock = WINDOW_S
    gateway.log.readings.write_due()
    assert [(event.action, event.count, event.status) for event in gateway.taken()] == [("key.list", 4, 200)]
    await gateway.ask("GET", "/v1/keys")
    await gateway.log.close()
    assert [(event.action, event.count) for event in gateway.taken()] == [("key.list", 1)]
    assert gateway.events == []


async def test_refused_keys_are_kept_and_bounded(gateway: Gateway) -> None:
    """One source of wrong keys makes one event at once and one each minute; more sources than can be told apart are one."""
    for number in range(50 + MAX_REFUSALS + 40):
        headers = [(b"authorization", b"Bearer wrong%d" % number)]
        address = f"198.51.{number // 250}.{number % 250}" if number >= 50 else "192.0.2.1"
        with pytest.raises(AuthenticationFailed):
            gateway.auth.authenticate(
                {"method": "GET", "path": "/v1/models", "headers": headers, CALLER_INFO: Caller(address)}
            )
    await gateway.ask("DELETE", "/v1/keys/x", None)
    first, *others = gateway.taken()
    assert (first.action, first.actor, first.address, first.count) == ("key.refused", "nobody", "192.0.2.1", 1)
    assert (first.status, first.error) == (401, "invalid_api_key")
    assert json.loads(first.details) == {"route": "GET /v1/models"}
    assert len(others) == MAX_REFUSALS
    assert (others[-1].address, others[-1].details) == ("", '{"sources":"others"}')
    gateway.clock = WINDOW_S
    gateway.log.refusals.write_due()
    sums = {event.address: event.count for event in gateway.taken()}
    assert sums == {"192.0.2.1": 50, "": 40}


async def test_denied_requests_are_kept_and_bounded(gateway: Gateway) -> None:
    """A key that tries routes out makes one event for each kind of route and minute, whatever ids it names."""
    caller = Caller("192.0.2.1")
    caller.owner, caller.key_id = "red", "key_1"
    answer = b'{"error": {"message": "no", "type": "permission_error", "code": null}}'
    for number in range(60):
        kind = ("jobs", "files")[number % 2]
        scope = {"method": "GET", "path": f"/v1/{kind}/{number}", CALLER_INFO: caller}
        gateway.log.record_denial(scope, answer if number else b"nonsense")
    gateway.log.record_denial({"method": "POST", "path": "/auth/logout", CALLER_INFO: caller}, answer)
    events = gateway.taken()
    assert [(event.action, event.key, event.error, json.loads(event.details)["route"]) for event in events] == [
        ("access.denied", "key_1", "", "GET /v1/jobs/0"),
        ("access.denied", "key_1", "permission_error", "GET /v1/files/1"),
        ("access.denied", "key_1", "permission_error", "GET /v1/jobs/2"),
    ]
    gateway.clock = WINDOW_S
    gateway.log.denials.write_due()
    assert sorted(event.count for event in gateway.taken()) == [28, 29]


async def test_a_known_key_that_is_refused_is_named(gateway: Gateway) -> None:
    """A revoked key, and a key from a network that is not its own: whose they are, but not what they are."""
    revoked, old = await gateway.make_key(Scope.JOBS)
    await gateway.keys.revoke(revoked)
    elsewhere, bound = await gateway.make_key(Scope.JOBS, networks=("10.0.0.0/8",))
    for key in (old, bound):
        assert (await gateway.ask("GET", "/v1/models", key)).status_code in {401, 403}
    events = gateway.taken()
    assert [(event.actor, event.team, event.key, event.error) for event in events] == [
        (ActorKind.API_KEY, "red", revoked, "invalid_api_key"), (ActorKind.API_KEY, "red", elsewhere, "network_not_allowed"),
    ]  # fmt: skip
    assert old not in str(events)


async def test_attempts_without_the_scope_are_recorded(gateway: Gateway) -> None:
    """They name the key and the scope's absence, and a loop of them does not fill the log."""
    key_id, key = await gateway.make_key(Scope.ADMIN_READ)
    for number in range(20):
        assert (await gateway.ask("DELETE", f"/v1/keys/{number}", key)).status_code == 403
    [event] = gateway.taken()
    assert (event.action, event.key, event.status, event.error) == ("key.revoke", key_id, 403, "permission_denied")


async def test_no_key_gets_into_the_log_by_a_path(gateway: Gateway) -> None:
    """Somebody who takes a key for its id, and any other text that is odd or long."""
    key = PREFIX + secrets.token_urlsafe(32)
    for path in (f"/v1/keys/{key}", f"/v1/keys/{TOKEN}", "/v1/keys/" + "x" * 2000, "/v1/keys/%00%ff"):
        await gateway.ask("DELETE", path)
    assert [event.target[:9] for event in gateway.taken()] == [
        "[key]",
        "[key]",
        "xxxxxxxxx",
        "\N{REPLACEMENT CHARACTER}",
    ]
    await gateway.ask("GET", f"/v1/models/{key}", "wrong")
    assert json.loads(gateway.taken()[0].details) == {"route": "GET /v1/models/[key]"}


def test_other_parts_record_too() -> None:
    """A login, with what it was about."""
    taken: list[Values] = []
    scope = {CALLER_INFO: Caller("192.0.2.7"), REQUEST_ID: "req_2"}
    actor = Actor(ActorKind.PERSON, team="red", person="anna@example.com")
    AuditLog(taken.append).record("person.login", scope, actor=actor, target=actor.person, details={"provider": "corp"})
    event = AuditEvent.model_validate(dict(zip(FIELDS, taken[0], strict=True)))
    assert (event.person, event.action, event.target_type) == ("anna@example.com", "person.login", "person")
    assert (event.address, event.request_id, event.status, event.details) == (
        "192.0.2.7",
        "req_2",
        200,
        '{"provider":"corp"}',
    )


def test_a_route_without_a_name_cannot_be_made() -> None:
    """A new administrative route fails when it is declared, and says where its action's name belongs."""
    with pytest.raises(LookupError, match="actions"):
        action_of("POST", "/v1/new")


def test_new_fields_of_keys_and_teams_are_recorded_or_secret() -> None:
    """Adding a field to a key or a team takes a decision whether its changes are recorded."""
    key, team = ApiKey(id="key_1", hash="", name="", owner="", created_at=0), Team(id="red", created_at=0)
    unchanging = {"id", "created_at", "version"}
    secret = {"hash", "hint", "old_hash", "old_hash_until", "webhook_secret"}
    assert set(ApiKey.model_fields) - audited_key(key).keys() == unchanging | secret | {"revoked_at"}
    assert set(Team.model_fields) - audited_team(team).keys() == unchanging | {
        "deleted_at",
        "webhook_secret",
        "inspection",  # has actions of its own
    }
    url = "https://hooks.example/T0/secret-part"
    shown = audited_team(team.model_copy(update={"budget_webhook": url}))["budget_webhook"]
    assert shown.startswith("https://hooks.example/…")
    assert "secret-part" not in shown
