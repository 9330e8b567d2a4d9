"""What strangers see at the API's port, and what operators see on the port beside it."""

from __future__ import annotations

import asyncio
import html
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from gateway.http.response_writer import SECURITY_HEADERS
from gateway.openapi.operations import OPERATIONS
from tests.cluster import KEY, Cluster, chat

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECURITY = {name.decode(): value.decode() for name, value in SECURITY_HEADERS}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPERATORS = ("/metrics", "/docs", "/docs/page.js", "/docs/swagger-ui-bundle.js", "/openapi.json", "/redoc")


@pytest.fixture(scope="module")
def cluster_settings() -> dict[str, str]:
    return {"PUBLIC_ROUTES": ""}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stranger() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient() as client:
        yield client


async def test_strangers_see_no_more_than_that_it_runs(cluster: Cluster, stranger: httpx.AsyncClient) -> None:
    """At the API's port there are two short probes and a page, and nothing else without a key."""
    for path in OPERATORS:
        assert (await stranger.get(cluster.url + path)).status_code == 404, path
        assert (await cluster.get(path)).status_code == 404, path
    ready = await stranger.get(cluster.url + "/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
    assert (await stranger.get(cluster.url + "/health")).json() == {"status": "ok"}
    wrong = await stranger.get(cluster.url + "/readyz", headers={"authorization": "Bearer nexus-wrong"})
    assert (wrong.status_code, wrong.json()) == (200, {"status": "ready"})


async def test_the_page_at_the_root(cluster: Cluster, stranger: httpx.AsyncClient) -> None:
    """A page for browsers and JSON for programs, without a key and without a word on versions or parts; HEAD works."""
    page = await stranger.get(cluster.url + "/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert f"{cluster.url}/v1/chat/completions" in page.text
    assert "is ready for requests" in page.text
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert page.headers["cache-control"] == "no-store"
    assert cluster.observability_url in page.text
    head = await stranger.head(cluster.url + "/")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == page.headers["content-length"]
    program = await stranger.get(cluster.url + "/", headers={"accept": "application/json"})
    assert program.json() == {"name": "nexus", "status": "ready", "base_url": f"{cluster.url}/v1"}
    hostile = await stranger.get(cluster.url + "/", headers={"host": "<b>evil</b>"})
    assert "evil" not in hostile.text
    posted = await stranger.post(cluster.url + "/")
    assert (posted.status_code, posted.json()["error"]["type"]) == (405, "invalid_request_error")


async def test_an_admin_key_opens_the_details(cluster: Cluster, stranger: httpx.AsyncClient) -> None:
    """With an admin key readiness names the parts; with another one it does not."""
    parts = (await cluster.get("/readyz")).json()["parts"]
    assert set(parts) >= {"nats", "etcd", "redis", "registry"}
    key = (await cluster.post("/v1/keys", {"name": "plain", "scopes": ["inference"]})).json()["key"]
    plain = await stranger.get(cluster.url + "/readyz", headers={"authorization": f"Bearer {key}"})
    assert plain.json() == {"status": "ready"}


async def test_operators_have_a_port_of_their_own(cluster: Cluster, stranger: httpx.AsyncClient) -> None:
    """There are metrics, documentation, and readiness by part."""
    side = cluster.observability_url
    assert "nexus_requests_in_flight" in (await stranger.get(side + "/metrics")).text
    assert (await stranger.get(side + "/readyz")).json()["parts"]["nats"]["ok"]
    assert (await stranger.get(side + "/health")).json() == {"status": "ok"}
    assert (await stranger.get(side + "/v1/models")).status_code == 404
    page = await stranger.get(side + "/metrics", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in page.headers


async def test_the_documentation_needs_nobody_else(cluster: Cluster, stranger: httpx.AsyncClient) -> None:
    """The page names no other host, its policy lets it ask none but the API, and every file that it names is there."""
    side = cluster.observability_url
    page = await stranger.get(side + "/docs")
    assert "://" not in page.text
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert policy["connect-src"] == f"'self' {cluster.url}"
    assert policy["frame-ancestors"] == "'none'"
    for name in re.findall(r'(?:src|href)="(docs/[^"]+)"', page.text):
        file = await stranger.get(f"{side}/{name}")
        assert file.status_code == 200
        assert "://" not in file.text or name != "docs/page.js"
    document = (await stranger.get(side + "/openapi.json")).json()
    assert document["servers"] == [{"url": cluster.url}]
    assert document["paths"]["/metrics"]["get"]["servers"] == [{"url": "/"}]


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
async def test_the_documentation_is_drawn_without_internet(cluster: Cluster, tmp_path: Path) -> None:
    """A browser that finds no other host shows every route, and asks for a key."""
    assert BROWSER is not None
    process = await asyncio.create_subprocess_exec(
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--dump-dom", cluster.observability_url + "/docs",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    async with asyncio.timeout(60):
        page = (await process.communicate())[0].decode()
    assert "Authorize" in page
    for operation in OPERATIONS.values():
        if operation.id == "getStatus":  # only where PUBLIC_ROUTES has it
            continue
        assert f'id="operations-{operation.tag}-{operation.id}"' in page
        assert operation.summary in html.unescape(page)


async def test_the_document_says_what_the_gateway_does(cluster: Cluster, stranger: httpx.AsyncClient) -> None:
    """Keys, errors and content types are in it; FastAPI's own errors, which Nexus never sends, are not."""
    document = (await stranger.get(cluster.observability_url + "/openapi.json")).json()
    operations = {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert document["components"]["securitySchemes"]
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for route, operation in operations.items():
        contents = [c for r in operation["responses"].values() for c in r.get("content", {}).values()]
        assert {"schema": {}} not in contents, route
        if "/v1/" in route:
            assert {"400", "401", "404", "503"} <= set(operation["responses"]), route
            assert operation.get("security") or "/v1/results/" in route
    assert list(operations["GET /metrics"]["responses"]["200"]["content"]) == ["text/plain"]
    for route in ("POST /v1/audio/speech", "GET /v1/files/{file_id}/content", "GET /v1/jobs/{job_id}/events"):
        assert "application/json" not in operations[route]["responses"]["200"]["content"], route
    for status, path in ((400, "/v1/jobs?limit=banana"), (404, "/v1/jobs/job_none"), (401, "/v1/models")):
        answer = await (stranger if status == 401 else cluster.http).get(cluster.url + path)
        route = f"GET {path.split('?')[0].replace('job_none', '{job_id}')}"
        assert answer.status_code == status
        assert str(status) in operations[route]["responses"]


async def test_every_answer_has_security_headers(cluster: Cluster, stranger: httpx.AsyncClient) -> None:
    """Answers, streams, errors of every layer, probes and preflights carry them once; the API's are kept by no cache."""
    await cluster.start_worker(WORKER_MODELS="edge")
    key = {"authorization": f"Bearer {KEY}"}
    path = cluster.url + "/v1/chat/completions"
    answers = [
        await stranger.post(path, json=chat(model="edge"), headers=key),
        await stranger.post(path, json=chat(model="edge", stream=True), headers=key),
        await stranger.post(path, json=chat(model="none"), headers=key),
        await stranger.post(path, json=chat()),
        await stranger.post(path, content=b"{", headers=key),
        await stranger.post(path, json=chat(model="edge"), headers=key | {"prefer": "respond-async"}),
        await stranger.get(cluster.url + "/v1/models", headers=key),
        await stranger.get(cluster.url + "/v1/jobs", headers=key),
        await stranger.get(cluster.url + "/v1/nothing", headers=key),
        await stranger.get(path, headers=key),
        await stranger.get(cluster.url + "/v1/results/x"),
        await stranger.options(path, headers={"origin": "https://a.example"}),
        await stranger.get(cluster.url + "/health"),
        await stranger.get(cluster.url + "/readyz"),
        await stranger.get(cluster.observability_url + "/metrics"),
        await stranger.get(cluster.observability_url + "/docs"),
    ]
    for answer in answers:
        for name, value in SECURITY.items():
            assert answer.headers.get_list(name) == [value], (answer.request.method, answer.url, name)
        if answer.request.method != "OPTIONS":
            assert "no-store" in answer.headers["cache-control"], answer.url
    reader, writer = await asyncio.open_connection(*cluster.url.removeprefix("http://").split(":"))
    writer.write(b"nonsense\r\n\r\n")
    refused = await reader.read()
    writer.close()
    assert refused.startswith(b"HTTP/1.1 400")
    assert b"\r\nx-content-type-options: nosniff\r\n" in refused


async def test_scrapes_share_one_text(cluster: Cluster, stranger: httpx.AsyncClient) -> None:
    """Scrapes in the same second get the same text, however many there are."""
    texts = await asyncio.gather(*(stranger.get(cluster.observability_url + "/metrics") for _ in range(30)))
    assert len({answer.text for answer in texts}) <= 2
