"""Every route of the gateway, by everybody who may not use it. A route that `ROUTES` does not name fails the first test.

A new route is one line in `ROUTES`: what its caller's key must be for, and, where its path holds the id of something that
belongs to an owner, of what. A new kind of such things is one function in `MAKERS`, which makes one and returns its id.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import pytest_asyncio

from backbone.settings import PUBLIC_ROUTES
from gateway.app import make_app
from gateway.audit.actions import ENDPOINT_ACTIONS, action_of
from gateway.dependencies import Parts
from gateway.jobs.http_handler import PATH as SUBMIT
from gateway.usage.organization import KINDS
from schemas.endpoints import ENDPOINTS
from schemas.keys import ADMIN_SCOPES, Scope
from tests.cluster import KEY, Cluster, chat
from tests.conftest import Eventually
from tests.flow.conftest import SETTINGS

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "walked"


@dataclass(frozen=True)
class Need:
    """What a route wants of its caller."""

    scopes: tuple[Scope, ...] | None
    """All of these; none of them: any valid key. None: no key at all."""
    owned: str = ""
    """What the id in its path is of, where that belongs to an owner."""

    def of(self, kind: str) -> Need:
        return replace(self, owned=kind)


PUBLIC, ANY = Need(None), Need(())
INFERENCE, JOBS = Need((Scope.INFERENCE,)), Need((Scope.JOBS,))
READ, OPERATE, KEYS = (Need((scope,)) for scope in (Scope.ADMIN_READ, Scope.ADMIN_OPERATE, Scope.ADMIN_KEYS))

ROUTES = {
    "GET /": PUBLIC,
    "GET /health": PUBLIC,
    "GET /readyz": PUBLIC,
    "GET /metrics": PUBLIC,
    "GET /docs": PUBLIC,
    "GET /docs/page.js": PUBLIC,
    "GET /docs/swagger-ui-bundle.js": PUBLIC,
    "GET /docs/swagger-ui.css": PUBLIC,
    "GET /openapi.json": PUBLIC,
    # The URL's signature is the permission.
    "GET /v1/results/{name}": PUBLIC,
    "GET /v1/models": ANY,
    "GET /v1/catalog": ANY,
    "GET /v1/catalog/{model_id:path}": ANY,
    "GET /v1/models/{model_id:path}": ANY,
    "GET /v1/audio/voices": ANY,
    "GET /v1/audio/models": ANY,
    **{f"POST {spec.path}": Need((spec.scope,)) for spec in ENDPOINTS},
    "POST /v1/messages": INFERENCE,
    "POST /v1/messages/count_tokens": INFERENCE,
    "POST /v1/messages/batches": JOBS,
    "GET /v1/messages/batches": JOBS,
    "GET /v1/messages/batches/{message_batch_id}": JOBS.of("message batch"),
    "GET /v1/messages/batches/{message_batch_id}/results": JOBS.of("message batch"),
    "POST /v1/messages/batches/{message_batch_id}/cancel": JOBS.of("message batch"),
    "DELETE /v1/messages/batches/{message_batch_id}": JOBS.of("message batch"),
    "POST /v1/jobs": Need((Scope.JOBS, Scope.INFERENCE)),
    "GET /v1/jobs": JOBS,
    "GET /v1/jobs/export": JOBS,
    "POST /v1/jobs/bulk/cancel": JOBS,
    "POST /v1/jobs/bulk/retry": JOBS,
    "GET /v1/jobs/{job_id}": JOBS.of("job"),
    "GET /v1/jobs/{job_id}/input": JOBS.of("job"),
    "GET /v1/jobs/{job_id}/result": JOBS.of("job"),
    "GET /v1/jobs/{job_id}/events": JOBS.of("job"),
    "POST /v1/jobs/{job_id}/cancel": JOBS.of("job"),
    "POST /v1/jobs/{job_id}/retry": JOBS.of("job"),
    "POST /v1/files": JOBS,
    "GET /v1/files": JOBS,
    "GET /v1/files/{file_id}": JOBS.of("file"),
    "GET /v1/files/{file_id}/content": JOBS.of("file"),
    "DELETE /v1/files/{file_id}": JOBS.of("file"),
    "POST /v1/batches": JOBS,
    "GET /v1/batches": JOBS,
    "GET /v1/batches/{batch_id}": JOBS.of("batch"),
    "POST /v1/batches/{batch_id}/cancel": JOBS.of("batch"),
    "POST /v1/responses": INFERENCE,
    "GET /v1/responses/{response_id}": INFERENCE.of("response"),
    "POST /v1/responses/{response_id}/cancel": INFERENCE.of("response"),
    "DELETE /v1/responses/{response_id}": INFERENCE.of("response"),
    "GET /v1/responses/{response_id}/input_items": INFERENCE.of("response"),
    "GET /v1/workers": READ,
    "POST /v1/workers/{worker_id}/drain": OPERATE,
    "GET /v1/workers/{worker_id}/logs": READ,
    "GET /v1/hosts": READ,
    "GET /status.json": PUBLIC,
    "GET /v1/queues": READ,
    "GET /v1/queues/{model:path}/jobs": READ,
    "POST /v1/queues/{model:path}/hold": OPERATE,
    "POST /v1/queues/{model:path}/release": OPERATE,
    "GET /v1/overview": READ,
    "GET /v1/overview/events": READ,
    "GET /v1/aliases": READ,
    "PUT /v1/aliases/{alias:path}": OPERATE,
    "DELETE /v1/aliases/{alias:path}": OPERATE,
    "GET /v1/services": READ,
    "PUT /v1/services/{name:path}": OPERATE,
    "DELETE /v1/services/{name:path}": OPERATE,
    # Dead letters are operators', no matter who owns their jobs.
    "GET /v1/dlq": READ,
    "GET /v1/dead-letter-groups": READ,
    "POST /v1/dlq/bulk/replay": OPERATE,
    "POST /v1/dlq/bulk/delete": OPERATE,
    "GET /v1/dlq/{job_id}": READ,
    "POST /v1/dlq/{job_id}/replay": OPERATE,
    "DELETE /v1/dlq/{job_id}": OPERATE,
    "POST /v1/keys": KEYS,
    "GET /v1/keys": KEYS,
    "GET /v1/keys/{key_id}": KEYS,
    "PATCH /v1/keys/{key_id}": KEYS,
    "POST /v1/keys/{key_id}/rotate": KEYS,
    "DELETE /v1/keys/{key_id}": KEYS,
    "POST /v1/teams": KEYS,
    "GET /v1/teams": KEYS,
    "GET /v1/teams/{team_id:path}": KEYS,
    "PATCH /v1/teams/{team_id:path}": KEYS,
    "DELETE /v1/teams/{team_id:path}": KEYS,
    # Operators name the team, and see no contents.
    "GET /v1/admin/jobs": READ,
    "GET /v1/admin/jobs/export": READ,
    "POST /v1/admin/jobs/bulk/cancel": OPERATE,
    "POST /v1/admin/jobs/bulk/retry": OPERATE,
    "GET /v1/admin/jobs/{job_id}": READ,
    "POST /v1/admin/jobs/{job_id}/cancel": OPERATE,
    "POST /v1/admin/jobs/{job_id}/lane": OPERATE,
    "GET /v1/people": KEYS,
    "GET /v1/people/{person_id}": KEYS,
    "PATCH /v1/people/{person_id}": KEYS,
    "DELETE /v1/people/{person_id}/sessions": KEYS,
    "POST /v1/login-links": KEYS,
    # A session's cookie, or a secret in the form, is the permission: tests/flow/test_people.py.
    "GET /ui": PUBLIC,
    "GET /ui/{path:path}": PUBLIC,
    "GET /auth/login": PUBLIC,
    "POST /auth/login": PUBLIC,
    "GET /auth/callback": PUBLIC,
    "GET /auth/link": PUBLIC,
    "POST /auth/link": PUBLIC,
    "GET /auth/session": PUBLIC,
    "POST /auth/logout": PUBLIC,
    "GET /v1/budgets": ANY,
    "GET /v1/usage": ANY,
    **{f"GET /v1/organization/usage/{name}": ANY for name in KINDS},
    "GET /v1/organization/costs": ANY,
    "GET /v1/logs": READ,
    "GET /v1/inspector": ANY,
    "GET /v1/inspector/teams": KEYS,
    "PUT /v1/inspector/teams/{team_id:path}": KEYS,
    "DELETE /v1/inspector/teams/{team_id:path}": KEYS,
    "GET /v1/inspector/requests": KEYS,
    "GET /v1/inspector/requests/{request_id}": KEYS,
    "GET /v1/audit": READ,
    "GET /v1/audit/export": READ,
}
USAGE = {route for route in ROUTES if route.startswith(("GET /v1/usage", "GET /v1/budgets", "GET /v1/organization/"))}
CLOSED = [route for route, need in ROUTES.items() if need.scopes is not None]
SCOPED = [(route, scope) for route, need in ROUTES.items() for scope in need.scopes or ()]
ADMINISTRATIVE = sorted({route for route, scope in SCOPED if scope in ADMIN_SCOPES} | USAGE)
OWNED = [route for route, need in ROUTES.items() if need.owned]
LISTS = {"job": "/v1/jobs", "file": "/v1/files", "batch": "/v1/batches", "message batch": "/v1/messages/batches"}


@pytest.fixture(scope="module")
def cluster_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("ledger")
    return SETTINGS | {"LEDGER_URL": f"sqlite:///{folder / 'ledger.db'}", "USAGE_JOURNAL_DIR": str(folder / "usage")}


class Caller:
    """Somebody with a key, or without."""

    def __init__(self, cluster: Cluster, key: str | None) -> None:
        self.cluster = cluster
        self.key = key

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        http = self.cluster.http
        request = http.build_request(method, self.cluster.url + path, **options)
        del request.headers["authorization"]
        if self.key is not None:
            request.headers["authorization"] = f"Bearer {self.key}".strip()
        answer = await http.send(request, stream=True)
        if answer.headers.get("content-type", "").startswith("text/event-stream"):
            await answer.aclose()  # it may have no end
        else:
            await answer.aread()
        return answer

    async def walk(self, route: str, item: str = "x") -> httpx.Response:
        """Use a route, with a body that is nonsense: who may not come in is not told so."""
        method, path = route.split(" ")
        body = {} if method == "GET" else {"content": b"{ nonsense"}
        return await self.ask(method, re.sub(r"\{[^}]*\}", item, path), **body)

    async def make(self, path: str, **options: Any) -> str:
        """POST; the id of what came of it."""
        answer = await self.ask("POST", path, **options)
        assert answer.is_success, answer.text
        return str(answer.json()["id"])


async def make_job(caller: Caller) -> str:
    """One that has completed."""
    body = {"endpoint": "/v1/chat/completions", "body": chat(model=MODEL)}
    job = await caller.make("/v1/jobs", json=body)
    ended = (await caller.ask("GET", f"/v1/jobs/{job}?wait=30")).json()
    assert ended["status"] == "completed", ended
    return job


async def make_file(caller: Caller) -> str:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": chat(model=MODEL)}
    files = {"file": ("lines.jsonl", json.dumps(line).encode())}
    return await caller.make("/v1/files", data={"purpose": "batch"}, files=files)


async def make_batch(caller: Caller) -> str:
    body = {"input_file_id": await make_file(caller), "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return await caller.make("/v1/batches", json=body)


async def make_response(caller: Caller) -> str:
    return await caller.make("/v1/responses", json={"model": MODEL, "input": "hello there"})


async def make_message_batch(caller: Caller) -> str:
    params = {**chat(model=MODEL), "max_tokens": 9}
    return await caller.make("/v1/messages/batches", json={"requests": [{"custom_id": "1", "params": params}]})


MAKERS: dict[str, Callable[[Caller], Awaitable[str]]] = {
    "job": make_job,
    "file": make_file,
    "batch": make_batch,
    "response": make_response,
    "message batch": make_message_batch,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def walked(cluster: Cluster) -> AsyncIterator[Cluster]:
    """With somebody who serves a model."""
    worker = await cluster.start_worker(WORKER_MODELS=MODEL)
    yield cluster
    await cluster.stop_workers(worker)


class Keys:
    """Keys by owner and scopes, made as they are wanted."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._made: dict[tuple[str, frozenset[Scope]], Caller] = {}

    async def get(self, owner: str = "walker", scopes: Sequence[Scope] = tuple(Scope)) -> Caller:
        wanted = (owner, frozenset(scopes))
        if wanted not in self._made:
            body = {"name": "walker", "owner": owner, "scopes": list(scopes)}
            made = await self._cluster.post("/v1/keys", body)
            assert made.status_code == 201, made.text
            self._made[wanted] = Caller(self._cluster, made.json()["key"])
        return self._made[wanted]


