"""The store on Redis (or Valkey). `redis_keys` names its keys, `redis_scripts` holds its atomic steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from backbone.store import redis_keys as keys
from backbone.store import redis_scripts as scripts
from backbone.store.auth import RedisAccess
from backbone.store.job_filter import JobFilter
from backbone.store.record_changes import apply_move, apply_update, timer_delay_s
from backbone.store.redis_connection import RedisConnection
from backbone.store.redis_records import parse_record
from backbone.store.redis_search import RecordSearch
from backbone.store.store import (
    CLAIMED_TIMER_S,
    SERVICE_TIME_WEIGHT,
    DueJob,
    FoundJobs,
    IllegalMove,
    JobLimit,
    LimitReached,
    TimerDelay,
)
from schemas.errors import Unavailable
from schemas.jobs import TERMINAL_STATUSES, JobRecord, JobStatus

RecordChange = Callable[[JobRecord], tuple[JobRecord, str]]
"""Return the changed record, and its timer as `redis_scripts.REPLACE` takes it."""

MAX_WRITE_ATTEMPTS = 20
MAX_REMEMBERED_RECORDS = 512
DONE = 1
"""The answer of a script that found what it expected; otherwise the script returns what it found."""
FULL = {-1: "key", -2: "owner"}
"""The answers of a script that met a limit, with what has reached it."""
SERVICE_TIME_TTL_S = 7 * 86_400
"""The service time of a model is stored for this time after its last job."""


class RedisStore:
    """A job store on Redis; see `backbone.store.store`.

    A call that Redis does not answer within `timeout_s` raises Unavailable, and so do all calls for `open_s` after it, at once;
    then one call is let through as a trial. A change whose call raised Unavailable may have been made all the same.
    """

    def __init__(self, server: RedisAccess | str, *, timeout_s: float = 1.5, open_s: float = 1.0) -> None:
        """Configure a store; nothing is opened yet. `server` is a URL as redis-py takes it: `redis://`, `rediss://`, `unix://`.

        Raises ValueError for another form.
        """
        self.connection = RedisConnection(server, timeout_s=timeout_s, open_s=open_s)
        """Shared with `RedisDocumentStore`; closed with the store."""
        register = self.connection.script
        self._create = register(scripts.CREATE)
        self._replace = register(scripts.REPLACE)
        self._remove = register(scripts.REMOVE)
        self._count = register(scripts.COUNT)
        self._due = register(scripts.DUE)
        self._lease = register(scripts.LEASE)
        self._release = register(scripts.RELEASE)
        self._served = register(scripts.SERVED)
        self._records = RecordSearch(self.connection)
        self._written: dict[str, bytes] = {}
        """The records that this process wrote last, oldest first. Another process may have changed them."""

    async def start(self) -> None:
        """Try the connection, and log a failure."""
        await self.connection.start()

    async def close(self) -> None:
        await self.connection.close()

    async def ping(self) -> None:
        """Make one round trip, also while the breaker is open; a success closes it. Raises Unavailable."""
        await self.connection.ping()

    async def check_write(self) -> None:
        await self.connection.check_write()

    async def create(
        self, record: JobRecord, *, ttl_s: float, due_s: float | None = None, max_queued: JobLimit | None = None
    ) -> bool:
        member = keys.member(record.owner, record.job)
        encoded = record.encode()
        answer = await self.connection.run(
            self._create,
            [keys.JOB + member, keys.jobs_of(record.owner), keys.TIMERS, keys.JOB_OWNERS],
            [
                encoded,
                _ms(ttl_s, least=1),
                record.owner,
                "" if record.batch else record.job,
                member,
                keys.jobs_prefix(record.owner),
                keys.counted_in(record),
                keys.counted_by_owner(record),
                _timer(timer_delay_s(record, due_s)),
                *_limits(max_queued),
            ],
        )
        if answer in FULL:
            raise LimitReached(FULL[answer])
        if answer:
            self._remember(member, record, encoded)
        return bool(answer)

    async def get(self, owner: str, job_id: str) -> JobRecord | None:
        """Return the record. Raises InternalError when it cannot be decoded."""
        key = keys.job(owner, job_id)
        raw = await self.connection.call(lambda: self.connection.get(key))
        return None if raw is None else parse_record(raw, job_id)

    async def move(
        self,
        owner: str,
        job_id: str,
        to: JobStatus,
        *,
        due_s: TimerDelay = None,
        max_running: JobLimit | None = None,
        **changes: Any,
    ) -> JobRecord | None:

        def change(record: JobRecord) -> tuple[JobRecord, str]:
            new = apply_move(record, to, changes)
            return new, _timer(timer_delay_s(new, due_s)) or "off"

        limit = max_running if to is JobStatus.IN_PROGRESS else None
        return await self._changed(owner, job_id, change, limit)

    async def update(self, owner: str, job_id: str, *, due_s: TimerDelay = None, **changes: Any) -> JobRecord | None:

        def change(record: JobRecord) -> tuple[JobRecord, str]:
            new = apply_update(record, changes)
            return new, _timer(timer_delay_s(new, due_s))

        return await self._changed(owner, job_id, change)

    async def remove(self, owner: str, job_id: str) -> None:
        await self.connection.call(lambda: self._remove_unchanged(owner, job_id))

    async def search(
        self,
        owners: Sequence[str] | None,
        wanted: JobFilter,
        *,
        after: str = "",
        limit: int = 100,
        newest_first: bool = True,
    ) -> FoundJobs:
        return await self._records.search(owners, wanted, after=after, limit=limit, newest_first=newest_first)

    async def select(self, owner: str, job_ids: Iterable[str], wanted: JobFilter) -> list[JobRecord]:
        return await self._records.select(owner, job_ids, wanted)

    async def count_running(self, key: str) -> int:
        return int(await self.connection.run(self._count, [keys.running(key)], []))

    async def count_queued(self, key: str) -> int:
        return int(await self.connection.run(self._count, [keys.queued(key)], []))

    async def open_jobs(self, key: str) -> list[DueJob]:
        names = (keys.queued(key), keys.running(key))
        found = [await self.connection.call(partial(self.connection.execute, "ZRANGE", name, 0, -1)) for name in names]
        return [keys.parse_member(member) for members in found for member in members]

    async def claim_due(self, limit: int) -> list[DueJob]:
        members = await self.connection.run(self._due, [keys.TIMERS], [limit, _ms(CLAIMED_TIMER_S), keys.JOB])
        return [keys.parse_member(member) for member in members]

    async def acquire_lease(self, job_id: str, token: str, seconds: float) -> bool:
        return bool(await self.connection.run(self._lease, [keys.lease(job_id)], [token, _ms(seconds, least=1)]))

    async def release_lease(self, job_id: str, token: str) -> None:
        await self.connection.run(self._release, [keys.lease(job_id)], [token])

    async def record_service_time(self, capability: str, model: str, seconds: float) -> None:
        ttl_ms = _ms(SERVICE_TIME_TTL_S)
        await self.connection.run(
            self._served, [keys.service(capability, model)], [seconds, SERVICE_TIME_WEIGHT, ttl_ms]
        )

    async def mean_service_time_s(self, capability: str, model: str) -> float | None:
        key = keys.service(capability, model)
        raw = await self.connection.call(lambda: self.connection.get(key))
        return None if raw is None else float(raw)

    async def _changed(
        self, owner: str, job_id: str, change: RecordChange, limit: JobLimit | None = None
    ) -> JobRecord | None:
        return await self.connection.call(lambda: self._replace_unchanged(owner, job_id, change, limit))

    async def _replace_unchanged(
        self, owner: str, job_id: str, change: RecordChange, limit: JobLimit | None
    ) -> JobRecord | None:
        """Read, change, and write if the record has not changed meanwhile; else change the newer record.

        The first attempt takes the record as this process wrote it last, and reads nothing.
        """
        member = keys.member(owner, job_id)
        key = keys.JOB + member
        written = self._written.pop(member, None)
        raw = await self.connection.get(key) if written is None else written
        for _ in range(MAX_WRITE_ATTEMPTS):
            if raw is None:
                return None
            old = parse_record(raw, job_id)
            try:
                new, due = change(old)
            except IllegalMove:
                if raw is not written:
                    raise
                raw = await self.connection.get(key)
                continue
            encoded = new.encode()
            counted = [count(record) for count in (keys.counted_in, keys.counted_by_owner) for record in (old, new)]
            raw = await self._replace([key, keys.TIMERS], [raw, encoded, member, *counted, due, *_limits(limit)])
            if raw == DONE:
                self._remember(member, new, encoded)
                return new
            if raw in FULL:
                raise LimitReached(FULL[raw])
        raise Unavailable(f"the record of job {job_id} changes too fast; retry shortly")

    def _remember(self, member: str, record: JobRecord, encoded: bytes) -> None:
        """Remember an unfinished record as it was written."""
        if record.status in TERMINAL_STATUSES:
            return
        if len(self._written) >= MAX_REMEMBERED_RECORDS:
            del self._written[next(iter(self._written))]
        self._written[member] = encoded

    async def _remove_unchanged(self, owner: str, job_id: str) -> None:
        member = keys.member(owner, job_id)
        key = keys.JOB + member
        raw = await self.connection.get(key)
        for _ in range(MAX_WRITE_ATTEMPTS):
            old = None if raw is None else parse_record(raw, job_id)
            counted = ["", ""] if old is None else [keys.counted_in(old), keys.counted_by_owner(old)]
            raw = await self._remove([key, keys.TIMERS, keys.jobs_of(owner)], [raw or "", member, *counted, job_id])
            if raw == DONE:
                return
        raise Unavailable(f"the record of job {job_id} changes too fast; retry shortly")


def _ms(seconds: float, least: int = 0) -> int:
    return max(least, round(seconds * 1000))


def _limits(limit: JobLimit | None) -> list[int | str]:
    """Return the arguments of a script for a limit."""
    return ["" if most is None else most for most in limit or JobLimit()]


def _timer(after_s: float | None) -> str:
    return "" if after_s is None else str(_ms(after_s))
