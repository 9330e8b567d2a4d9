"""What is left on the disks of all servers, and in all logs, of requests of teams that keep nothing."""

from __future__ import annotations

import asyncio
import base64
import json
import mmap
import os
from pathlib import Path
from typing import Any

import httpx
import nats
import pytest
import pytest_asyncio

from tests.cluster import Cluster, Crew, chat
from tests.conftest import Eventually
from tests.flow.conftest import SETTINGS
from tests.flow.test_keys import bearer, make

pytestmark = pytest.mark.asyncio(loop_scope="module")

VAULT = "vault"
"""A team with a key."""


@pytest.fixture(scope="module")
def cluster_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The usual ones, and a file with a key."""
    path = tmp_path_factory.mktemp("keys") / "teams.json"
    key = base64.b64encode(os.urandom(32)).decode()
    path.write_text(json.dumps({VAULT: [{"id": "1", "key": key}]}))
    return SETTINGS | {"TEAM_KEYS_FILE": str(path)}


LARGE = "x" * 600_000
"""Too large for a message: it travels as a blob, and so does the echo."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def quiet(cluster: Cluster) -> dict[str, Any]:
    """A key of a team that keeps nothing."""
    made = await cluster.post("/v1/teams", {"id": "quiet", "retain": "none"})
    assert made.status_code == 201, made.text
    return await make(cluster, "quiet", owner="quiet")


def found(folder: Path, marker: str) -> set[str]:
    """The files below `folder` that hold the marker."""
    names = set()
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                if data.find(marker.encode()) >= 0:
                    names.add(str(path.relative_to(folder)))
    return names


async def ask(cluster: Cluster, key: dict[str, Any], body: dict[str, Any], **headers: str) -> httpx.Response:
    return await cluster.post("/v1/chat/completions", body, headers=bearer(key) | headers)


async def test_direct_requests_leave_nothing(
    cluster: Cluster, crew: Crew, quiet: dict[str, Any], eventually: Eventually
) -> None:
    """Neither while they wait nor after the answer, which is whole; an ordinary request's prompt is found in the same way."""
    open_key = await make(cluster, "open", owner="open")
    worker = cluster.workers[await crew.start()]
    worker.pause()
    markers = [f"secret-{number}-{crew.model}" for number in range(3)]
    bodies = [
        chat(markers[0], model=crew.model),
        chat(markers[1] + LARGE, model=crew.model),
        chat(markers[2], model=crew.model, stream=True),
    ]
    answers = [asyncio.create_task(ask(cluster, quiet, body)) for body in bodies]
    control = asyncio.create_task(ask(cluster, open_key, chat("open-marker", model=crew.model)))
    await eventually(lambda: found(cluster.folder, "open-marker"))
    await eventually(lambda: _stored(cluster, crew.model, 4))
    for marker in markers:
        assert found(cluster.folder, marker) == set()
    worker.resume()
    for marker, answer in zip(markers, await asyncio.gather(*answers), strict=True):
        assert answer.status_code == 200
        assert marker in answer.text
        assert found(cluster.folder, marker) == set()
    assert "open-marker" in (await control).text


async def _stored(cluster: Cluster, model: str, jobs: int) -> bool:
    return await cluster.stored(model) == jobs


async def test_jobs_leave_nothing(cluster: Cluster, crew: Crew, quiet: dict[str, Any], eventually: Eventually) -> None:
    """Whatever makes a request a job: neither its prompt, nor its answer, nor the key that would decrypt what is stored."""
    worker = cluster.workers[await crew.start()]
    worker.pause()
    markers = [f"hidden-{number}-{crew.model}" for number in range(4)]
    job = (await ask(cluster, quiet, chat(markers[0], model=crew.model), prefer="respond-async")).json()["id"]
    ways = [
        ask(cluster, quiet, chat(markers[1] + LARGE, model=crew.model), **{"idempotency-key": markers[1]}),
        ask(cluster, quiet, chat(markers[2], model=crew.model, stream=True), **{"idempotency-key": markers[2]}),
        cluster.post("/v1/responses", {"model": crew.model, "input": markers[3]}, headers=bearer(quiet)),
    ]
    answers = [asyncio.create_task(way) for way in ways]
    await eventually(lambda: _stored(cluster, crew.model, 4))
    key = await _content_key(cluster, job)
    await eventually(lambda: found(cluster.folder / "nats", key))
    worker.resume()
    for marker, answer in zip(markers[1:], await asyncio.gather(*answers), strict=True):
        assert answer.status_code == 200, answer.text
        assert marker in answer.text
    await eventually(lambda: _is_completed(cluster, quiet, job))
    result = await cluster.get(f"/v1/jobs/{job}/result", headers=bearer(quiet))
    assert markers[0] in result.text
    gone = await cluster.get(f"/v1/jobs/{job}/result", headers=bearer(quiet))
    assert gone.json()["error"]["code"] == "result_expired"
    for text in (*markers, key):
        assert found(cluster.folder, text) == set()


