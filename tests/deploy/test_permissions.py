"""Least privilege in NATS: the committed configuration lets everybody do their work, and refuses each thing beyond it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from nats.aio.client import Client

from cli.permissions import render_permissions_conf
from schemas.control import Control, ControlOp
from tests.cluster import chat
from tests.conftest import Eventually
from tests.deploy.production import DEPLOY, log_lines, worker_settings
from tests.deploy.secured import MODEL, OTHERS, World

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(autouse=True)
async def no_violations(world: World, request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Nobody asked for what it may not do, but who does so on purpose."""
    before = len(world.violations())
    yield
    if "forbidden" not in request.node.name:
        assert world.violations()[before:] == []
        for process in [*world.cluster.gateways, *world.cluster.workers.values()]:
            assert [line for line in log_lines(process.log_file) if line.get("event") == "nats.access_refused"] == []


async def test_the_committed_roles_are_the_codes() -> None:
    """deploy/nats/permissions.conf is what `nexus permissions config` prints."""
    assert (DEPLOY / "nats" / "permissions.conf").read_text() == render_permissions_conf()


async def test_chat_is_served(world: World) -> None:
    """Whole and as a stream, to the worker that has the right to it."""
    answer = await world.cluster.post("/v1/chat/completions", chat("one two", model=MODEL))
    assert answer.status_code == 200, answer.text
    lines = [line async for line in world.cluster.stream(chat("one two", model=OTHERS))]
    assert lines[-1] == "[DONE]"


async def test_large_answers_and_uploads_go_by_reference(world: World, eventually: Eventually) -> None:
    """The worker writes a blob, reads one, and leaves none."""
    size = 2 * 1024 * 1024
    body = {"model": MODEL, "prompt": "noise", "echo": {"size": size}}
    answer = await world.cluster.post("/v1/images/generations", body)
    assert len(base64.b64decode(answer.json()["data"][0]["b64_json"])) == size
    sound = {"file": ("a.wav", b"RIFF" + bytes(2 * 1024 * 1024), "audio/wav")}
    url = f"{world.cluster.url}/v1/audio/transcriptions"
    heard = await world.cluster.http.post(url, files=sound, data={"model": MODEL})
    assert heard.status_code == 200, heard.text
    admin = await world.user("admin", "admin/nats-password")

    async def is_empty() -> bool:
        return (await admin.jetstream().stream_info("OBJ_nexus-blobs")).state.messages == 0

    await eventually(is_empty)
    await admin.close()


async def _job(world: World, model: str, **fields: Any) -> str:
    body = {"endpoint": "/v1/chat/completions", "body": chat("one two three", model=model, **fields)}
    answer = await world.cluster.post("/v1/jobs", body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def _ended(world: World, job: str) -> dict[str, Any]:
    for _ in range(20):
        record = (await world.cluster.get(f"/v1/jobs/{job}?wait=10")).json()
        if record["finished_at"] is not None:
            return dict(record)
    raise AssertionError(record)


async def test_durable_jobs_have_events_and_results(world: World) -> None:
    """Events, the word, and large results by reference."""
    job = await _job(world, MODEL, stream=True)
    assert (await _ended(world, job))["status"] == "completed"
    events = (await world.cluster.get(f"/v1/jobs/{job}/events")).text
    assert "event: job.started" in events
    assert "event: job.chunk" in events
    body = {"model": MODEL, "prompt": "noise", "echo": {"size": 1024 * 1024}}
    large = (await world.cluster.post("/v1/jobs", {"endpoint": "/v1/images/generations", "body": body})).json()["id"]
    assert (await _ended(world, large))["status"] == "completed"
    result = await world.cluster.get(f"/v1/jobs/{large}/result")
    assert len(result.content) > 1024 * 1024


async def test_a_long_job_is_kept_by_heartbeats(world: World, eventually: Eventually) -> None:
    """Longer than `ACK_WAIT_S`: one attempt, because the worker may say that it lives."""
    answer = await world.cluster.post(
        "/v1/chat/completions", chat("one two three four five", model=MODEL, echo={"delay_ms": 700})
    )
    assert answer.status_code == 200, answer.text
    job = answer.headers["x-nexus-job-id"]
    (told,) = await eventually(lambda: [one for one in world.cluster.requests() if one.get("job") == job])
    assert told["attempts"] == 1


async def test_a_cancelled_job_stops(world: World, eventually: Eventually) -> None:
    """The worker hears its control subject."""
    job = await _job(world, MODEL, echo={"delay_ms": 60_000})

    async def runs() -> bool:
        return (await world.cluster.get(f"/v1/jobs/{job}")).json()["status"] == "in_progress"

    await eventually(runs)
    await world.cluster.post(f"/v1/jobs/{job}/cancel", {})
    assert (await _ended(world, job))["status"] == "cancelled"
    await eventually(lambda: any(one["outcome"] == "cancelled" for one in world.cluster.attempts("gpu1")))


async def test_a_job_that_fails_for_good_is_buried(world: World) -> None:
    """Three transient failures: a dead letter, which the gateway shows and replays."""
    job = await _job(world, MODEL, echo={"fail": "unavailable"})
    assert (await _ended(world, job))["status"] == "failed"
    letters = (await world.cluster.get("/v1/dlq")).json()["data"]
    assert job in json.dumps(letters)


async def test_a_batch_runs(world: World) -> None:
    """The gateways' own queues."""
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat("one", model=MODEL)}
    files = {"file": ("in.jsonl", json.dumps(line).encode(), "application/jsonl")}
    url = f"{world.cluster.url}/v1/files"
    file = (await world.cluster.http.post(url, files=files, data={"purpose": "batch"})).json()
    wanted = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = (await world.cluster.post("/v1/batches", wanted)).json()
    for _ in range(200):
        batch = (await world.cluster.get(f"/v1/batches/{batch['id']}")).json()
        if batch["status"] in {"completed", "failed"}:
            break
        await asyncio.sleep(0.1)
    assert batch["status"] == "completed", batch