@pytest.fixture(scope="module")
def keys(cluster: Cluster) -> Keys:
    return Keys(cluster)


def served() -> Iterator[str]:
    """Every route there is, those that the door serves by itself included."""
    yield from (f"POST {endpoint.path}" for endpoint in ENDPOINTS)
    yield f"POST {SUBMIT}"
    yield from _routes(make_app(cast("Parts", SimpleNamespace()), PUBLIC_ROUTES).routes)


def _routes(routes: Sequence[Any]) -> Iterator[str]:
    for route in routes:
        if hasattr(route, "original_router"):
            yield from _routes(route.original_router.routes)
        else:
            yield from (f"{method} {route.path}" for method in route.methods - {"HEAD"})


async def test_every_administrative_call_is_in_the_audit_log(
    cluster: Cluster, keys: Keys, eventually: Eventually
) -> None:
    """Who called which route, with which result: of all that want an administrative scope, and of model jobs however they are submitted."""
    caller = await keys.get("auditor")
    wanted: dict[str, tuple[str, int]] = {}
    for route in ADMINISTRATIVE:
        answer = await caller.walk(route, f"of-{len(wanted)}")
        wanted[answer.headers["x-request-id"]] = (route, answer.status_code)
    body = {"endpoint": "/v1/models/pull", "body": {"model": "walked-pull"}}
    answer = await caller.ask("POST", "/v1/jobs", json=body)
    wanted[answer.headers["x-request-id"]] = ("POST /v1/models/pull", answer.status_code)
    found: dict[str, dict[str, Any]] = {}

    async def all_there() -> bool:
        answer = await cluster.http.get(f"{cluster.url}/v1/audit?limit=1000&team=auditor")
        found.update({event["request_id"]: event for event in answer.json()["data"] if event["result"] != "unknown"})
        return wanted.keys() <= found.keys()

    await eventually(all_there, what="all calls in the audit log")
    for request, (route, status) in wanted.items():
        method, path = route.split(" ")
        event = found[request]
        name = ENDPOINT_ACTIONS.get(path) or action_of(method, path)
        assert (event["action"], event["status"], event["actor"]["type"]) == (name, status, "api_key"), route
        assert event["address"] == "127.0.0.1"
    assert found[answer.headers["x-request-id"]]["target"]["id"] == "walked-pull"
    assert [event["key"] for event in (one["actor"] for one in found.values())].count(None) == 0


