"""The guarantees of blobs, in memory and on a real nats-server alike."""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import aclosing
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import nats
import pytest

from backbone.bus.blob_names import METADATA_NUMBER, BlobCipher, BlobName, InvalidBlobSeal
from backbone.bus.blobs import CHUNK_BYTES, BlobCorrupted, BlobInfo, BlobNotFound, BlobStore, BlobWriter
from backbone.bus.nats.connection import NatsConnection
from backbone.bus.nats.jetstream import BlobBucketConfig, ensure_bucket
from backbone.bus.nats.objects.reader import DIRECT_GET, NatsBlobReader
from backbone.bus.nats.objects.store import NatsBlobStore
from backbone.bus.nats.requests import ReplyMessage
from backbone.bus.subjects import BLOBS_BUCKET, BLOBS_STREAM, blob_chunk, blob_chunks, blob_meta
from backbone.testing.blobs import MemoryBlobStore
from schemas.errors import Unavailable
from tests.conftest import Eventually
from tests.jetstream import inbox_of, request
from tests.servers import Server, source

MIB = 1024 * 1024


def path_of(name: str) -> str:
    """Where a blob is."""
    parsed = BlobName.parse(name)
    assert parsed is not None
    return parsed.path


class World:
    """One store, any number of sides, and a look at what it holds."""

    def __init__(self, url: str | None) -> None:
        self.url = url
        self.memory = MemoryBlobStore()
        self.admin = NatsConnection(url or "", "blobs-admin")
        self.closing: list[NatsBlobStore] = []

    async def side(self, *, max_bytes: int = 256 * MIB, create: bool = True) -> BlobStore:
        if self.url is None:
            self.memory.max_bytes = max_bytes
            return self.memory
        bucket = BlobBucketConfig(max_bytes=max_bytes) if create else None
        made = NatsBlobStore(self.url, "test", create=bucket, worker="" if create else "w1")
        self.closing.append(made)
        await made.start()
        return made

    async def begin(self) -> None:
        if self.url:
            await self.admin.connect()

    async def end(self) -> None:
        for side in self.closing:
            await side.close()
        if self.url:
            if self.closing:
                await request(self.admin, f"STREAM.DELETE.{BLOBS_STREAM}")
            await self.admin.close()

    async def messages(self) -> int:
        if self.url is None:
            return len(self.memory.chunks_by_name())
        return int((await request(self.admin, f"STREAM.INFO.{BLOBS_STREAM}"))["state"]["messages"])

    async def is_empty(self) -> bool:
        return await self.messages() == 0

    async def lose_last_chunk(self, name: str) -> None:
        if self.url is None:
            self.memory.chunks_by_name()[name].pop()
            return
        found = await request(
            self.admin, f"STREAM.MSG.GET.{BLOBS_STREAM}", {"last_by_subj": blob_chunks(path_of(name))}
        )
        await request(self.admin, f"STREAM.MSG.DELETE.{BLOBS_STREAM}", {"seq": found["message"]["seq"]})

    async def add_chunk(self, name: str, number: int, data: bytes) -> None:
        if self.url is None:
            self.memory.chunks_by_name()[name].append(data)
            return
        await self.admin.client.jetstream().publish(blob_chunk(path_of(name), number), data)


@pytest.fixture(scope="module")
def blobs_nats(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.conftest import running

    yield from running(source().nats(tmp_path_factory.mktemp("blobs-nats")))


async def _world(url: str | None) -> AsyncIterator[World]:
    made = World(url)
    await made.begin()
    yield made
    await made.end()


@pytest.fixture(params=["memory", "nats"])
def store_url(request: pytest.FixtureRequest) -> str | None:
    return request.getfixturevalue("blobs_nats").url if request.param == "nats" else None


@pytest.fixture
async def world(store_url: str | None) -> AsyncIterator[World]:
    async for made in _world(store_url):
        yield made


@pytest.fixture
async def real(blobs_nats: Server) -> AsyncIterator[World]:
    async for made in _world(blobs_nats.url):
        yield made


async def put(blobs: BlobStore, data: bytes, *, ttl_s: float = 60, piece: int = 100_000) -> BlobInfo:
    writer = blobs.writer(ttl_s=ttl_s, content_type="image/png", owner="me")
    for start in range(0, len(data), piece):
        await writer.write(data[start : start + piece])
    return await writer.close()


async def get(blobs: BlobStore, name: str) -> bytes:
    return b"".join([chunk async for chunk in blobs.read(name)])


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 5 * MIB])
@pytest.mark.parametrize("piece", [70_001, 10 * MIB])
async def test_what_is_written_is_read(world: World, size: int, piece: int) -> None:
    """Another side reads byte for byte what one side wrote, in pieces of any size, and how it was described."""
    here, there = await world.side(), await world.side(create=False)
    data = secrets.token_bytes(size)
    info = await put(here, data, piece=piece)
    assert await there.info(info.name) == info
    assert (info.size, info.content_type, info.owner) == (size, "image/png", "me")
    assert await get(there, info.name) == data


