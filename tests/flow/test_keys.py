"""API keys on whole gateways: made at one, refused at all, usable while Redis is away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio

from tests.cluster import KEY, ROOT, Cluster, Crew, chat
from tests.conftest import Eventually
from tests.fork_server import forked

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def make(cluster: Cluster, name: str, **fields: Any) -> dict[str, Any]:
    made = await cluster.post("/v1/keys", {"name": name} | fields)
    assert made.status_code == 201, made.text
    return dict(made.json())


def bearer(key: str | dict[str, Any]) -> dict[str, str]:
    return {"authorization": f"Bearer {key if isinstance(key, str) else key['key']}"}


async def status(cluster: Cluster, key: str | dict[str, Any], *, url: str = "", path: str = "/v1/models") -> int:
    """What a caller with this key gets."""
    return (await cluster.http.get((url or cluster.url) + path, headers=bearer(key))).status_code


async def revoke(cluster: Cluster, key: dict[str, Any], *, url: str = "") -> httpx.Response:
    return await cluster.http.delete(f"{url or cluster.url}/v1/keys/{key['id']}")


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def second(cluster: Cluster) -> str:
    """Another gateway's URL."""
    await cluster.start_gateway()
    return cluster.urls[1]


@asynccontextmanager
async def redis_away(cluster: Cluster, eventually: Eventually, *, forget: bool = False) -> AsyncIterator[None]:
    """As after `kill -9`; with `forget` it comes back empty."""
    cluster.redis.kill()
    await cluster.redis.stop()
    try:
        yield
    finally:
        if forget:
            cluster.redis.wipe()
        await cluster.redis.start()
        for url in cluster.urls:
            await eventually(lambda url=url: _is_ready(cluster, url))


async def _is_ready(cluster: Cluster, url: str) -> bool:
    return bool((await cluster.http.get(url + "/readyz")).json()["status"] == "ready")


async def test_made_at_one_gateway_and_revoked_at_another(
    cluster: Cluster, second: str, eventually: Eventually
) -> None:
    """Within moments it works at the other one, and is refused by the first; the answer says why."""
    key = await make(cluster, "traveller")
    assert await status(cluster, key) == 200
    await eventually(lambda: _is(cluster, key, 200, second))
    assert (await revoke(cluster, key, url=second)).status_code == 200
    assert await status(cluster, key, url=second) == 401
    await eventually(lambda: _is(cluster, key, 401), timeout_s=5)
    refused = await cluster.get("/v1/models", headers=bearer(key))
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert "revoked" in refused.json()["error"]["message"]
    assert key["key"] not in "".join(process.log_file.read_text() for process in cluster.gateways)


async def _is(cluster: Cluster, key: dict[str, Any], wanted: int, url: str = "") -> bool:
    return await status(cluster, key, url=url) == wanted


async def test_an_inspected_team_is_told_so(cluster: Cluster, crew: Crew, second: str, eventually: Eventually) -> None:
    """What it asks any gateway is kept: whole answers, streams and jobs, with their times, without their secrets."""
    await crew.start()
    key = await make(cluster, "inspected")
    before = await cluster.record(chat("unseen", model=crew.model), **bearer(key)).end()
    on = await cluster.http.put(cluster.url + "/v1/inspector/teams/inspected", json={"duration_s": 60})
    assert on.status_code == 200, on.text

    async def learned() -> bool:
        states = [await cluster.http.get(url + "/v1/inspector", headers=bearer(key)) for url in (cluster.url, second)]
        return all(state.json()["active"] for state in states)

    await eventually(learned)
    text = "one two password=hush"
    whole = await cluster.record(chat(text, model=crew.model), url=second, **bearer(key)).end()
    stream = await cluster.record(chat(text, model=crew.model, stream=True), **bearer(key)).end()
    job = {"endpoint": "/v1/chat/completions", "body": chat(text, model=crew.model)}
    submitted = await cluster.post("/v1/jobs", job, headers=bearer(key))
    jobs = [answer.headers["x-nexus-job-id"] for answer in (whole, stream) if answer.headers is not None]
    jobs.append(submitted.json()["id"])
    assert before.headers is not None
    assert "x-nexus-inspected" not in before.headers
    told = [answer.headers.get("x-nexus-inspected") for answer in (whole, stream) if answer.headers is not None]
    assert told == ["true", "true"]

    async def read(one: str) -> dict[str, Any] | None:
        found = await cluster.get(f"/v1/inspector/requests/{one}?team=inspected")
        return found.json() if found.status_code == 200 and found.json()["seconds"] is not None else None

    for one in jobs:
        found = await eventually(lambda one=one: read(one))
        assert (found["status"], found["model"], found["attempts"]) == (200, crew.model, 1)
        assert "password=[redacted]" in found["request"]
        assert "one " in found["answer"]
        assert "hush" not in json.dumps(found)
    listed = (await cluster.get("/v1/inspector/requests?team=inspected")).json()["data"]
    assert {one["id"] for one in listed} == set(jobs)
    assert (await cluster.http.delete(cluster.url + "/v1/inspector/teams/inspected")).json()["active"] is False
    assert (await cluster.get("/v1/inspector/requests?team=inspected")).json()["data"] == []


