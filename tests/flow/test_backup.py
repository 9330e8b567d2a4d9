"""A Nexus saved while it works, lost with all its servers, and restored into new ones."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from backbone.registry.backup import RegistryBackup
from backbone.registry.etcd_client import EtcdClient
from backbone.settings import CommonSettings
from cli.backup.archive import read_manifest, verify
from cli.backup.command import _backup, _restore
from cli.backup.connections import parse_kinds
from cli.errors import ConsoleError
from tests.backbone.job_logs import World, new_job, outcome_of
from tests.cluster import KEY, Cluster, chat
from tests.conftest import Eventually
from tests.flow.conftest import SETTINGS
from tests.flow.test_jobs import Event
from tests.flow.test_webhooks import ERROR, OK, Receiver, receiving
from tests.fork_server import forked
from tests.servers import here

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

CHAT = "/v1/chat/completions"
ENDED = {"completed", "failed", "cancelled", "expired"}
WORKS, WAITS, SLOW = "works", "waits", "slow"
"""Models: one with workers, one whose worker has gone, one whose jobs outlast the backup."""
HOOKED: dict[str, Any] = SETTINGS | {
    "WEBHOOK_RETRIES_S": ",".join(["1"] * 500),
    "WEBHOOK_PRIVATE_HOSTS": here(),
}


class Nexus:
    """A cluster, and what this file asks of it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.http = cluster.http

    async def run(self, *arguments: str) -> tuple[int, str]:
        """`nexus ...`; its exit code and what it said."""
        process = await asyncio.create_subprocess_exec(
            *(*forked("cli.main"), *arguments),
            env=self.cluster.environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        return process.returncode or 0, said.decode()

    @property
    def settings(self) -> CommonSettings:
        cluster = self.cluster
        return CommonSettings(nats_url=cluster.nats.url, etcd_url=cluster.etcd.url, redis_url=cluster.redis.url)

    async def save(self, folder: Path) -> None:
        """`nexus backup` without a process of its own."""
        await _backup(self.settings, folder, parse_kinds(""), print)

    async def restore(self, folder: Path, *, force: bool = False, only: str = "") -> str:
        """`nexus restore` without a process of its own; why it refused."""
        manifest = read_manifest(folder)
        try:
            await _restore(self.settings, folder, manifest, parse_kinds(only), force=force, replicas=None, notify=print)
        except ConsoleError as error:
            return str(error)
        return ""

    async def start_all(self, *, slowly: bool) -> None:
        """A gateway, and workers for all models."""
        await self.cluster.start_gateway()
        await self.worker(WORKS)
        await self.worker(WAITS)
        await self.worker(SLOW, "delay_ms=600000" if slowly else "")

    async def worker(self, model: str, options: str = "slots=8") -> str:
        return await self.cluster.start_worker(WORKER_MODELS=model, WORKER_BACKEND_OPTIONS=options)

    async def submit(self, content: str, model: str = WORKS, *, job: dict[str, Any] | None = None, **more: Any) -> str:
        headers = {"authorization": f"Bearer {more.pop('key', KEY)}"}
        body = {"endpoint": CHAT, "body": chat(content, model=model, **more), **(job or {})}
        answer = await self.cluster.post("/v1/jobs", body, headers=headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    async def end(self, job: str, key: str = KEY) -> dict[str, Any]:
        answer = await self.get(f"/v1/jobs/{job}?wait=60", key)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        assert found["status"] in ENDED, found
        return found

    async def get(self, path: str, key: str = KEY) -> httpx.Response:
        return await self.cluster.get(path, headers={"authorization": f"Bearer {key}"})

    async def result(self, job: str, key: str = KEY) -> bytes:
        answer = await self.get(f"/v1/jobs/{job}/result", key)
        return b"%d " % answer.status_code + answer.content

    async def events(self, job: str, after: str = "") -> list[Event]:
        found, fields = [], dict[str, str]()
        headers = {"last-event-id": after} if after else {}
        async with self.http.stream("GET", f"{self.cluster.url}/v1/jobs/{job}/events", headers=headers) as response:
            assert response.status_code == 200, (await response.aread()).decode()
            async for line in response.aiter_lines():
                if line and not line.startswith(":"):
                    name, _, value = line.partition(": ")
                    fields[name] = value
                elif not line and fields:
                    found.append(Event(fields["event"], fields.get("id", ""), json.loads(fields["data"])))
                    fields = {}
        return found

    async def upload(self, name: str, content: bytes, purpose: str = "user_data") -> str:
        answer = await self.http.post(
            f"{self.cluster.url}/v1/files", files={"file": (name, content)}, data={"purpose": purpose}
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    async def keyed(self, key: str, content: str) -> httpx.Response:
        """A chat under an idempotency key."""
        return await self.cluster.post(CHAT, chat(content, model=WORKS), headers={"idempotency-key": key})

    def ran(self) -> list[str]:
        """The jobs of all attempts that workers have ended here."""
        return [event["job"] for name in self.cluster.workers for event in self.cluster.attempts(name)]


@dataclass
class Kept:
    """What was there before the backup began."""

    finished: dict[str, bytes] = field(default_factory=dict)
    """Jobs with their results, byte for byte."""
    open: list[str] = field(default_factory=list)
    """Jobs that wait or run."""
    streamed: str = ""
    events: list[Event] = field(default_factory=list)
    dead: str = ""
    hooked: str = ""
    key: str = ""
    keys_job: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    response: dict[str, Any] = field(default_factory=dict)
    batch: str = ""
    answer: bytes = b""
    """What the idempotency key was answered with."""


async def fill(nexus: Nexus, receiver: Receiver) -> Kept:
    """One of each kind."""
    kept = Kept()
    cluster = nexus.cluster
    await cluster.http.put(f"{cluster.url}/v1/aliases/by-another-name", json={"targets": [WORKS]})
    made = await cluster.post("/v1/keys", {"name": "alice", "owner": "alice"})
    kept.key = made.json()["key"]
    kept.keys_job = await nexus.submit("hers", key=kept.key)
    finished = [await nexus.submit(f"text {number}") for number in range(8)]
    large = await nexus.submit("large", echo={"size": 700_000})
    refused = await nexus.submit("no", echo={"fail": "refuse"})
    kept.dead = await nexus.submit("dead", echo={"fail": "before"})
    kept.streamed = await nexus.submit("one two three four", stream=True)
    kept.hooked = await nexus.submit("told", job={"webhook": {"url": receiver.url}})
    cancelled = await nexus.submit("never", WAITS)
    await cluster.post(f"/v1/jobs/{cancelled}/cancel", {})
    for job in (*finished, large, refused, kept.dead, kept.streamed, kept.hooked, cancelled):
        await nexus.end(job)
        kept.finished[job] = await nexus.result(job)
    kept.finished[kept.keys_job] = await nexus.result(kept.keys_job, kept.key)
    kept.events = await nexus.events(kept.streamed)
    kept.open += [await nexus.submit(f"waits {number}", WAITS) for number in range(12)]
    kept.open += [await nexus.submit("w" * 900_000, WAITS)]
    kept.open += [await nexus.submit("runs until it is lost", SLOW) for number in range(2)]
    for content in (b"small", os.urandom(3_000_000)):
        kept.files[await nexus.upload("file", content)] = content
    answer = await cluster.post("/v1/responses", {"model": WORKS, "input": "remember me"})
    kept.response = (await nexus.get(f"/v1/responses/{answer.json()['id']}")).json()
    kept.answer = (await nexus.keyed("once", "only once")).content
    lines = [
        json.dumps({"custom_id": f"r{number}", "method": "POST", "url": CHAT, "body": chat(f"l{number}", model=model)})
        for number, model in enumerate([WORKS] * 30 + [WAITS] * 30)
    ]
    file = await nexus.upload("in.jsonl", "\n".join(lines).encode(), "batch")
    batch = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    kept.batch = (await cluster.post("/v1/batches", batch)).json()["id"]
    return kept


async def load(nexus: Nexus, jobs: list[str], stop: asyncio.Event) -> None:
    """Submit until told to stop."""
    while not stop.is_set():
        await asyncio.sleep(0.005)
        jobs.append(await nexus.submit(f"meanwhile {len(jobs)}", job={"metadata": {"when": "meanwhile"}}))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving(ERROR) as receiver:
        yield receiver


async def test_all_servers_lost_under_load_and_restored(
    tmp_path: Path, receiver: Receiver, eventually: Eventually
) -> None:
    """Every job of before the backup ends once, and those that had ended run no more; results, files, keys and events are as
    they were; batch and webhook go on.
    """
    folder, meanwhile = tmp_path / "saved", list[str]()
    async with Cluster(tmp_path / "old", **HOOKED) as cluster:
        nexus = Nexus(cluster)
        await nexus.start_all(slowly=True)
        await cluster.stop_workers("w2")  # what waits, waits
        kept = await fill(nexus, receiver)
        stop = asyncio.Event()
        under_load = [asyncio.create_task(load(nexus, meanwhile, stop)) for _ in range(1)]

        async def midway() -> bool:
            counts = (await nexus.get(f"/v1/batches/{kept.batch}")).json()["request_counts"]
            return counts["completed"] == 30 and len(meanwhile) >= 10

        await eventually(midway)
        before = list(meanwhile)
        code, said = await nexus.run("backup", str(folder))
        assert code == 0, said
        stop.set()
        await asyncio.gather(*under_load)
    verify(folder, read_manifest(folder).parts, print)
    assert [path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())].count(0o600) == len(
        list(folder.iterdir())
    )
    receiver.answers = [OK]
    told = len(receiver.got)
    async with Cluster(tmp_path / "new", **HOOKED) as cluster:
        nexus = Nexus(cluster)
        code, said = await nexus.run("restore", str(folder))
        assert code == 0, said
        await nexus.start_all(slowly=False)
        await check(nexus, kept, before, eventually)
        await eventually(lambda: len(receiver.got) > told, what="the webhook is told")
        assert receiver.got[-1].verified()["data"]["id"] == kept.hooked
        for job in meanwhile[len(before) :]:  # submitted while the backup was taken: saved, or not
            answer = await nexus.get(f"/v1/jobs/{job}?wait=60")
            assert answer.status_code == 404 or answer.json()["status"] == "completed", answer.text


async def check(nexus: Nexus, kept: Kept, before: list[str], eventually: Eventually) -> None:
    for job, result in kept.finished.items():
        key = kept.key if job == kept.keys_job else KEY
        await nexus.end(job, key)
        assert await nexus.result(job, key) == result
    for job in kept.open + before:
        assert (await nexus.end(job))["status"] == "completed"
    assert (await nexus.result(kept.open[12])).count(b"w" * 900_000) == 1
    resumed = await nexus.events(kept.streamed, kept.events[3].id)
    assert [(event.kind, event.id) for event in resumed] == [(event.kind, event.id) for event in kept.events[4:]]
    for file, content in kept.files.items():
        assert (await nexus.get(f"/v1/files/{file}/content")).content == content
    assert (await nexus.get(f"/v1/responses/{kept.response['id']}")).json() == kept.response
    assert [letter["id"] for letter in (await nexus.get("/v1/dlq")).json()["data"]] == [kept.dead]
    answer = await nexus.keyed("once", "only once")
    assert (answer.status_code, answer.content) == (200, kept.answer)
    assert (await nexus.keyed("once", "another")).status_code == 422
    aliased = await nexus.cluster.post(CHAT, chat("hello", model="by-another-name"))
    assert aliased.status_code == 200

    async def batch() -> dict[str, Any] | None:
        found: dict[str, Any] = (await nexus.get(f"/v1/batches/{kept.batch}")).json()
        return found if found["status"] == "completed" else None

    done = await eventually(batch, timeout_s=60)
    assert done["request_counts"] == {"total": 60, "completed": 60, "failed": 0}
    output = (await nexus.get(f"/v1/files/{done['output_file_id']}/content")).text.splitlines()
    assert [json.loads(line)["custom_id"] for line in output] == [f"r{number}" for number in range(60)]
    listed = {job["id"]: job["status"] for job in await everything(nexus)}
    assert {job: listed.get(job) for job in kept.open + before} == dict.fromkeys(kept.open + before, "completed")
    ran = nexus.ran()
    assert not set(ran) & set(kept.finished), "what had ended was run again"
    assert all(ran.count(job) <= 1 for job in kept.open + before)
    assert set(kept.open) <= set(ran)


async def everything(nexus: Nexus) -> list[dict[str, Any]]:
    """All jobs of the bootstrap key's owner that are listed."""
    found: list[dict[str, Any]] = []
    while True:
        after = f"&after={found[-1]['id']}" if found else ""
        page = (await nexus.get(f"/v1/jobs?limit=100{after}")).json()
        found += page["data"]
        if not page["has_more"]:
            return found


# One Nexus for the rest


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def old(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Nexus]:
    """Servers with a few jobs in them, and a gateway."""
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(Cluster(tmp_path_factory.mktemp("old"), **SETTINGS))
        nexus = Nexus(cluster)
        await cluster.start_gateway()
        worker = await nexus.worker(WORKS)
        for number in range(5):
            await nexus.end(await nexus.submit(f"text {number}"))
        await cluster.http.put(f"{cluster.url}/v1/aliases/old", json={"targets": [WORKS]})
        await cluster.workers[worker].stop(10)
        yield nexus


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def saved(old: Nexus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its backup."""
    folder = tmp_path_factory.mktemp("saved") / "backup"
    await old.save(folder)
    assert {part.name: part.items for part in read_manifest(folder).parts}["NEXUS_DONE"] == 5
    return folder


async def test_a_backup_replaces_nothing(old: Nexus, saved: Path, tmp_path: Path) -> None:
    """Neither a backup nor an empty folder nor a file."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("precious")
    for there in (saved, tmp_path / "empty", tmp_path / "file"):
        with pytest.raises(ConsoleError, match="already exists"):
            await old.save(there)
    assert (tmp_path / "file").read_text() == "precious"
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_a_backup_that_is_interrupted(old: Nexus, tmp_path: Path, number: signal.Signals) -> None:
    """After Redis was written: there is no such folder; what SIGKILL leaves is refused."""
    program = (
        "import os, sys; from cli import main; from cli.backup import command\n"
        f"command._make_notify = lambda **_: lambda line: line.startswith('redis') and os.kill(os.getpid(), {number:d})\n"
        "sys.argv = ['nexus', 'backup', sys.argv[1]]; main.main()"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", program, str(tmp_path / "backup")),
        env=old.cluster.environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    left = list(tmp_path.iterdir())
    if number is signal.SIGTERM:
        assert process.returncode == 130, said
        assert b"nothing was saved" in said
        assert left == []
    else:
        assert process.returncode == -signal.SIGKILL
        assert [path.name.startswith(".backup.partial-") for path in left] == [True]
        assert (left[0] / "redis.jsonl.gz").exists()
        with pytest.raises(ConsoleError, match="an unfinished one"):
            await old.restore(left[0])


async def test_a_restore_beside_running_gateways(old: Nexus, saved: Path) -> None:
    """It is refused, also with --force: gateways would make the streams meanwhile."""
    for force in (False, True):
        assert "Stop all gateways and workers" in await old.restore(saved, force=force)
    assert (await old.get("/v1/aliases")).json()["data"]


async def test_a_restore_over_what_is_there(old: Nexus, saved: Path, tmp_path: Path) -> None:
    """It is refused, names what is there, and changes nothing; --force replaces it; --only takes a part. One that fails in its
    middle, for whatever reason, says so.
    """
    async with Cluster(tmp_path, **SETTINGS) as cluster:
        nexus = Nexus(cluster)
        world, job = World(cluster.nats.url), new_job()
        await (await world.gateway()).store_outcome(outcome_of(job, owner="default"))
        await world.close()
        refusal = await nexus.restore(saved)
        assert "already hold data: NEXUS_DONE (1 messages)" in refusal
        assert "an older server cannot read" in await nexus.restore(of_later_nats(saved, tmp_path), force=True)
        link = EtcdClient(cluster.etcd.url, probe_key="/nexus/")
        await link.open()
        assert await RegistryBackup(link, "/nexus/").read() == {}
        assert await nexus.restore(saved, only="etcd") == ""
        assert await RegistryBackup(link, "/nexus/").operator_keys() == ["aliases/old"]
        await link.close()
        assert "The servers hold a part of the backup" in await nexus.restore(
            half_a_manifest(saved, tmp_path), force=True
        )
        assert await nexus.restore(saved, force=True) == ""
        assert (
            "already hold data: etcd (1 aliases and services), Redis, NEXUS_DONE (5 messages)"
            in await nexus.restore(saved)
        )
        await cluster.start_gateway()
        assert (await nexus.get(f"/v1/jobs/{job}")).status_code == 404
        assert [one["status"] for one in await everything(nexus)] == ["completed"] * 5


def changed(saved: Path, copy: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The same backup with another manifest."""
    shutil.copytree(saved, copy)
    said = json.loads((copy / "manifest.json").read_text())
    change(said)
    (copy / "manifest.json").write_text(json.dumps(said))
    return copy


def of_later_nats(saved: Path, folder: Path) -> Path:
    """The same backup, as if another NATS had given it."""
    return changed(saved, folder / "later", lambda said: said["servers"].update(nats="99.0.1"))


def half_a_manifest(saved: Path, folder: Path) -> Path:
    """The same backup, of which nobody knows how the last stream was configured."""
    return changed(
        saved, folder / "half", lambda said: next(p for p in reversed(said["parts"]) if p["about"])["about"].clear()
    )


async def test_names_and_times(saved: Path) -> None:
    """The manifest says what was taken in which order."""
    names = [part.name for part in read_manifest(saved).parts]
    order = [
        "OBJ_nexus-blobs",
        "NEXUS_BATCHES",
        "redis",
        "NEXUS_BACKLOG",
        "NEXUS_JOBS",
        "NEXUS_DONE",
        "NEXUS_HOOKS",
        "NEXUS_EVENTS",
    ]
    assert [name for name in names if name in order] == order
    assert names[-1] == "OBJ_nexus-blobs+"