async def test_every_denied_request_is_in_the_audit_log(walked: Cluster, keys: Keys, eventually: Eventually) -> None:
    """Of all other routes: who lacks the scope, and who may not use the model or the lane. Those of a source are summed up."""
    caller = await keys.get("denied", [Scope.ADMIN_KEYS])
    ordinary = sorted({route for route, _ in SCOPED} - {*ADMINISTRATIVE})
    wanted = set()
    for route in ordinary:
        answer = await caller.walk(route)
        assert answer.status_code == 403, route
        error = answer.json()["error"]
        wanted.add((error.get("code") or error["type"], *_source(route)))
    made = await walked.post("/v1/keys", {"name": "bound", "owner": "denied", "models": [MODEL], "lanes": ["default"]})
    bound = Caller(walked, made.json()["key"])
    bodies = {"/v1/chat/completions": chat(model=MODEL), "/v1/responses": {"model": MODEL, "input": "hi"}}
    for path, body in bodies.items():
        for code, fields in (("model_not_allowed", {"model": "no"}), ("lane_not_allowed", {"service_tier": "flex"})):
            answer = await bound.ask("POST", path, json=body | fields)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, code), answer.text
            wanted.add((code, *_source(f"POST {path}")))
    assert (await bound.ask("POST", "/v1/chat/completions", json=chat(model=MODEL))).status_code == 200
    found: dict[tuple[str, str, str], dict[str, Any]] = {}

    async def all_there() -> bool:
        answer = await walked.http.get(f"{walked.url}/v1/audit?limit=1000&team=denied&action=access.denied")
        found.update({(one["error"], *_source(one["details"]["route"])): one for one in answer.json()["data"]})
        return wanted <= found.keys()

    await eventually(all_there, what="all denied requests in the audit log")
    assert wanted == found.keys()
    assert {(one["status"], one["result"], one["actor"]["type"]) for one in found.values()} == {
        (403, "refused", "api_key")
    }