async def test_a_key_does_what_it_is_for(cluster: Cluster, crew: Crew) -> None:
    """Inference with one scope, operating with another; the refusal names what is missing."""
    await crew.start()
    user, admin = await make(cluster, "user", scopes=["inference"]), await make(cluster, "boss", scopes=["admin"])
    body = chat(model=crew.model)
    assert (await cluster.post("/v1/chat/completions", body, headers=bearer(user))).status_code == 200
    assert await status(cluster, user, path="/v1/workers") == 403
    assert await status(cluster, admin, path="/v1/workers") == 200
    for path in ("/v1/chat/completions", "/v1/embeddings"):
        refused = await cluster.post(path, body, headers=bearer(admin))
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
        assert "'inference'" in refused.json()["error"]["message"]
    refused = await cluster.post("/v1/models/load", {"model": crew.model}, headers=bearer(user))
    assert refused.status_code == 403


async def test_a_key_with_limits_has_only_so_much_open(cluster: Cluster, crew: Crew, eventually: Eventually) -> None:
    """Beyond it 429, with a time to wait; an answer that ended, or a caller that hung up, makes room."""
    await crew.start(options="first_delay_ms=600000")
    key = await make(cluster, "limited", scopes=["inference"], max_queued=1, max_running=1)
    body = chat(model=crew.model)
    open_ones = [cluster.record(body, **bearer(key)) for _ in range(2)]
    await eventually(lambda: _stored(cluster, crew, 2))
    refused = await cluster.post("/v1/chat/completions", body, headers=bearer(key))
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert int(refused.headers["retry-after"]) >= 1
    other = cluster.record(body)
    await eventually(lambda: _stored(cluster, crew, 3))
    for one in (*open_ones, other):
        await one.hang_up()
    await eventually(lambda: _stored(cluster, crew, 0))
    again = cluster.record(body, **bearer(key))
    await eventually(lambda: _stored(cluster, crew, 1))
    await again.hang_up()


async def _stored(cluster: Cluster, crew: Crew, count: int) -> bool:
    return await cluster.stored(crew.model) == count


async def test_a_revoked_key_ends_its_calls(cluster: Cluster, crew: Crew, second: str, eventually: Eventually) -> None:
    """A stream and a poll, at another gateway than the one that revokes it; its jobs are cancelled where that is asked."""
    await crew.start(options="first_delay_ms=600000")
    key, other = await make(cluster, "leaver", max_open=9), await make(cluster, "stayer")
    await eventually(lambda: _is(cluster, key, 200, second))
    job = (
        await cluster.post(
            "/v1/jobs", {"endpoint": "/v1/chat/completions", "body": chat(model=crew.model)}, headers=bearer(key)
        )
    ).json()["id"]
    stays = cluster.record(chat(model=crew.model, stream=True), url=second, **bearer(other))
    stream = asyncio.create_task(
        cluster.http.post(
            second + "/v1/chat/completions", json=chat(model=crew.model, stream=True), headers=bearer(key)
        )
    )
    poll = asyncio.create_task(cluster.http.get(f"{second}/v1/jobs/{job}?wait=300", headers=bearer(key)))
    await eventually(lambda: _stored(cluster, crew, 3))
    state = await cluster.get(f"/v1/admin/jobs/{job}?team=leaver")
    assert (state.status_code, state.json()["team"]) == (200, "leaver")
    assert "metadata" not in state.json()
    answer = await cluster.http.delete(f"{cluster.url}/v1/keys/{key['id']}?jobs=cancel")
    assert answer.json()["cancelled_jobs"] == 1
    async with asyncio.timeout(10):
        for call in (stream, poll):
            ended = await call
            assert (ended.status_code, ended.json()["error"]["code"]) == (401, "invalid_api_key")
    state = await cluster.get(f"/v1/admin/jobs/{job}?team=leaver")
    assert state.json()["status"] == "cancelled"
    await eventually(lambda: _stored(cluster, crew, 1))
    await stays.hang_up()


async def test_limits_per_minute(cluster: Cluster, crew: Crew, second: str, eventually: Eventually) -> None:
    """Over both gateways, changed without a new key, and told as OpenAI's SDKs read it."""
    await crew.start()
    key = await make(cluster, "hasty", requests_per_minute=6, tokens_per_minute=100_000)
    await eventually(lambda: _is(cluster, key, 200, second))
    body = chat(model=crew.model)
    answers = [
        await cluster.http.post(url + "/v1/chat/completions", json=body, headers=bearer(key))
        for url in (cluster.url, second) * 5
    ]
    assert [answer.status_code for answer in answers].count(200) <= 6
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 61
    for answer in (*answers, await cluster.get("/v1/models", headers=bearer(key))):
        assert answer.headers["x-ratelimit-limit-requests"] == "6"
        assert 0 <= int(answer.headers["x-ratelimit-remaining-tokens"]) < 100_000
    changed = await cluster.http.patch(f"{cluster.url}/v1/keys/{key['id']}", json={"requests_per_minute": 600})
    assert changed.status_code == 200
    again = await cluster.http.post(
        cluster.url + "/v1/chat/completions", json=body, headers=bearer(key) | {"x-nexus-on-limit": "queue"}
    )
    assert again.status_code == 200
    refused = await cluster.post("/v1/chat/completions", body | {"service_tier": "priority"}, headers=bearer(key))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "lane_not_allowed")


