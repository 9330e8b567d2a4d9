"""Restore a backup into empty servers, while no gateway and no worker runs.

Gateways complete it when they start: they create the queues' consumers, check each unfinished job, and answer GONE for jobs
whose outcome is stored (docs/adr/0028).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from backbone.bus.nats.backup import STREAMS, SavedMessage, StreamSnapshot
from backbone.bus.subjects import BACKLOG_STREAM, EVENTS_STREAM, JOBS_STREAM, SEALS_STREAM
from cli.backup.archive import BackupManifest, BackupPart, Notify, read_chunks, read_exactly, read_lines
from cli.backup.connections import BackupServers
from cli.errors import ConsoleError


@dataclass(slots=True)
class RestoreResult:
    """The result of a restore."""

    items: dict[str, int] = field(default_factory=dict)
    """Restored keys, lines or messages, by part."""
    warnings: list[str] = field(default_factory=list)


class BackupRestorer:
    """One restore. Raises ConsoleError, NexusError and JetStreamError."""

    def __init__(
        self, servers: BackupServers, source: Path, manifest: BackupManifest, kinds: frozenset[str], notify: Notify
    ) -> None:
        self._servers = servers
        self._source = source
        self._saved_nats = manifest.servers.get("nats", "0.0")
        self._parts = [part for part in manifest.parts if part.kind in kinds]
        self._kinds = kinds
        self._notify = notify
        self.restored = RestoreResult()

    async def check(self, *, force: bool) -> None:
        """Raise ConsoleError if gateways or workers run, or if the servers hold data and `force` is not set."""
        if running := await self._find_running():
            raise ConsoleError(
                f"Still running: {' and '.join(running)}. Stop all gateways and workers, then restore. "
                "Running gateways would write to the streams meanwhile. A worker that died counts as running until "
                "its lease ends (WORKER_LEASE_S)."
            )
        here = self._servers.streams.server_version
        if "streams" in self._kinds and _minor(here) < _minor(self._saved_nats):
            raise ConsoleError(
                f"This NATS is {here}, and the streams were saved from {self._saved_nats}: an older server cannot read "
                f"snapshots of a newer one. Restore into NATS {self._saved_nats} or newer."
            )
        if not force and (found := await self._find_data()):
            raise ConsoleError(
                "These servers already hold data: "
                + ", ".join(found)
                + "\nRestore into empty servers, or replace the data with --force."
            )

    async def _find_running(self) -> list[str]:
        found = []
        if self._kinds & {"redis", "streams"}:
            if await self._servers.streams.has_gateways():
                found.append("gateways")
            if workers := await self._servers.registry.list_workers():
                found.append(f"{len(workers)} worker{'s' if len(workers) > 1 else ''}")
        return found

    async def _find_data(self) -> list[str]:
        found = []
        if "etcd" in self._kinds and (keys := await self._servers.registry.operator_keys()):
            found.append(f"etcd ({len(keys)} aliases and services)")
        if "redis" in self._kinds and await self._servers.redis.has_data():
            found.append("Redis")
        if "streams" in self._kinds:
            for name in STREAMS:
                state = await self._servers.streams.state(name)
                if name != SEALS_STREAM and state is not None and state["messages"]:  # every gateway creates that one
                    found.append(f"{name} ({state['messages']:,} messages)")
        return found

    async def run(self, replicas: int | None) -> RestoreResult:
        """Replace the data of the servers, and return what was restored."""
        if "streams" in self._kinds:
            for name in STREAMS:
                await self._servers.streams.delete(name)
        if "redis" in self._kinds:
            await self._servers.redis.clear()
        if "etcd" in self._kinds:
            await self._servers.registry.clear()
        for part in sorted(self._parts, key=lambda part: part.name.endswith("+")):
            count = await self._restore_part(part, replicas)
            self.restored.items[part.name] = count
            self._notify(f"{part.name:<22} {count:>9,} of {part.items:,} items")
        await self._forget_lost_jobs()
        return self.restored

    async def _forget_lost_jobs(self) -> None:
        queues = [part for part in self._parts if part.name in {BACKLOG_STREAM, JOBS_STREAM}]
        if not queues or EVENTS_STREAM not in self.restored.items:
            return
        after = min(int(part.about["events_seq"]) for part in queues)
        last = {part.name: int(part.about["state"]["last_seq"]) for part in queues}
        if lost := await self._servers.streams.delete_lost_jobs(after=after, last=last):
            self._notify(f"{lost:,} jobs are missing: they were submitted while the backup was written")

    async def _restore_part(self, part: BackupPart, replicas: int | None) -> int:
        path = self._source / part.file
        if part.name == "etcd":
            values = dict(json.loads(line) for line in read_lines(path))
            await self._servers.registry.write({key: text.encode("latin-1") for key, text in values.items()})
            return len(values)
        if part.name == "redis":
            return await self._servers.redis.write_lines(read_lines(path))
        if part.name.endswith("+"):
            return await self._servers.streams.append(_pieces(path))
        return await self._restore_stream(part, path, replicas)

    async def _restore_stream(self, part: BackupPart, path: Path, replicas: int | None) -> int:
        config = dict(part.about["config"])
        if replicas is not None:
            config["num_replicas"] = replicas
        streams = self._servers.streams
        state = await streams.restore(part.name, StreamSnapshot(config, part.about["state"]), read_chunks(path))
        ahead = await streams.delete_consumers_ahead(part.name, int(state["last_seq"]))
        if ahead:
            self.restored.warnings.append(
                f"{part.name}: the progress of {', '.join(ahead)} is unknown; some work will be done again"
            )
        return int(state["messages"])


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _pieces(path: Path) -> Iterator[SavedMessage]:
    with path.open("rb") as file:
        while line := file.readline():
            subject, headers, data = json.loads(line)
            yield SavedMessage(subject, read_exactly(file, headers), read_exactly(file, data))