def _source(route: str) -> tuple[str, str]:
    """The method, and the first part of the path."""
    method, path = route.split(" ")
    return method, path.split("/")[2]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """OpenAI's error object, also of an error in Anthropic's form."""
    error = dict(answer.json()["error"])
    if answer.json().get("type") == "error":
        details = error.pop("details", {})
        error |= {"code": details.get("error_code"), "param": details.get("param")}
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_every_route_is_named_here() -> None:
    """Anyone who adds a route says who may use it, and what it shows of whom."""
    assert set(served()) == set(ROUTES)
    assert {need.owned for need in ROUTES.values()} - {""} == set(MAKERS)
    ids = re.compile(r"\{(job|file|batch|message_batch|response)_id\}")
    assert {r for r in ROUTES if ids.search(r) and not r.split(" ")[1].startswith(("/v1/dlq", "/v1/admin"))} == set(
        OWNED
    )


@pytest.mark.parametrize("route", sorted(set(ROUTES) - set(CLOSED)))
async def test_public_routes_want_no_key(cluster: Cluster, route: str) -> None:
    """Probes, documentation, URLs that are the permission themselves, and what a session's cookie or a secret in a form is."""
    # The console's files are there once they are built.
    refusals = {400, 401} if "/auth/" in route else {308, 503} if "/ui" in route else {404}
    assert (await Caller(cluster, None).walk(route)).status_code in {200} | refusals