async def test_redis_killed(cluster: Cluster, crew: Crew, second: str, eventually: Eventually) -> None:
    """Keys go on working, everywhere; none can be made or ended; what was revoked before stays so. All is well again with Redis."""
    await crew.start()
    key, gone = await make(cluster, "steady", scopes=["inference"]), await make(cluster, "gone")
    await eventually(lambda: _is(cluster, gone, 200, second))
    await revoke(cluster, gone)
    await eventually(lambda: _is(cluster, gone, 401, second))
    async with redis_away(cluster, eventually):
        for url in (cluster.url, second):
            answer = await cluster.record(chat(model=crew.model), url=url, **bearer(key)).end()
            assert answer.status == 200
            assert await status(cluster, gone, url=url) == 401
        assert (await cluster.post("/v1/keys", {"name": "x"})).status_code == 503
        assert (await cluster.get("/v1/keys")).status_code == 503
        assert (await revoke(cluster, key)).status_code == 503
        assert await status(cluster, key, url=second) == 200
    assert (await revoke(cluster, key)).status_code == 200
    await eventually(lambda: _is(cluster, key, 401, second), timeout_s=5)


async def test_redis_comes_back_empty(cluster: Cluster, second: str, eventually: Eventually) -> None:
    """The gateways give it the keys back; a revoked one stays revoked, also at a gateway that starts afterwards."""
    key, gone = await make(cluster, "kept"), await make(cluster, "ended")
    await revoke(cluster, gone)
    async with redis_away(cluster, eventually, forget=True):
        assert await status(cluster, key) == 200
    await eventually(lambda: _listed(cluster, key, second))
    newcomer = await cluster.start_gateway()
    url = cluster.urls[-1]
    try:
        assert await status(cluster, key, url=url) == 200
        # The second gateway may not have heard of the revocation, and be the first to give the keys back.
        await eventually(lambda: _is(cluster, gone, 401, url), timeout_s=5)
    finally:
        await newcomer.stop()
        cluster.gateways.remove(newcomer)
        cluster.urls.remove(url)


async def _listed(cluster: Cluster, key: dict[str, Any], url: str) -> bool:
    listed = await cluster.http.get(url + "/v1/keys")
    return listed.status_code == 200 and key["id"] in [one["id"] for one in listed.json()["data"]]


async def test_a_gateway_that_starts_without_redis(cluster: Cluster, eventually: Eventually) -> None:
    """It knows the bootstrap key; callers with others are told to try again, and get in as soon as Redis is back."""
    key = await make(cluster, "early")
    async with redis_away(cluster, eventually):
        newcomer = await cluster.start_gateway()
        url = cluster.urls[-1]
        assert await status(cluster, KEY, url=url) == 200
        asked = await cluster.http.get(url + "/v1/models", headers=bearer(key))
        assert (asked.status_code, asked.json()["error"]["code"]) == (503, "unavailable")
        assert int(asked.headers["retry-after"]) >= 1
        assert await status(cluster, "sk-nobody", url=url) == 401
    try:
        await eventually(lambda: _is(cluster, key, 200, url))
    finally:
        await newcomer.stop()
        cluster.gateways.remove(newcomer)
        cluster.urls.remove(url)


async def test_a_key_expires(cluster: Cluster, second: str, eventually: Eventually) -> None:
    """By itself, at every gateway, and the refusal says so."""
    key = await make(cluster, "brief", expires_in=1)
    for url in (cluster.url, second):
        await eventually(lambda url=url: _is(cluster, key, 401, url))
        refused = await cluster.http.get(url + "/v1/models", headers=bearer(key))
        assert "expired" in refused.json()["error"]["message"]


async def test_the_command_line(cluster: Cluster) -> None:
    """Make a key, use it, list it, revoke it."""

    async def nexus(*arguments: str) -> Any:
        process = await asyncio.create_subprocess_exec(
            *(*forked("cli.main"), "keys", *arguments, "--url", cluster.url, "--key", KEY, "--json"),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        return json.loads(out)

    key = await nexus("create", "by-hand", "--scope", "inference", "--expires", "2h", "--max-running", "3")
    assert (key["owner"], key["scopes"], key["max_running"]) == ("by-hand", ["inference"], 3)
    assert await status(cluster, key) == 200
    assert key["id"] in [one["id"] for one in (await nexus("list"))["data"]]
    assert (await nexus("revoke", key["id"]))["deleted"] is True
    assert await status(cluster, key) == 401
