"""Backup and restore of all data of Nexus in Redis, as lines of JSON.

It saves values, not Redis's own DUMP, which only a server of the same make and version accepts. Derived data is left out and
rebuilt from the records: leases, which mean nothing to other servers; the counts of a key and of an owner; and timers, which all
expire at once, so that gateways check each open job and find outcomes that the records lack. So is what was used of limits per minute.

SCAN gives no consistent snapshot. So documents that refer to others are read before them: batches before the files they made;
and lists last, since an unlisted value is not found.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import orjson
from pydantic import ValidationError

from backbone.store import redis_keys as keys
from backbone.store.redis import RedisStore
from backbone.store.redis_connection import PROBE_KEY
from schemas.jobs import TERMINAL_STATUSES, JobRecord

ALL_KEYS = "nexus:*"
BATCHES = b"nexus:doc:batch:"
LISTS = (b"nexus:docs:", b"nexus:jobs:")
REBUILT = (
    b"nexus:lease:", keys.TIMERS.encode(), b"nexus:queued:", b"nexus:running:", b"nexus:owner-queued:", b"nexus:owner-running:", b"nexus:rate:",
    keys.JOB_OWNERS.encode(),
)  # fmt: skip
NOT_DATA = (PROBE_KEY.encode(), b"nexus:doc:system:", b"nexus:docs:system:")
"""The write probe, and the markers of the gateways. Without the markers, gateways check the restored data and recreate missing
records.
"""
SCAN_COUNT = 500
BATCH_SIZE = 64
"""Values that are in memory at once; members of a list in one line."""
NO_EXPIRY = -1
"""Redis's answer for a key that does not expire."""
FOREVER_MS = 366 * 86_400_000

BackupLine = dict[str, Any]


class RedisBackup:
    """Reads and writes through a store's connection. Its methods raise Unavailable."""

    def __init__(self, store: RedisStore) -> None:
        self._connection = store.connection

    async def has_data(self) -> bool:
        """Return whether Redis holds any data of Nexus."""
        async for _ in self._names(ALL_KEYS):
            return True
        return False

    async def clear(self) -> None:
        """Delete all data of Nexus."""
        async for batch in self._names(ALL_KEYS):
            await self._execute("UNLINK", *batch)

    # Save

    async def read_lines(self) -> AsyncGenerator[bytes, None]:
        """Yield one line per key, or several for a long list. Concurrent writes may be included or not."""
        async for names in self._names(f"{BATCHES.decode()}*"):
            async for line in self._lines_of(names):
                yield line
        late = (BATCHES, *LISTS, *REBUILT)
        async for names in self._names(ALL_KEYS):
            async for line in self._lines_of([name for name in names if not name.startswith(late)]):
                yield line
        for prefix in LISTS:
            async for names in self._names(f"{prefix.decode()}*"):
                async for line in self._lines_of(names):
                    yield line

    async def _names(self, pattern: str) -> AsyncGenerator[list[bytes], None]:
        cursor: bytes | str = "0"
        while True:
            cursor, found = await self._execute("SCAN", cursor, "MATCH", pattern, "COUNT", SCAN_COUNT)
            if names := [name for name in found if not name.startswith(NOT_DATA)]:
                yield names
            if int(cursor) == 0:
                return

    async def _lines_of(self, names: list[bytes]) -> AsyncGenerator[bytes, None]:
        for start in range(0, len(names), BATCH_SIZE):
            batch = names[start : start + BATCH_SIZE]
            kinds = await asyncio.gather(*(self._execute("TYPE", name) for name in batch))
            expiries = await asyncio.gather(*(self._execute("PEXPIRETIME", name) for name in batch))
            strings = [name for name, kind in zip(batch, kinds, strict=True) if kind == b"string"]
            values = await asyncio.gather(*(self._execute("GET", name) for name in strings))
            found = dict(zip(strings, values, strict=True))
            for name, kind, expires in zip(batch, kinds, expiries, strict=True):
                head: BackupLine = {"key": _text(name), "expires": None if expires == NO_EXPIRY else expires}
                if found.get(name) is not None:
                    yield orjson.dumps(head | {"value": _text(found[name])})
                elif kind == b"zset":
                    async for members in self._members(name):
                        yield orjson.dumps(head | {"members": members})
                elif kind not in {b"string", b"none"}:
                    dump = await self._execute("DUMP", name)
                    if dump is not None:
                        yield orjson.dumps(head | {"dump": base64.b64encode(dump).decode()})

    async def _members(self, name: bytes) -> AsyncGenerator[list[Any], None]:
        cursor: bytes | str = "0"
        while True:
            cursor, found = await self._execute("ZSCAN", name, cursor, "COUNT", SCAN_COUNT)
            if found:
                yield [[_text(member), score] for member, score in found]
            if int(cursor) == 0:
                return

    # Restore

    async def write_lines(self, lines: Iterable[bytes]) -> int:
        """Write the lines of a backup except expired ones, and return their number. It may be repeated."""
        seconds, micros = await self._execute("TIME")
        now_ms, count = int(seconds) * 1000 + int(micros) // 1000, 0
        batch: list[asyncio.Task[None]] = []
        for raw in lines:
            line = orjson.loads(raw)
            if line["expires"] is not None and line["expires"] <= now_ms:
                continue
            count += 1
            batch.append(asyncio.create_task(self._write(line, now_ms)))
            if len(batch) == BATCH_SIZE:
                await asyncio.gather(*batch)
                batch = []
        await asyncio.gather(*batch)
        return count

    async def _write(self, line: BackupLine, now_ms: int) -> None:
        key, expires = _bytes(line["key"]), line["expires"]
        if "value" in line:
            value = _bytes(line["value"])
            await self._execute("SET", key, value, *(() if expires is None else ("PXAT", expires)))
            if key.startswith(keys.JOB.encode()):
                await self._count(value, expires or now_ms + FOREVER_MS, now_ms)
            return
        if "members" in line:
            flat = [part for member, score in line["members"] for part in (score, _bytes(member))]
            await self._execute("ZADD", key, *flat)
            if expires is not None:
                await self._execute("PEXPIREAT", key, expires)
            return
        await self._execute("RESTORE", key, expires or 0, base64.b64decode(line["dump"]), "REPLACE", "ABSTTL")

    async def _count(self, value: bytes, expires: int, now_ms: int) -> None:
        """Rebuild the counts and the timer of a job that has not ended."""
        try:
            record = JobRecord.decode(value)
        except ValidationError:
            return
        if record.status in TERMINAL_STATUSES:
            return
        member = keys.member(record.owner, record.job)
        await self._execute("ZADD", keys.TIMERS, now_ms, member)
        for counted in (keys.counted_in(record), keys.counted_by_owner(record)):
            await self._execute("ZADD", counted, expires, member)
            await self._execute("PEXPIREAT", counted, expires, "NX")
            await self._execute("PEXPIREAT", counted, expires, "GT")

    async def _execute(self, *command: str | bytes | float) -> Any:
        return await self._connection.call(lambda: self._connection.execute(*command))


def _text(raw: bytes) -> Any:
    """Return readable text where the value is text, else an object with base64."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(raw).decode()}


def _bytes(text: Any) -> bytes:
    return text.encode() if isinstance(text, str) else base64.b64decode(text["b64"])