async def test_what_is_kept_of_a_team_with_a_key_cannot_be_read(
    cluster: Cluster, crew: Crew, eventually: Eventually
) -> None:
    """By who has all disks: a job and its result, a stored response, a file, a batch; their owner reads them as ever."""
    await crew.start()
    key = await make(cluster, VAULT, owner=VAULT)
    own: dict[str, Any] = {"headers": bearer(key)}
    markers = [f"kept-{number}-{crew.model}" for number in range(4)]
    job = (await ask(cluster, key, chat(markers[0], model=crew.model), prefer="respond-async")).json()["id"]
    answer = (await cluster.post("/v1/responses", {"model": crew.model, "input": markers[1]}, **own)).json()
    line = {"custom_id": markers[3], "method": "POST", "url": "/v1/chat/completions"}
    lines = json.dumps(line | {"body": chat(markers[2], model=crew.model)}).encode()
    upload: dict[str, Any] = {"files": {"file": (markers[3], lines)}, "data": {"purpose": "batch"}}
    file = (await cluster.http.post(cluster.url + "/v1/files", **upload, **own)).json()["id"]
    wanted = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch = (await cluster.post("/v1/batches", wanted, **own)).json()["id"]
    await eventually(lambda: _is_completed(cluster, key, job))
    output = await eventually(lambda: _output(cluster, key, batch))
    for path, text in (
        (f"/v1/jobs/{job}/result", markers[0]),
        (f"/v1/responses/{answer['id']}", markers[1]),
        (f"/v1/responses/{answer['id']}/input_items", markers[1]),
        (f"/v1/files/{file}/content", markers[2]),
        (f"/v1/files/{output}/content", markers[2]),
    ):
        read = await cluster.get(path, **own)
        assert (read.status_code, text in read.text) == (200, True), (path, read.text[:500])
    for marker in markers[:3]:
        assert found(cluster.folder, marker) == set()


async def _output(cluster: Cluster, key: dict[str, Any], batch: str) -> str | None:
    answer = await cluster.get(f"/v1/batches/{batch}", headers=bearer(key))
    found: str | None = answer.json()["output_file_id"]
    return found


async def _is_completed(cluster: Cluster, key: dict[str, Any], job: str) -> bool:
    record = await cluster.get(f"/v1/jobs/{job}", headers=bearer(key))
    return bool(record.json()["status"] == "completed")


async def _content_key(cluster: Cluster, job: str) -> str:
    """Return the content key of a job as NATS stores it."""
    client = await nats.connect(cluster.nats.url)
    try:
        stored = await client.jetstream().get_last_msg("KV_nexus-content-keys", f"$KV.nexus-content-keys.{job}")
        return str(json.loads(stored.data or b"")["key"])
    finally:
        await client.close()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/images/generations", {"model": "m", "prompt": "p", "response_format": "url"}),
        ("/v1/files", {}),
        ("/v1/responses", {"model": "m", "input": "i", "store": True}),
        ("/v1/responses", {"model": "m", "input": "i", "background": True}),
        ("/v1/batches", {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"}),
    ],
)
async def test_what_needs_retention_is_refused(
    cluster: Cluster, quiet: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    """With an error that names the reason."""
    refused = await cluster.post(path, body, headers=bearer(quiet))
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "retention_not_allowed"), refused.text