async def test_the_admin_surface_works(world: World) -> None:
    """Readiness, queues, metrics: all that the gateway reads of NATS."""
    for path in ("/readyz", "/v1/queues", "/metrics", "/v1/workers"):
        answer = await world.cluster.get(path)
        assert answer.status_code == 200, (path, answer.text)
    assert (await world.cluster.get("/readyz")).json()["status"] == "ready"


async def test_a_worker_with_a_role_for_all_queues_serves(world: World) -> None:
    """User `worker`, by whatever name its process has; it drains like any other."""
    name = await world.cluster.start_worker(name="anyone", WORKER_MODELS="third", **worker_settings(world.secrets))
    assert (await world.cluster.post("/v1/chat/completions", chat("hi", model="third"))).status_code == 200
    assert (await world.cluster.post(f"/v1/workers/{name}/drain", {})).status_code in {200, 202}
    await world.cluster.wait_for_worker(name, None)
    assert await world.cluster.workers[name].wait() == 0


# What is refused

CHAT = "chat_default_org_2fmodel_3a8b"
THEIRS = f"chat_default_{OTHERS}"
PUBLISHING = {
    "a job": ("nexus.jobs.chat.default.org_2fmodel_3a8b", b"x"),
    "read the jobs by sequence": ("$JS.API.STREAM.MSG.GET.NEXUS_JOBS", b'{"seq":1}'),
    "read the jobs directly": ("$JS.API.DIRECT.GET.NEXUS_JOBS", b'{"seq":1,"next_by_subj":">"}'),
    "read the newest job": ("$JS.API.DIRECT.GET.NEXUS_JOBS.nexus.jobs.chat.default.another", b""),
    "read events": ("$JS.API.DIRECT.GET.NEXUS_EVENTS", b'{"seq":1}'),
    "read words": ("$JS.API.DIRECT.GET.NEXUS_DONE", b'{"seq":1}'),
    "read dead letters": ("$JS.API.STREAM.MSG.GET.NEXUS_DLQ", b'{"seq":1}'),
    "read blobs by sequence": ("$JS.API.DIRECT.GET.OBJ_nexus-blobs", b'{"seq":1,"next_by_subj":">"}'),
    "read blobs of the leader": ("$JS.API.STREAM.MSG.GET.OBJ_nexus-blobs", b'{"seq":1}'),
    "write over a gateway's blob": ("$O.nexus-blobs.C.aaaa.0", b"x"),
    "describe a gateway's blob": ("$O.nexus-blobs.M.aaaa", b"x"),
    "write over another worker's blob": ("$O.nexus-blobs.C.gpu2.aaaa.0", b"x"),
    "describe another worker's blob": ("$O.nexus-blobs.M.gpu2.aaaa", b"x"),
    "write over every blob": ("$O.nexus-blobs.C.*.*.*", b"x"),
    "read another worker's blob": ("$JS.API.DIRECT.GET.OBJ_nexus-blobs.$O.nexus-blobs.C.gpu2.aaaa.0", b""),
    "read the description of another worker's blob": (
        "$JS.API.DIRECT.GET.OBJ_nexus-blobs.$O.nexus-blobs.M.gpu2.aaaa",
        b"",
    ),
    "read claims": ("$JS.API.DIRECT.GET.KV_nexus-idempotency", b'{"seq":1}'),
    "read content keys": ("$JS.API.DIRECT.GET.KV_nexus-content-keys", b'{"seq":1}'),
    "read the gateways' secret": ("$JS.API.DIRECT.GET.KV_nexus-seals.$KV.nexus-seals.secret", b""),
    "read the gateways' secret by sequence": ("$JS.API.DIRECT.GET.KV_nexus-seals", b'{"seq":1}'),
    "ask the leader for the gateways' secret": ("$JS.API.STREAM.MSG.GET.KV_nexus-seals", b'{"seq":1}'),
    "write the gateways' secret": ("$KV.nexus-seals.secret", b"x" * 32),
    "write a claim": ("$KV.nexus-idempotency.x", b"x"),
    "create a consumer": ("$JS.API.CONSUMER.CREATE.NEXUS_JOBS.mine", b"{}"),
    "create a consumer, the old way": ("$JS.API.CONSUMER.CREATE.NEXUS_EVENTS", b"{}"),
    "create a durable consumer": ("$JS.API.CONSUMER.DURABLE.CREATE.NEXUS_JOBS.mine", b"{}"),
    "delete a consumer": (f"$JS.API.CONSUMER.DELETE.NEXUS_JOBS.{CHAT}", b""),
    "pause a consumer": (f"$JS.API.CONSUMER.PAUSE.NEXUS_JOBS.{CHAT}", b"{}"),
    "look at a consumer": (f"$JS.API.CONSUMER.INFO.NEXUS_JOBS.{CHAT}", b""),
    "list consumers": ("$JS.API.CONSUMER.LIST.NEXUS_JOBS", b""),
    "pull what others are given": (f"$JS.API.CONSUMER.MSG.NEXT.NEXUS_JOBS.{THEIRS}", b'{"batch":1,"no_wait":true}'),
    "pull another capability of another's": (
        "$JS.API.CONSUMER.MSG.NEXT.NEXUS_JOBS.images_default_another",
        b'{"batch":1}',
    ),
    "take words": ("$JS.API.CONSUMER.MSG.NEXT.NEXUS_DONE.recorder", b'{"batch":1}'),
    "take webhooks": ("$JS.API.CONSUMER.MSG.NEXT.NEXUS_HOOKS.gateways", b'{"batch":1}'),
    "acknowledge what others were given": (f"$JS.ACK.NEXUS_JOBS.{THEIRS}.1.1.1.1.0", b"+ACK"),
    "acknowledge words": ("$JS.ACK.NEXUS_DONE.recorder.1.1.1.1.0", b"+ACK"),
    "purge jobs": ("$JS.API.STREAM.PURGE.NEXUS_JOBS", b""),
    "purge blobs": ("$JS.API.STREAM.PURGE.OBJ_nexus-blobs", b""),
    "delete a job": ("$JS.API.STREAM.MSG.DELETE.NEXUS_JOBS", b'{"seq":1}'),
    "delete a stream": ("$JS.API.STREAM.DELETE.NEXUS_DONE", b""),
    "create a stream": ("$JS.API.STREAM.CREATE.MINE", b'{"name":"MINE","subjects":["mine"]}'),
    "change a stream": ("$JS.API.STREAM.UPDATE.NEXUS_JOBS", b"{}"),
    "look at a stream": ("$JS.API.STREAM.INFO.NEXUS_JOBS", b""),
    "list streams": ("$JS.API.STREAM.NAMES", b""),
    "take a snapshot": ("$JS.API.STREAM.SNAPSHOT.NEXUS_JOBS", b'{"deliver_subject":"_INBOX.gpu1.x"}'),
    "look at the account": ("$JS.API.INFO", b""),
    "ask the server": ("$SYS.REQ.SERVER.PING", b""),
    "control another worker": ("nexus.control.gpu2", Control(op=ControlOp.DRAIN).model_dump_json().encode()),
    "control itself": ("nexus.control.gpu1", b"{}"),
    "answer another's question": ("_INBOX.gpu2.x", b"GO"),
    "tell of keys": ("nexus.notice.keys", b""),
    "write a webhook": ("nexus.hooks.x", b"x"),
    "write a batch": ("nexus.batches.x", b"x"),
    "bury what is not its own": ("nexus.dlq.chat.another", b"x"),
    "ring a bell": ("nexus.bell.chat.default.another", b""),
    "tell events to followers": ("nexus.told.job_1", b"x"),
    "tell ends to followers": ("nexus.ended.job_1", b"x"),
    "anything else": ("hello", b"x"),
}
SUBSCRIBING = {
    "everything": ">",
    "replies": "nexus.reply.>",
    "all inboxes": "_INBOX.>",
    "another worker's inbox": "_INBOX.gpu2.>",
    "the gateway's inbox": "_INBOX.gateway.>",
    "jobs": "nexus.jobs.>",
    "events as they are told": "nexus.told.>",
    "events as they are stored": "nexus.events.>",
    "words": "nexus.done.*",
    "ends": "nexus.ended.>",
    "questions": "nexus.ask.*",
    "dead letters": "nexus.dlq.>",
    "another worker's control": "nexus.control.gpu2",
    "all control": "nexus.control.*",
    "notices": "nexus.notice.>",
    "bells of others": f"nexus.bell.chat.*.{OTHERS}",
    "all bells": "nexus.bell.>",
    "blobs as they are written": "$O.nexus-blobs.>",
    "claims": "$KV.>",
    "acknowledgements": "$JS.ACK.>",
    "requests to JetStream": "$JS.API.>",
    "advisories": "$JS.EVENT.>",
    "the system": "$SYS.>",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def intruder(world: World) -> AsyncIterator[tuple[Client, list[str]]]:
    """Somebody with the credentials of worker `gpu1`."""
    errors: list[str] = []
    client = await world.user("gpu1", "worker-gpu1/nats-password", errors)
    yield client, errors
    await client.close()


async def _refusals(client: Client, errors: list[str]) -> list[str]:
    """What the server has refused since the last time; its word comes before its answer to a ping."""
    for _ in range(2):  # nats-py sends the first ping before what it still had to publish
        await client.flush()
    found, errors[:] = [error for error in errors if "permissions violation" in error.lower()], []
    return found


@pytest.mark.parametrize("what", PUBLISHING)
async def test_forbidden_to_publish(intruder: tuple[Client, list[str]], what: str) -> None:
    """Each thing beyond a worker's work, refused by the server."""
    client, errors = intruder
    subject, payload = PUBLISHING[what]
    await client.publish(subject, payload, reply="_INBOX.gpu1.intruder")
    assert len(await _refusals(client, errors)) == 1, subject


@pytest.mark.parametrize("what", SUBSCRIBING)
async def test_forbidden_to_hear(intruder: tuple[Client, list[str]], what: str) -> None:
    """Each subject that is not a worker's own."""
    client, errors = intruder
    await client.subscribe(SUBSCRIBING[what])
    assert len(await _refusals(client, errors)) == 1, SUBSCRIBING[what]


@pytest.mark.parametrize(
    "subject",
    [f"$JS.API.CONSUMER.MSG.NEXT.NEXUS_JOBS.{CHAT}", "nexus.reply.x.y", "nexus.ask.x", "$O.nexus-blobs.C.gpu1.x.0"],
)
async def test_the_same_client_may_do_its_work(intruder: tuple[Client, list[str]], subject: str) -> None:
    """So that the refusals above are not those of a broken client."""
    client, errors = intruder
    await client.publish(subject, b'{"batch":1,"no_wait":true}', reply="_INBOX.gpu1.intruder")
    assert await _refusals(client, errors) == []


@pytest.mark.parametrize("headers", [{"Nats-Rollup": "all"}, {"Nats-Rollup": "sub"}, {}])
async def test_a_worker_cannot_empty_the_bucket(
    world: World, intruder: tuple[Client, list[str]], headers: dict[str, str]
) -> None:
    """Whatever it writes where its own blobs may be: others' stay."""
    other = await world.user("gpu2", "worker-gpu2/nats-password")
    kept = "$O.nexus-blobs.M.gpu2.a2VwdA=="
    await other.request(kept, b"kept")
    client, _ = intruder
    for _ in range(2):
        for subject in ("$O.nexus-blobs.M.gpu1.*", "$O.nexus-blobs.C.gpu1.*.*", "$O.nexus-blobs.M.gpu1.mine"):
            await client.request(subject, b"", headers=headers)
    assert (await other.request(f"$JS.API.DIRECT.GET.OBJ_nexus-blobs.{kept}", b"")).data == b"kept"
    await other.close()


@pytest.mark.parametrize(
    "subject", ["$JS.API.STREAM.MSG.GET.NEXUS_DONE", "$JS.API.DIRECT.GET.NEXUS_JOBS", "nexus.jobs.chat.default.x", "x"]
)
async def test_forbidden_to_a_monitor(world: World, subject: str) -> None:
    """It reads no message, and writes none."""
    errors: list[str] = []
    client = await world.user("monitor", "monitor/nats-password", errors)
    assert (await client.request("$JS.API.STREAM.INFO.NEXUS_JOBS", b"")).data.startswith(b'{"type"')
    await client.publish(subject, b'{"seq":1}', reply="_INBOX.monitor.x")
    assert len(await _refusals(client, errors)) == 1
    await client.close()


async def test_a_forbidden_name_is_told_once(world: World) -> None:
    """A worker whose name is not its user's: one line names each thing that is missing; nothing spins, and no secret is told."""
    settings = worker_settings(world.secrets, "gpu2") | {"WORKER_MODELS": OTHERS}
    name = await world.cluster.start_worker(name="forbidden", wait=False, **settings)
    process = world.cluster.workers[name]
    for _ in range(200):
        lines = [line for line in log_lines(process.log_file) if line.get("event") == "nats.access_refused"]
        if any("nexus.control.forbidden" in str(line["error"]) for line in lines):
            break
        await asyncio.sleep(0.05)
    await process.stop()
    world.cluster.workers.pop(name)
    said = [str(line["error"]) for line in lines]
    assert {line["level"] for line in lines} == {"error"}
    assert any("nexus.control.forbidden" in text for text in said), said
    assert len(said) == len(set(said))
    assert world.secrets.text("worker-gpu2/nats-password") not in process.log_file.read_text()


# What NATS's permissions cannot hold: here so that a server which can is noticed. docs/how-to/deployment.md says what mitigates each.


async def test_who_knows_a_jobs_id_can_end_it(world: World) -> None:
    """A subject is a job's, not a worker's: that ids are not told to other workers is what protects them."""
    client = await world.user("gpu2", "worker-gpu2/nats-password")
    answer = json.loads((await client.request("nexus.done.job_of_gpu1", b"forged")).data)
    assert answer["stream"] == "NEXUS_DONE"
    await client.close()


async def test_a_wildcard_for_a_name_finds_the_newest_blob(world: World) -> None:
    """nats-server takes a star in a published subject for a star in what is looked up: what is found there is sealed."""
    secret = b"FILE-SECRET-" * 100_000
    files, data = {"file": ("x.txt", secret, "text/plain")}, {"purpose": "user_data"}
    uploaded = await world.cluster.http.post(world.cluster.url + "/v1/files", files=files, data=data)
    other = await world.user("gpu2", "worker-gpu2/nats-password")
    for subject in ("C.*.*", "M.*"):
        found = await other.request(f"$JS.API.DIRECT.GET.OBJ_nexus-blobs.$O.nexus-blobs.{subject}", b"")
        assert found.data
        assert b"SECRET" not in found.data
        assert b"owner" not in found.data
    content = await world.cluster.get(f"/v1/files/{uploaded.json()['id']}/content")
    assert content.content == secret
    await world.cluster.http.delete(world.cluster.url + f"/v1/files/{uploaded.json()['id']}")
    await other.close()
