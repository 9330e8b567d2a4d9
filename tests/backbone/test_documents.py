"""The documents seam: one contract for every implementation, then what only a real Redis can go through."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from backbone.store.documents import DocumentStore
from backbone.store.redis import RedisStore
from backbone.store.redis_documents import RedisDocumentStore
from backbone.testing.documents import MemoryDocumentStore
from schemas.errors import Unavailable
from tests.servers import Server


@pytest.fixture(params=["memory", "redis"])
def server_url(request: pytest.FixtureRequest) -> str | None:
    """None: in memory. The server cannot be started while a loop runs."""
    return request.getfixturevalue("redis_url") if request.param == "redis" else None


@pytest.fixture
async def documents(server_url: str | None) -> AsyncIterator[DocumentStore]:
    if server_url is None:
        yield MemoryDocumentStore()
        return
    store = RedisStore(server_url)
    yield RedisDocumentStore(store)
    await store.close()


@pytest.fixture
def owner() -> str:
    """An owner that no other test uses: they share a Redis."""
    return f"o:{uuid.uuid4().hex}"


@pytest.fixture
async def own_store(own_redis: Server) -> AsyncIterator[RedisStore]:
    store = RedisStore(own_redis.url, timeout_s=1.0, open_s=0.3)
    yield store
    await store.close()


async def is_gone(documents: DocumentStore, owner: str, doc_id: str) -> bool:
    return await documents.get("file", owner, doc_id) is None


class TestContract:
    @pytest.mark.parametrize("value", [b"{}", b"", b'{"a": "\xc3\xb6"}', bytes(range(256)), b"x" * 1_000_000])
    async def test_a_document_comes_back_byte_for_byte(self, documents, owner, value):
        assert await documents.add("file", owner, "f", value)
        assert await documents.get("file", owner, "f") == value
        assert await documents.page("file", owner) == [("f", value)]

    async def test_a_document_is_added_once_and_put_again_and_again(self, documents, owner):
        assert await documents.add("file", owner, "f", b"1")
        assert not await documents.add("file", owner, "f", b"2")
        assert await documents.get("file", owner, "f") == b"1"
        await documents.put("file", owner, "f", b"3")
        await documents.put("file", owner, "g", b"4")
        assert await documents.page("file", owner) == [("g", b"4"), ("f", b"3")]

    async def test_other_owners_and_kinds_have_their_own(self, documents, owner):
        await documents.add("file", f"{owner}:a", "f", b"1")
        strangers = [
            ("file", owner, "a:f"),
            ("file", f"{owner}%3Aa", "f"),
            ("batch", f"{owner}:a", "f"),
            ("file", "", "f"),
        ]
        for kind, who, doc_id in strangers:
            assert await documents.get(kind, who, doc_id) is None
            assert not await documents.swap(kind, who, doc_id, b"1", b"2")
            assert not await documents.remove(kind, who, doc_id)
            assert await documents.page(kind, who) == []
        assert await documents.get("file", f"{owner}:a", "f") == b"1"

    async def test_what_is_not_there_is_none(self, documents, owner):
        assert await documents.get("file", owner, "f") is None
        assert not await documents.swap("file", owner, "f", b"", b"1")
        assert not await documents.remove("file", owner, "f")
        assert await documents.page("file", owner) == []

    async def test_a_swap_replaces_what_is_known_and_nothing_else(self, documents, owner):
        await documents.add("file", owner, "f", b'{"a":1}')
        assert not await documents.swap("file", owner, "f", b'{"a": 1}', b"2")
        assert await documents.swap("file", owner, "f", b'{"a":1}', b"2")
        assert await documents.get("file", owner, "f") == b"2"

    async def test_of_racing_adds_and_swaps_one_succeeds(self, documents, owner):
        adds = (documents.add("file", owner, "f", str(number).encode()) for number in range(50))
        added = await asyncio.gather(*adds)
        assert sum(added) == 1
        old = str(added.index(True)).encode()
        swaps = (documents.swap("file", owner, "f", old, f"new {number}".encode()) for number in range(50))
        swapped = await asyncio.gather(*swaps)
        assert sum(swapped) == 1
        assert await documents.get("file", owner, "f") == f"new {swapped.index(True)}".encode()

    async def test_fifty_who_count_together_by_swaps_lose_nothing(self, documents, owner):
        await documents.add("count", owner, "n", b"0")

        async def count() -> None:
            while True:
                now = await documents.get("count", owner, "n")
                if await documents.swap("count", owner, "n", now, str(int(now) + 1).encode()):
                    return

        async with asyncio.timeout(30):
            await asyncio.gather(*(count() for _ in range(50)))
        assert await documents.get("count", owner, "n") == b"50"

    async def test_a_removed_document_is_gone_from_the_list_too(self, documents, owner):
        await documents.add("file", owner, "f", b"1")
        assert sum(await asyncio.gather(*(documents.remove("file", owner, "f") for _ in range(10)))) == 1
        assert await documents.page("file", owner) == []
        assert await documents.add("file", owner, "f", b"2")

    async def test_pages_follow_the_ids_both_ways(self, documents, owner):
        ids = ["B", "a", "b 1", "b:1", "b\x00", "c%20", "ä", "日本", "~"]
        for doc_id in ids:
            await documents.add("file", owner, doc_id, doc_id.encode())
        for newest_first in (True, False):
            seen, after = [], ""
            while page := await documents.page("file", owner, after=after, limit=2, newest_first=newest_first):
                assert all(value == doc_id.encode() for doc_id, value in page)
                seen += [doc_id for doc_id, _ in page]
                after = seen[-1]
            assert seen == sorted(ids, reverse=newest_first)
        assert await documents.page("file", owner, limit=0) == []

    async def test_one_reads_on_behind_an_id_that_has_gone(self, documents, owner):
        for doc_id in "abcd":
            await documents.add("file", owner, doc_id, b"")
        await documents.remove("file", owner, "c")
        assert [doc_id for doc_id, _ in await documents.page("file", owner, after="c")] == ["b", "a"]
        after = await documents.page("file", owner, after="c", newest_first=False)
        assert [doc_id for doc_id, _ in after] == ["d"]

    async def test_pages_are_full_while_documents_expire(self, documents, owner, eventually):
        """Expired ones are passed over, whichever way one reads."""
        for number in range(30):
            await documents.add("file", owner, f"{number:02}", b"", ttl_s=0.4 if number % 3 else None)
        await eventually(lambda: is_gone(documents, owner, "29"))
        page = await documents.page("file", owner, limit=4)
        assert [doc_id for doc_id, _ in page] == ["27", "24", "21", "18"]
        page = await documents.page("file", owner, after="05", limit=4, newest_first=False)
        assert [doc_id for doc_id, _ in page] == ["06", "09", "12", "15"]
        assert len(await documents.page("file", owner)) == 10

    async def test_a_swap_keeps_the_lifetime_and_a_put_begins_it_anew(self, documents, owner, eventually):
        await documents.add("file", owner, "swapped", b"1", ttl_s=1)
        await documents.add("file", owner, "put", b"1", ttl_s=0.4)
        await documents.add("file", owner, "kept", b"1", ttl_s=0.4)
        assert await documents.swap("file", owner, "swapped", b"1", b"2")
        await documents.put("file", owner, "put", b"2", ttl_s=60)
        await documents.put("file", owner, "kept", b"2")
        await eventually(lambda: is_gone(documents, owner, "swapped"))
        assert await documents.page("file", owner) == [("put", b"2"), ("kept", b"2")]
        assert await documents.add("file", owner, "swapped", b"3")


async def test_a_pretended_outage():
    documents = MemoryDocumentStore()
    documents.available = False
    calls = (
        documents.add("a", "b", "c", b""),
        documents.put("a", "b", "c", b""),
        documents.get("a", "b", "c"),
        documents.swap("a", "b", "c", b"", b""),
        documents.remove("a", "b", "c"),
        documents.page("a", "b"),
    )
    for call in calls:
        with pytest.raises(Unavailable):
            await call


async def test_memory_forgets_what_has_expired():
    now = [0.0]
    documents = MemoryDocumentStore(clock=lambda: now[0])
    for number in range(5):
        await documents.put("a", "b", str(number), b"", ttl_s=1)
        now[0] += 2
    assert len(documents._documents) == 1


class TestFaults:
    async def test_documents_of_two_processes_are_the_same(self, own_store, own_redis):
        other = RedisStore(own_redis.url)
        await RedisDocumentStore(own_store).add("file", "alice", "f", b"1")
        assert await RedisDocumentStore(other).swap("file", "alice", "f", b"1", b"2")
        assert await RedisDocumentStore(own_store).get("file", "alice", "f") == b"2"
        await other.close()

    async def test_everything_is_lost_in_the_middle(self, own_store, own_redis):
        documents = RedisDocumentStore(own_store)
        await documents.add("file", "alice", "f", b"1")
        async with Redis.from_url(own_redis.url) as redis:
            await redis.flushall()
            await redis.script_flush()
        assert await documents.get("file", "alice", "f") is None
        assert not await documents.swap("file", "alice", "f", b"1", b"2")
        assert await documents.page("file", "alice") == []
        assert await documents.add("file", "alice", "f", b"3")
        assert await documents.page("file", "alice") == [("f", b"3")]

    async def test_a_list_lives_as_long_as_the_longest_of_its_documents(self, own_store, own_redis, eventually):
        documents = RedisDocumentStore(own_store)
        async with Redis.from_url(own_redis.url) as redis:
            await documents.add("file", "alice", "f", b"1", ttl_s=60)
            await documents.add("file", "alice", "g", b"1", ttl_s=0.2)
            assert 50 < await redis.ttl("nexus:docs:file:alice") <= 60
            await documents.add("file", "alice", "h", b"1")
            await documents.add("file", "alice", "i", b"1", ttl_s=60)
            assert await redis.ttl("nexus:docs:file:alice") == -1
            assert 50 < await redis.ttl("nexus:doc:file:alice:i") <= 60
            await documents.put("file", "bob", "f", b"1", ttl_s=0.2)

            async def gone() -> bool:
                return not await redis.exists("nexus:docs:file:bob")

            await eventually(gone)

    async def test_a_dead_redis_is_an_outage_and_what_it_kept_is_there_after_it(self, own_store, own_redis, eventually):
        documents = RedisDocumentStore(own_store)
        await documents.add("file", "alice", "f", b"1")
        own_redis.kill()
        await own_redis.process.wait()
        for call in (documents.get("file", "alice", "f"), documents.page("file", "alice")):
            with pytest.raises(Unavailable):
                await call
        await own_redis.restart()

        async def answers() -> bool:
            try:
                return await documents.add("file", "alice", "g", b"2")
            except Unavailable:
                return False

        await eventually(answers)
        assert ("g", b"2") in await documents.page("file", "alice")

    async def test_a_frozen_redis_costs_store_and_documents_one_time_out_together(self, own_store, own_redis):
        documents = RedisDocumentStore(own_store)
        await documents.add("file", "alice", "f", b"1")
        own_store.connection._breaker._rest_s = 3600
        own_redis.pause()
        async with asyncio.timeout(10):
            with pytest.raises(Unavailable, match="within"):
                await own_store.get("alice", "job_x")
            for _ in range(200):
                with pytest.raises(Unavailable, match="recent calls"):
                    await documents.get("file", "alice", "f")
        own_redis.resume()
        await own_store.ping()
        assert await documents.get("file", "alice", "f") == b"1"