@pytest.mark.parametrize("route", CLOSED)
async def test_without_a_key_nobody_comes_in(cluster: Cluster, keys: Keys, route: str) -> None:
    """401 before anything of the request is judged; the key that was sent is not repeated."""
    for wrong in (None, "", "x", "nexus-" + "W" * 43, KEY + "x"):
        answer = await Caller(cluster, wrong).walk(route)
        assert answer.status_code == 401, answer.text
        assert answer.headers["www-authenticate"] == "Bearer"
        error = error_of(answer)
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert not wrong or len(wrong) == 1 or wrong not in answer.text


@pytest.mark.parametrize(("route", "scope"), SCOPED)
async def test_a_key_without_the_scope_is_refused(keys: Keys, route: str, scope: Scope) -> None:
    """403, naming the scope, before the body is judged; with these scopes and no other it is let in."""
    answer = await (await keys.get(scopes=[one for one in Scope if one not in {scope, Scope.ADMIN}])).walk(route)
    assert answer.status_code == 403, answer.text
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("permission_error", "permission_denied")
    assert f"'{scope}'" in error["message"]
    right = await keys.get(scopes=ROUTES[route].scopes or ())
    assert (await right.walk(route)).status_code not in {401, 403}


@pytest.mark.parametrize("route", [route for route in CLOSED if not ROUTES[route].scopes])
async def test_any_key_may_look_at_models(keys: Keys, route: str) -> None:
    """Whatever it is for."""
    for scope in Scope:
        assert (await (await keys.get(scopes=[scope])).walk(route)).status_code in {200, 400, 404}


@pytest.mark.parametrize("route", OWNED)
async def test_what_belongs_to_another_owner_is_not_there(walked: Cluster, keys: Keys, route: str) -> None:
    """404 with every scope, to the bootstrap key too, just as for what never was; for its owner's other keys it is there."""
    kind = ROUTES[route].owned
    item = await MAKERS[kind](await keys.get("anna"))
    never = item[:-32] + "0" * 32
    for caller in (await keys.get("bert"), Caller(walked, KEY)):
        answer, missing = await caller.walk(route, item), await caller.walk(route, never)
        assert answer.status_code == missing.status_code == 404, answer.text
        texts = [
            one.text.replace(name, "").replace(one.headers["x-request-id"], "")
            for one, name in ((answer, item), (missing, never))
        ]
        assert texts[0] == texts[1]
    again = await keys.get("anna", scopes=ROUTES[route].scopes or ())
    answer = await again.walk(route, item)
    assert answer.status_code not in {401, 403, 404}, answer.text


