"""Create a backup while everything runs.

The parts are read one after another. Data that moves meanwhile is not lost: the place that it leaves is read before the
place where it ends (docs/adr/0028):

    blobs, batches, Redis, later batches, backlogs, jobs, outcomes, dead letters, webhooks, claims, events, later blobs

Each job is in the queue or has its outcome, each outcome has its blob, each ended record has its outcome, and each job
of an idempotent request has its claim.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from backbone.bus.nats.backup import BATCHES_STREAM, STREAMS, SavedMessage
from backbone.bus.subjects import BACKLOG_STREAM, BLOBS_STREAM, EVENTS_STREAM, JOBS_STREAM
from backbone.version import VERSION
from cli.backup.archive import BackupFolder, BackupManifest, Notify, PartWriter, create_folder, now, write_manifest
from cli.backup.connections import BackupServers

ETCD_FILE = "etcd.json.gz"
REDIS_FILE = "redis.jsonl.gz"


def snapshot_file(stream: str) -> str:
    """Return the file of a stream's JetStream snapshot."""
    return f"{stream}.snapshot"


def tail_file(stream: str) -> str:
    """Return the file of messages that were stored after the snapshot."""
    return f"{stream}.tail"


class BackupCreator:
    """One backup on its way into its folder. Raises ConsoleError, NexusError and JetStreamError."""

    def __init__(self, servers: BackupServers, kinds: frozenset[str], notify: Notify) -> None:
        self._servers = servers
        self._kinds = kinds
        self._notify = notify
        self._last: dict[str, int] = {}

    async def run(self, target: Path) -> BackupManifest:
        """Write the backup into a new folder and return its manifest."""
        began_at = now()
        with create_folder(target, self._notify) as folder:
            if "etcd" in self._kinds:
                await self._etcd(folder)
            late_from = STREAMS.index(BACKLOG_STREAM)
            early, late = STREAMS[:late_from], STREAMS[late_from:]
            await self._streams(folder, early)
            if "redis" in self._kinds:
                await self._redis(folder)
            await self._later_messages(folder, BATCHES_STREAM)
            await self._streams(folder, late)
            await self._later_messages(folder, BLOBS_STREAM)
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
        about = {"events_seq": await self._events_seq()} if name in {BACKLOG_STREAM, JOBS_STREAM} else {}
        with folder.file(snapshot_file(name)) as writer:
            # Gateways recreate the queues' consumers; without saved ones, each job is delivered again and none is lost.
            snapshot = await self._servers.streams.save(name, writer.write, consumers=name != JOBS_STREAM)
        if snapshot is None:
            (folder.path / snapshot_file(name)).unlink()
            self._notify(f"{name:<22} missing")
            return
        writer.items = int(snapshot.state["messages"])
        self._last[name] = snapshot.last_seq
        folder.add(writer.part(name, config=snapshot.config, state=snapshot.state, **about))

    async def _events_seq(self) -> int:
        """Return the last sequence of the events: later jobs have their events behind it."""
        state = await self._servers.streams.state(EVENTS_STREAM)
        return int(state["last_seq"]) if state is not None else 0

    async def _later_messages(self, folder: BackupFolder, name: str) -> None:
        if name not in self._last:
            return
        with folder.file(tail_file(name)) as writer:
            async with aclosing(self._servers.streams.read_tail(name, self._last[name])) as pieces:
                await _write_pieces(writer, pieces)
        folder.add(writer.part(f"{name}+"))


async def _write_pieces(writer: PartWriter, pieces: AsyncGenerator[SavedMessage, None]) -> None:
    async for piece in pieces:
        header = json.dumps([piece.subject, len(piece.headers), len(piece.data)]).encode()
        writer.write(b"".join((header, b"\n", piece.headers, piece.data)))
        writer.items += 1