async def test_blobs_of_several_writers_do_not_mix(world: World) -> None:
    """Blobs written at once, their chunks interleaved, each come back whole."""
    blobs = await world.side()
    contents = [secrets.token_bytes(700_000 + i) for i in range(8)]
    infos = await asyncio.gather(*(put(blobs, data) for data in contents))
    assert await asyncio.gather(*(get(blobs, info.name) for info in infos)) == contents


async def test_a_blob_does_not_exist_before_its_writer_closed(world: World) -> None:
    """What is half written has no name that anybody could read."""
    blobs = await world.side()
    writer = blobs.writer(ttl_s=60)
    await writer.write(bytes(3 * CHUNK_BYTES))
    name = _name_of(writer)
    assert await blobs.info(name) is None
    with pytest.raises(BlobNotFound):
        await get(blobs, name)
    await writer.close()
    assert len(await get(blobs, name)) == 3 * CHUNK_BYTES


def _name_of(writer: BlobWriter) -> str:
    return str(getattr(writer, "name"))  # noqa: B009 - not part of the seam


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nothing",
        "0" * 32,
        ">",
        "*",
        "a.b",
        "*" * 32,
        f"{'0' * 32}.{'A' * 43}",
        f"w.{'0' * 32}.{'A' * 43}",
        f"*.{'0' * 32}.{'A' * 43}",
    ],
)
async def test_a_name_that_is_none_is_not_found(world: World, name: str) -> None:
    """Whatever was never written, and what is no name at all, is gone; and deleting it deletes nothing else."""
    blobs = await world.side()
    kept = await put(blobs, b"kept")
    assert await blobs.info(name) is None
    with pytest.raises(BlobNotFound):
        await get(blobs, name)
    blobs.remove(name)
    assert await get(blobs, kept.name) == b"kept"


async def test_an_aborted_blob_leaves_nothing(world: World) -> None:
    """Abort removes what was sent, chunks still under way included; a second one does nothing."""
    blobs = await world.side()
    writer = blobs.writer(ttl_s=60)
    await writer.write(bytes(2 * MIB))
    await writer.abort()
    await writer.abort()
    assert await world.is_empty()
    with pytest.raises(RuntimeError):
        await writer.write(b"more")


async def test_an_abort_after_a_cancelled_write_leaves_nothing(world: World) -> None:
    """A caller that goes away in the middle of a write leaves nothing either."""
    blobs = await world.side()
    writer = blobs.writer(ttl_s=60)
    writing = asyncio.create_task(writer.write(bytes(8 * MIB)))
    await asyncio.sleep(0)
    writing.cancel()
    await asyncio.wait([writing])
    await writer.abort()
    assert await world.is_empty()


async def test_an_abort_after_close_deletes(world: World) -> None:
    """Abort after close takes the blob away again."""
    blobs = await world.side()
    writer = blobs.writer(ttl_s=60)
    await writer.write(b"x")
    info = await writer.close()
    await writer.abort()
    assert await blobs.info(info.name) is None
    assert await world.is_empty()


async def test_close_can_be_repeated(world: World) -> None:
    """A second close says the same again."""
    writer = (await world.side()).writer(ttl_s=60)
    await writer.write(b"x")
    assert await writer.close() == await writer.close()


async def test_a_removed_blob_leaves_nothing(world: World, eventually: Eventually) -> None:
    """Remove deletes chunks and description, and nothing of another blob."""
    blobs = await world.side()
    gone, kept = await put(blobs, bytes(MIB)), await put(blobs, b"kept")
    blobs.remove(gone.name)

    async def is_gone() -> bool:
        return await blobs.info(gone.name) is None

    await eventually(is_gone)
    assert await get(blobs, kept.name) == b"kept"
    blobs.remove(kept.name)
    await eventually(world.is_empty)