@pytest.mark.parametrize("kind", sorted(LISTS))
async def test_lists_hold_the_callers_own_alone(walked: Cluster, keys: Keys, kind: str) -> None:
    """Everything of the owner's, whichever of its keys made it, and nothing of others'."""
    one, other = await keys.get("anna"), await keys.get("bert")
    mine, theirs = await MAKERS[kind](one), await MAKERS[kind](other)
    for caller, seen, hidden in ((one, mine, theirs), (other, theirs, mine)):
        listed = {item["id"] for item in (await caller.ask("GET", LISTS[kind])).json()["data"]}
        assert seen in listed
        assert hidden not in listed


async def test_nothing_of_another_owner_can_be_named_in_a_body(walked: Cluster, keys: Keys) -> None:
    """A batch of somebody else's file, an answer to somebody else's response: there is no such thing."""
    anna, bert = await keys.get("anna"), await keys.get("bert")
    file, response = await make_file(anna), await make_response(anna)
    batch = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    follow_up = {"model": MODEL, "input": "and now?", "previous_response_id": response}
    for path, body in (("/v1/batches", batch), ("/v1/responses", follow_up)):
        assert (await bert.ask("POST", path, json=body)).status_code in {400, 404}
        assert (await anna.ask("POST", path, json=body)).is_success


async def test_idempotency_keys_are_an_owners_own(walked: Cluster, keys: Keys) -> None:
    """Two owners who use the same one get two jobs; one owner's two keys get one."""
    callers = [await keys.get("anna"), await keys.get("bert"), await keys.get("anna", [Scope.JOBS, Scope.INFERENCE])]
    body = {"endpoint": "/v1/chat/completions", "body": chat(model=MODEL)}
    jobs = []
    for caller in callers:
        headers = {"authorization": f"Bearer {caller.key}", "idempotency-key": "the same"}
        made = await walked.http.post(walked.url + "/v1/jobs", json=body, headers=headers)
        jobs.append(made.json()["id"])
    assert jobs[0] == jobs[2] != jobs[1]


async def test_the_log_names_callers_and_tells_no_secret(walked: Cluster, keys: Keys, eventually: Eventually) -> None:
    """Each line of a request has its team, key and address; no line of the gateway's log holds a key, a prompt or an answer."""
    caller = await keys.get("logged")
    text = "the prompt nobody may read"  # which the worker repeats
    body = chat(text, model=MODEL)
    asked = [
        await caller.ask("POST", "/v1/chat/completions", json=body),
        await caller.ask("POST", "/v1/chat/completions", json=body | {"stream": True}),
        await caller.ask("POST", "/v1/chat/completions", json=body, headers={"prefer": "respond-async"}),
        await caller.ask("POST", "/v1/jobs", json={"endpoint": "/v1/chat/completions", "body": body}),
        await caller.ask("POST", "/v1/responses", json={"model": MODEL, "input": text}),
    ]
    assert all(one.is_success for one in asked), [one.text for one in asked]
    wrong = "nexus-" + "Q" * 43
    refused = await Caller(walked, wrong).ask("POST", "/v1/chat/completions", json=body)
    wanted = {one.headers["x-request-id"] for one in (*asked, refused)}

    def lines() -> dict[str, dict[str, Any]] | None:
        found = {line["request_id"]: line for line in walked.requests()}
        return found if wanted <= found.keys() else None

    found = await eventually(lines, what="a line for each request")
    assert {found[one]["client"] for one in wanted} == {"127.0.0.1"}
    for one in asked:
        line = found[one.headers["x-request-id"]]
        assert (line["team"], line["key"][:4]) == ("logged", "key_")
    assert found[refused.headers["x-request-id"]].keys().isdisjoint({"team", "key"})
    log = json.dumps(walked.log_events(walked.gateways[0]))
    for secret in (text, wrong, KEY, caller.key):
        assert secret is not None
        assert secret not in log
