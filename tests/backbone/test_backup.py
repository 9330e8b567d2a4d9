"""All of Redis and all that is kept in etcd, read out and written into other servers."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from backbone.registry.backup import RegistryBackup
from backbone.registry.etcd_client import EtcdClient
from backbone.store.backup import RedisBackup
from backbone.store.redis import RedisStore
from backbone.store.redis_documents import RedisDocumentStore
from backbone.store.store import JobLimit, LimitReached
from backbone.testing.store import list_jobs
from schemas.jobs import Capability, JobRecord, JobStatus
from tests.servers import Server


def record(job: str, owner: str = "an:owner", **fields: Any) -> JobRecord:
    return JobRecord(
        job=job,
        owner=owner,
        endpoint="/v1/chat/completions",
        model="m",
        public_model="m",
        capability=Capability.CHAT,
        created_at=int(time.time()),
        queue_s=60,
        **fields,
    )


@pytest.fixture
async def store(own_redis: Server) -> AsyncIterator[RedisStore]:
    """A store of the test's own."""
    store = RedisStore(own_redis.url, timeout_s=10, open_s=0)
    yield store
    await store.close()


async def again(store: RedisStore, client: Redis) -> None:
    """Read everything, delete it, and write it again."""
    dump = RedisBackup(store)
    lines = [line async for line in dump.read_lines()]
    await dump.clear()
    assert await client.keys("nexus:*") == []
    assert not await dump.has_data()
    await dump.write_lines(lines)
    await dump.write_lines(lines)  # anyone who was interrupted does it again


async def test_documents_and_lists(store: RedisStore, own_redis: Server) -> None:
    """They come back byte for byte, those without text too, listed as before, with the moment at which they end."""
    documents = RedisDocumentStore(store)
    values = {f"d{n}": (b"\xff\0" + bytes([n % 256]), 'ö "quoted"'.encode(), b"x" * 70_000)[n % 3] for n in range(1500)}
    for name, value in values.items():
        await documents.put("file", "an:owner", name, value, ttl_s=1000)
    await documents.put("key", "", "kept", b"{}")
    async with Redis.from_url(own_redis.url) as client:
        await client.set("another:key", "stays")
        ends = await client.pexpiretime("nexus:doc:file:an%3Aowner:d7")
        await again(store, client)
        assert await client.pexpiretime("nexus:doc:file:an%3Aowner:d7") == ends
        assert await client.pexpiretime("nexus:doc:key::kept") == -1
        assert await client.pexpiretime("nexus:docs:key:") == -1
        assert await client.get("another:key") == b"stays"
    found: list[tuple[str, bytes]] = []
    while page := await documents.page("file", "an:owner", after=found[-1][0] if found else "", limit=100):
        found += page
    assert dict(found) == values


async def test_what_follows_from_records(store: RedisStore, own_redis: Server) -> None:
    """Counts of keys are those of the records; whatever has not ended is due at once; leases are over."""
    await store.create(record("waits", key="k"), ttl_s=1000, due_s=500)
    await store.create(record("runs", key="k"), ttl_s=1000, due_s=500)
    await store.create(record("ended", key="k"), ttl_s=1000, due_s=500)
    await store.move("an:owner", "runs", JobStatus.IN_PROGRESS, due_s=500)
    await store.move("an:owner", "ended", JobStatus.CANCELLED)
    await store.acquire_lease("runs", "token", 500)
    async with Redis.from_url(own_redis.url) as client:
        await client.zadd("nexus:queued:k", {"an%3Aowner:ended": time.time() * 1000 + 9000})  # read between two steps
        await again(store, client)
    assert (await store.count_queued("k"), await store.count_running("k")) == (1, 1)
    with pytest.raises(LimitReached):
        await store.create(record("more", key="other"), ttl_s=1000, max_queued=JobLimit(owner=1))
    assert await store.create(record("more", key="other"), ttl_s=1000, max_queued=JobLimit(owner=2))
    await store.remove("an:owner", "more")
    assert sorted(due.job for due in await store.claim_due(10)) == ["runs", "waits"]
    assert await store.acquire_lease("runs", "another", 1)
    assert [one.job for one in await list_jobs(store, "an:owner")] == ["waits", "runs", "ended"]


async def test_what_has_ended_meanwhile(store: RedisStore, own_redis: Server) -> None:
    """It stays away."""
    documents = RedisDocumentStore(store)
    await documents.put("file", "o", "short", b"1", ttl_s=0.3)
    await documents.put("file", "o", "long", b"2", ttl_s=1000)
    lines = [line async for line in RedisBackup(store).read_lines()]
    async with Redis.from_url(own_redis.url) as client:
        while await client.exists("nexus:doc:file:o:short"):
            pass
        await RedisBackup(store).clear()
        await RedisBackup(store).write_lines(lines)
    assert await documents.page("file", "o") == [("long", b"2")]


async def test_types_that_nexus_does_not_use_yet(store: RedisStore, own_redis: Server) -> None:
    """They come back too, on a server of the same make."""
    async with Redis.from_url(own_redis.url) as client:
        await client.hset("nexus:later", mapping={"a": "b"})
        await again(store, client)
        assert await client.hgetall("nexus:later") == {b"a": b"b"}


async def test_batches_before_files(store: RedisStore) -> None:
    """Anyone who names others is read before them, and lists come last."""
    documents = RedisDocumentStore(store)
    await documents.put("file", "o", "f", b"{}")
    await documents.put("batch", "o", "b", b"{}")
    await store.create(record("j", owner="o"), ttl_s=10)
    keys = [line.split(b'"')[3] async for line in RedisBackup(store).read_lines()]
    assert keys[0] == b"nexus:doc:batch:o:b"
    assert set(keys[1:3]) == {b"nexus:doc:file:o:f", b"nexus:job:o:j"}
    assert set(keys[3:]) == {b"nexus:docs:file:o", b"nexus:docs:batch:o", b"nexus:jobs:o"}


async def test_etcd(etcd_url: str) -> None:
    """What has no lease comes back, under another prefix too; workers do not."""
    old, new = (f"/old-{uuid.uuid4().hex}/", f"/new-{uuid.uuid4().hex}/")
    client = EtcdClient(etcd_url, probe_key=old)
    await client.open()
    try:
        await client.put(f"{old}aliases/org/model:tag", b'["a"]')
        await client.put(f"{old}services/tts", b"\xff")
        await client.put(f"{old}models/m", b"{}")
        await client.put(f"{old}workers/w", b"{}", lease=await client.grant_lease(60))
        there = RegistryBackup(client, old)
        assert await there.list_workers() == ["w"]
        values = await there.read()
        assert values == {"aliases/org/model:tag": b'["a"]', "services/tts": b"\xff", "models/m": b"{}"}
        copy = RegistryBackup(client, new)
        assert await copy.operator_keys() == []
        await copy.write(values)
        assert await copy.read() == values
        await copy.clear()
        assert await copy.read() == {"models/m": b"{}"}
    finally:
        await client.close()