async def test_a_blob_vanishes_when_its_time_ends(world: World, eventually: Eventually) -> None:
    """After its lifetime nothing is left of a blob, while one with a longer life stays."""
    blobs = await world.side()
    long, short = await put(blobs, b"long"), await put(blobs, bytes(MIB), ttl_s=1)
    assert len(await get(blobs, short.name)) == MIB
    of_the_long_one = 1 if world.url is None else 2

    async def only_one_is_left() -> bool:
        return await world.messages() == of_the_long_one

    await eventually(only_one_is_left)
    assert await blobs.info(short.name) is None
    assert await get(blobs, long.name) == b"long"


async def test_a_writer_that_died_leaves_nothing(world: World, eventually: Eventually) -> None:
    """What a process wrote before it died goes when its time ends."""
    writer = (await world.side()).writer(ttl_s=1)
    await writer.write(bytes(MIB))
    assert not await world.is_empty()
    await eventually(world.is_empty)


async def test_writing_past_the_lifetime_fails(world: World, eventually: Eventually) -> None:
    """A blob of which the first part has gone is never made readable."""
    writer = (await world.side()).writer(ttl_s=1)
    await writer.write(bytes(MIB))
    await eventually(world.is_empty)
    with pytest.raises(Unavailable, match="took longer"):
        await writer.close()


async def test_a_reader_may_stop_early(world: World) -> None:
    """Who reads only the beginning disturbs nobody."""
    blobs = await world.side()
    data = secrets.token_bytes(2 * MIB)
    info = await put(blobs, data)
    async with aclosing(blobs.read(info.name)) as chunks:
        assert await anext(chunks) == data[:CHUNK_BYTES]
    assert await get(blobs, info.name) == data


@pytest.mark.parametrize("size", [CHUNK_BYTES, 10 * CHUNK_BYTES])
async def test_a_lost_chunk_is_noticed(world: World, size: int) -> None:
    """A blob with a part missing is an error, never a shorter blob."""
    blobs = await world.side()
    info = await put(blobs, bytes(size))
    await world.lose_last_chunk(info.name)
    with pytest.raises(BlobCorrupted):
        await get(blobs, info.name)


async def test_a_changed_chunk_is_noticed(world: World) -> None:
    """Other bytes of the same length are an error, and the last of them are not given out."""
    blobs = await world.side()
    info = await put(blobs, bytes(3 * CHUNK_BYTES))
    await world.lose_last_chunk(info.name)
    await world.add_chunk(info.name, 2, b"\x01" * CHUNK_BYTES)
    seen = 0
    with pytest.raises(BlobCorrupted):
        async for chunk in blobs.read(info.name):
            seen += len(chunk)
    assert seen < info.size


