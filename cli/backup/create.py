"""Taking a backup while everything runs.

The parts are not of one moment. What moves from one place to another while they are read is found, since the place that it
leaves is read before the place where it comes to rest (docs/adr/0028):

    blobs, batches, Redis, what became of batches meanwhile, jobs, words, dead letters, webhooks, claims, events, blobs again

A job is in the queue or has its word; a word has its blob; a record's end has its word; whoever claimed has its claim.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from backbone.bus.nats.backup import BATCHES_STREAM, STREAMS, SavedMessage
from backbone.bus.subjects import BLOBS_STREAM, EVENTS_STREAM, JOBS_STREAM
from backbone.version import VERSION
from cli.backup.archive import BackupFolder, BackupManifest, Notify, PartWriter, create_folder, now, write_manifest
from cli.backup.connections import BackupServers

ETCD_FILE = "etcd.json.gz"
REDIS_FILE = "redis.jsonl.gz"


def snapshot_file(stream: str) -> str:
    """JetStream's archive."""
    return f"{stream}.snapshot"


def tail_file(stream: str) -> str:
    """Messages that came later."""
    return f"{stream}.tail"


class BackupCreator:
    """One backup on its way into its folder. Raises ConsoleError, NexusError and JetStreamError."""

    def __init__(self, servers: BackupServers, kinds: frozenset[str], notify: Notify) -> None:
        self._servers = servers
        self._kinds = kinds
        self._notify = notify
        self._last: dict[str, int] = {}

    async def into(self, target: Path) -> BackupManifest:
        """Take it."""
        began_at = now()
        with create_folder(target, self._notify) as folder:
            if "etcd" in self._kinds:
                await self._etcd(folder)
            early, late = STREAMS[: STREAMS.index(JOBS_STREAM)], STREAMS[STREAMS.index(JOBS_STREAM) :]
            await self._streams(folder, early)
            if "redis" in self._kinds:
                await self._redis(folder)
            await self._rest_of(folder, BATCHES_STREAM)
            await self._streams(folder, late)
            await self._rest_of(folder, BLOBS_STREAM)
            servers = {"nats": self._servers.streams.server_version}
            manifest = BackupManifest(VERSION, began_at, now(), servers, tuple(folder.parts))
            write_manifest(folder, manifest)
        return manifest

    async def _etcd(self, folder: BackupFolder) -> None:
        values = await self._servers.registry.read()
        with folder.lines(ETCD_FILE) as (writer, add):
            for key, value in sorted(values.items()):
                add(json.dumps([key, value.decode("latin-1")]).encode())
        folder.add(writer.part("etcd"))

    async def _redis(self, folder: BackupFolder) -> None:
        with folder.lines(REDIS_FILE) as (writer, add):
            async with aclosing(self._servers.redis.read_lines()) as lines:
                async for line in lines:
                    add(line)
        folder.add(writer.part("redis"))

    async def _streams(self, folder: BackupFolder, names: tuple[str, ...]) -> None:
        if "streams" in self._kinds:
            for name in names:
                await self._stream(folder, name)

    async def _stream(self, folder: BackupFolder, name: str) -> None:
        about = {"events_seq": await self._events_seq()} if name == JOBS_STREAM else {}
        with folder.file(snapshot_file(name)) as writer:
            # Gateways make the queues' consumers; without them each job comes again at once, and none is forgotten.
            taken = await self._servers.streams.save(name, writer.write, consumers=name != JOBS_STREAM)
        if taken is None:
            (folder.path / snapshot_file(name)).unlink()
            self._notify(f"{name:<22} not there")
            return
        writer.items = int(taken.state["messages"])
        self._last[name] = taken.last_seq
        folder.add(writer.part(name, config=taken.config, state=taken.state, **about))

    async def _events_seq(self) -> int:
        """Events of jobs that come into the queue from now on are stored behind this."""
        state = await self._servers.streams.state(EVENTS_STREAM)
        return int(state["last_seq"]) if state is not None else 0

    async def _rest_of(self, folder: BackupFolder, name: str) -> None:
        if name not in self._last:
            return
        with folder.file(tail_file(name)) as writer:
            async with aclosing(self._servers.streams.read_tail(name, self._last[name])) as pieces:
                await _write_pieces(writer, pieces)
        folder.add(writer.part(f"{name}+"))


async def _write_pieces(writer: PartWriter, pieces: AsyncGenerator[SavedMessage, None]) -> None:
    async for piece in pieces:
        head = json.dumps([piece.subject, len(piece.headers), len(piece.data)]).encode()
        writer.write(b"".join((head, b"\n", piece.headers, piece.data)))
        writer.items += 1