async def test_a_full_store_says_so(world: World) -> None:
    """The error says what to do; once there is room again, writing works."""
    blobs = await world.side(max_bytes=MIB)
    writer = blobs.writer(ttl_s=60)
    with pytest.raises(Unavailable, match=r"(?i)full.*max_(blob_)?bytes"):
        await writer.write(bytes(3 * MIB))
    with pytest.raises(Unavailable, match="full"):
        await writer.close()
    await writer.abort()
    info = await put(blobs, bytes(MIB // 2))
    assert len(await get(blobs, info.name)) == MIB // 2


async def test_many_transfers_hold_little(real: World) -> None:
    """20 blobs of 4 MB, written at once and then read at once, are never whole in memory."""
    blobs = await real.side()
    piece = secrets.token_bytes(64 * 1024)

    async def write() -> BlobInfo:
        writer = blobs.writer(ttl_s=60)
        for _ in range(64):
            await writer.write(piece)
        return await writer.close()

    tracemalloc.start()
    try:
        infos = await asyncio.gather(*(write() for _ in range(20)))
        written = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        readers = [blobs.read(info.name) for info in infos]
        for _ in range(32):
            assert {len(await anext(reader)) for reader in readers} == {CHUNK_BYTES}
            await real.admin.ping()  # what was asked for ahead has come
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(written, read) < 20 * MIB, (written / MIB, read / MIB)


async def test_natss_own_client_lists_a_blob(real: World) -> None:
    """The layout is the object store's: NATS's own tools list what is there, and say nothing of what it is."""
    gateway, worker = await real.side(), await real.side(create=False)
    infos = [await put(side, bytes(300_000)) for side in (gateway, worker)]
    assert real.url is not None
    client = await nats.connect(real.url)
    try:
        store = await client.jetstream().object_store(BLOBS_BUCKET)
        listed = await store.list()
        assert [(one.name, one.chunks) for one in listed] == [
            (path_of(info.name).rpartition(".")[2], 3) for info in infos
        ]
        assert "image/png" not in str(listed)
    finally:
        await client.close()


async def test_what_is_stored_says_nothing_without_its_name(real: World) -> None:
    """Anyone who reads the store, by whatever subject, learns neither bytes nor whose they are; the name alone opens nothing."""
    blobs = await real.side()
    secret = b"TOP-SECRET-" * 30_000
    writer = blobs.writer(ttl_s=60, content_type="text/secret", owner="alice")
    await writer.write(secret)
    name = (await writer.close()).name
    direct = f"$JS.API.DIRECT.GET.{BLOBS_STREAM}.$O.{BLOBS_BUCKET}"
    assert real.url is not None
    client = await nats.connect(real.url)
    for subject in (f"{direct}.C.*.*", f"{direct}.M.*", f"{direct}.>", f"{direct}.C.{path_of(name)}.0"):
        found = await client.request(subject, b"")
        assert found.data
        for outcome in (b"SECRET", b"secret", b"alice"):
            assert outcome not in found.data
    await client.close()
    # Not by its name without the key, nor with another's key.
    for other in (path_of(name), f"{path_of(name)}.{'A' * 43}"):
        with pytest.raises(BlobCorrupted):
            await get(blobs, other)
    blobs.remove(f"{path_of(name)}.{'A' * 43}", if_opened=True)
    blobs.remove(path_of(name), if_opened=True)
    assert await get(blobs, name) == secret


async def test_only_who_can_open_a_blob_has_it_removed_for_a_worker(real: World, eventually: Eventually) -> None:
    """A worker names the blob of its answer: a name that it guessed or saw removes nothing."""
    gateway, worker = await real.side(), await real.side(create=False)
    info = await put(worker, b"answer")
    gateway.remove(info.name, if_opened=True)
    await eventually(real.is_empty)


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_a_chunk_in_the_place_of_another_is_noticed(real: World, number: int) -> None:
    """Each is sealed under its number, and by the key of its own blob."""
    blobs = await real.side()
    infos = [await put(blobs, secrets.token_bytes(3 * CHUNK_BYTES)) for _ in range(2)]
    subject = f"$JS.API.DIRECT.GET.{BLOBS_STREAM}.{blob_chunk(path_of(infos[0].name), 1)}"
    moved = (await real.admin.client.request(subject, b"")).data
    target = infos[1] if number == 1 else infos[0]
    await real.add_chunk(target.name, number, moved)
    with pytest.raises(BlobCorrupted):
        await get(blobs, target.name)


async def test_a_blob_from_before_seals_is_read(real: World) -> None:
    """Files that were stored by an earlier version are there as long as they were to be."""
    blobs = await real.side()
    name, data = "a" * 32, secrets.token_bytes(200_000)
    assert real.url is not None
    client = await nats.connect(real.url)
    jetstream = client.jetstream()
    for number, start in enumerate(range(0, len(data), CHUNK_BYTES)):
        await jetstream.publish(blob_chunk(name, number), data[start : start + CHUNK_BYTES])
    meta = {
        "name": name, "bucket": BLOBS_BUCKET, "nuid": f"{name}.*", "size": len(data), "chunks": 2,
        "digest": f"SHA-256={base64.urlsafe_b64encode(sha256(data).digest()).decode()}",
        "headers": {"Content-Type": ["text/plain"]}, "metadata": {"owner": "me"},
    }  # fmt: skip
    await jetstream.publish(blob_meta(name), json.dumps(meta).encode())
    await client.close()
    assert await get(blobs, name) == data
    assert await blobs.info(name) == BlobInfo(name=name, size=len(data), content_type="text/plain", owner="me")


def test_a_name_is_taken_apart_as_it_was_put_together() -> None:
    for writer in ("", "gpu1", "host-echo-a1b2c3"):
        name = BlobName.new(writer)
        assert BlobName.parse(str(name)) == name
        assert name.path.startswith(f"{writer}." if writer else "")
    for other in (
        "",
        ".",
        "a",
        "a.b.c",
        f"w.{'a' * 32}",
        f"{'a' * 32}.short",
        f"a b.{'a' * 32}.{'A' * 43}",
        f">.{'a' * 32}.{'A' * 43}",
    ):
        parsed = BlobName.parse(other)
        assert parsed is None or parsed.key is None


def test_a_seal_opens_what_it_sealed_and_nothing_else() -> None:
    one, other = BlobCipher(b"a" * 32), BlobCipher(b"b" * 32)
    sealed = one.seal(0, b"data")
    assert one.open(0, sealed) == b"data"
    for seal, number, data in (
        (one, 1, sealed),
        (one, METADATA_NUMBER, sealed),
        (other, 0, sealed),
        (one, 0, sealed[:-1]),
        (one, 0, b""),
    ):
        with pytest.raises(InvalidBlobSeal):
            seal.open(number, data)


async def test_what_a_lagging_replica_lacks_its_leader_has(real: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A direct get that finds nothing is no proof: in a cluster, any replica answers it."""
    blobs = await real.side()
    data = secrets.token_bytes(3 * CHUNK_BYTES)
    info = await put(blobs, data)

    async def lagging(_self: NatsBlobReader, _subject: bytes) -> ReplyMessage:
        return ReplyMessage(b"NATS/1.0 404 Message Not Found\r\n\r\n", b"")

    monkeypatch.setattr(NatsBlobReader, "_get_direct", lagging)
    assert await blobs.info(info.name) == info
    assert await get(blobs, info.name) == data


async def test_a_worker_waits_for_a_lagging_replica(real: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may not ask the leader, so it asks again: what was just stored is found."""
    gateway, worker = await real.side(), await real.side(create=False)
    data = secrets.token_bytes(3 * CHUNK_BYTES)
    info = await put(gateway, data)
    get_direct, missed = NatsBlobReader._get_direct, set[bytes]()

    async def lagging(self: NatsBlobReader, subject: bytes) -> ReplyMessage:
        assert subject.startswith(DIRECT_GET + b"."), subject
        if subject not in missed:
            missed.add(subject)
            return ReplyMessage(b"NATS/1.0 404 Message Not Found\r\n\r\n", b"")
        return await get_direct(self, subject)

    async def refuse(_self: NatsBlobReader, subject: str) -> bytes | None:
        pytest.fail(f"the worker has asked the leader for {subject}")

    monkeypatch.setattr(NatsBlobReader, "_get_direct", lagging)
    monkeypatch.setattr(NatsBlobReader, "_read_from_leader", refuse)
    assert await get(worker, info.name) == data
    assert len(missed) == 4


async def test_a_worker_erases_what_it_may_not_purge(real: World, eventually: Eventually) -> None:
    """A worker's abort and removal free the room too, and disturb no other blob."""
    gateway, worker = await real.side(), await real.side(create=False)
    kept = await put(gateway, bytes(3 * CHUNK_BYTES))
    left = await real.messages()
    writer = worker.writer(ttl_s=600)
    await writer.write(bytes(9 * CHUNK_BYTES))
    await writer.abort()
    gone = await put(worker, bytes(4 * CHUNK_BYTES), ttl_s=600)
    worker.remove(gone.name)

    async def only_the_kept_one_is_left() -> bool:
        return await real.messages() == left

    await eventually(only_the_kept_one_is_left)
    assert await gateway.info(gone.name) is None
    assert await get(worker, kept.name) == bytes(3 * CHUNK_BYTES)


async def test_a_store_that_is_not_there_yet_is_unavailable(real: World) -> None:
    """A worker before the first gateway: an error that says who makes the store."""
    blobs = await real.side(create=False)
    with pytest.raises(Unavailable, match="a gateway creates it"):
        await put(blobs, b"x")
    await ensure_bucket(await inbox_of(real.admin), BlobBucketConfig(max_bytes=MIB))


async def test_a_server_that_ignores_lifetimes_is_refused() -> None:
    """A nats-server before 2.11 would keep blobs forever: it is not used."""

    def answer(_subject: bytes, body: bytes) -> asyncio.Future[list[ReplyMessage] | None]:
        config = json.loads(body)
        del config["allow_msg_ttl"]
        reply: asyncio.Future[list[ReplyMessage] | None] = asyncio.get_running_loop().create_future()
        reply.set_result([ReplyMessage(b"", json.dumps({"config": config}).encode())])
        return reply

    with pytest.raises(Unavailable, match=r"too old.*2\.11"):
        await ensure_bucket(SimpleNamespace(request=answer), BlobBucketConfig())  # type: ignore[arg-type]


async def test_the_end_of_the_connection_ends_what_is_under_way(real: World) -> None:
    """Closing tells a writer and a reader, instead of leaving them to their time limits."""
    blobs = await real.side()
    info = await put(blobs, bytes(MIB))
    writer = blobs.writer(ttl_s=60)
    await writer.write(bytes(CHUNK_BYTES))
    chunks = blobs.read(info.name)
    await anext(chunks)
    await real.closing[0].close()
    with pytest.raises(Unavailable):
        await writer.write(bytes(8 * CHUNK_BYTES))
    await writer.abort()
    with pytest.raises(Unavailable):
        [chunk async for chunk in chunks]
    blobs.remove(info.name)


@pytest.fixture
async def crashing(own_nats: Server) -> AsyncIterator[NatsBlobStore]:
    made = NatsBlobStore(own_nats.url, "test", create=BlobBucketConfig(max_bytes=64 * MIB))
    await made.start()
    yield made
    await made.close()


async def _finish(writer: BlobWriter, data: bytes) -> BlobInfo | None:
    """None where NATS was unavailable."""
    try:
        await writer.write(data)
        return await writer.close()
    except Unavailable:
        await writer.abort()
        return None


async def test_chunks_under_way_in_a_crash_fail_the_writer(
    crashing: NatsBlobStore, own_nats: Server, eventually: Eventually
) -> None:
    """NATS dies with chunks unconfirmed: the writer fails, nothing can be read, and later writing works again."""
    data = secrets.token_bytes(4 * MIB)
    writer = crashing.writer(ttl_s=60)
    await writer.write(data[:MIB])
    own_nats.pause()
    writing = asyncio.create_task(_finish(writer, data[MIB:]))
    await asyncio.sleep(0.05)
    own_nats.kill()
    await own_nats.restart()
    assert await writing is None
    await eventually(lambda: crashing.connected)
    assert await crashing.info(_name_of(writer)) is None
    info = await eventually(lambda: _finish(crashing.writer(ttl_s=60), data))
    assert info is not None
    assert await get(crashing, info.name) == data


async def test_a_blob_written_over_a_crash_is_whole_or_fails(crashing: NatsBlobStore, own_nats: Server) -> None:
    """NATS dies between two writes: the writer fails, or the blob is what was written."""
    data = secrets.token_bytes(4 * MIB)
    writers = [crashing.writer(ttl_s=60) for _ in range(5)]
    await asyncio.gather(*(writer.write(data[: 200_000 * i]) for i, writer in enumerate(writers)))
    own_nats.kill()
    await own_nats.restart()
    for i, writer in enumerate(writers):
        info = await _finish(writer, data[200_000 * i :])
        if info is not None:
            assert await get(crashing, info.name) == data


async def test_reading_goes_on_after_a_crash(crashing: NatsBlobStore, own_nats: Server) -> None:
    """NATS killed in the middle of reading and back soon: the reader notices nothing but a delay."""
    data = secrets.token_bytes(2 * MIB)
    info = await put(crashing, data)
    chunks = crashing.read(info.name)
    got = [await anext(chunks)]
    own_nats.kill()
    await own_nats.restart()
    got += [chunk async for chunk in chunks]
    assert b"".join(got) == data


async def test_writing_without_nats_fails_at_once(
    crashing: NatsBlobStore, own_nats: Server, eventually: Eventually
) -> None:
    """While NATS is away a write is refused, and an abort does not raise."""
    writer = crashing.writer(ttl_s=60)
    await writer.write(bytes(CHUNK_BYTES))
    own_nats.kill()
    await eventually(lambda: not crashing.connected)
    with pytest.raises(Unavailable):
        await writer.write(bytes(CHUNK_BYTES))
    await writer.abort()
    crashing.remove("0" * 32)


def test_the_description_has_its_standard_subject() -> None:
    """The object store finds descriptions by the encoded name."""
    assert blob_meta("a" * 32) == "$O.nexus-blobs.M.YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWE="
    assert blob_meta("gpu1." + "a" * 32) == "$O.nexus-blobs.M.gpu1.YWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWFhYWE="
