"""The store on Redis (or Valkey): one JSON string per record, under a TTL.

The key is `nexus:job:<owner>:<id>`, both parts percent-encoded: an id that a caller makes up reaches nobody else's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import quote

import structlog
from pydantic import ValidationError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from backbone.store.breaker import Breaker
from backbone.store.records import moved
from schemas.errors import InternalError, Unavailable
from schemas.jobs import JobRecord, JobStatus

log = structlog.get_logger(__name__)
T = TypeVar("T")

CONNECTIONS = 64
"""Per process; more calls at once wait for one, within their time."""
MOVE_TRIES = 20
REPLACE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL')
  return 1
end
return 0
"""
"""Write the new record if the old one is still there, byte for byte."""


class RedisStore:
    """See `backbone.store.base`.

    A call that Redis does not answer within `timeout_s` raises Unavailable, and so do all calls for `rest_s` after
    it, at once; then one is let through to try. A `create` or `move` that ended so may have been done all the same.
    """

    def __init__(self, url: str, *, timeout_s: float = 1.5, rest_s: float = 1.0) -> None:
        """Describe a store; nothing is opened yet. `url` as redis-py takes it: `redis://`, `rediss://`, `unix://`.

        Raises ValueError on another form.
        """
        self._timeout_s = timeout_s
        self._breaker = Breaker(rest_s)
        self._redis = Redis(connection_pool=_pool(url, timeout_s))
        self._replace = self._redis.register_script(REPLACE)

    async def start(self) -> None:
        """Try the connection, and log when there is none."""
        try:
            await self.ping()
        except Unavailable as error:
            log.warning("redis.away", error=str(error))

    async def close(self) -> None:
        """Close connections. Idempotent."""
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def ping(self) -> None:
        """One active round trip, also while the breaker is open, which it closes when it succeeds. Raises Unavailable."""
        await self._bounded(self._redis.ping)

    async def create(self, record: JobRecord, *, ttl_s: float) -> bool:
        """See the base."""
        key, value = _key(record.owner, record.id), record.model_dump_json()
        return bool(await self._call(lambda: self._redis.set(key, value, nx=True, px=max(1, round(ttl_s * 1000)))))

    async def get(self, owner: str, job_id: str) -> JobRecord | None:
        """See the base. Raises InternalError when the record cannot be read."""
        raw = await self._call(lambda: self._redis.get(_key(owner, job_id)))
        return None if raw is None else _parse(raw, job_id)

    async def move(self, owner: str, job_id: str, to: JobStatus, **changes: Any) -> JobRecord | None:
        """See the base. Raises InternalError when the record cannot be read, ValueError when `changes` make none."""
        return await self._call(lambda: self._move(_key(owner, job_id), job_id, to, changes))

    async def _move(self, key: str, job_id: str, to: JobStatus, changes: dict[str, Any]) -> JobRecord | None:
        for _ in range(MOVE_TRIES):
            raw = await self._redis.get(key)
            if raw is None:
                return None
            new = moved(_parse(raw, job_id), to, changes)
            if await self._replace(keys=[key], args=[raw, new.model_dump_json()]):
                return new
        raise Unavailable(f"the record of job {job_id} changes too fast")

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        if not self._breaker.admits():
            raise Unavailable("Redis did not answer a moment ago")
        return await self._bounded(call)

    async def _bounded(self, call: Callable[[], Awaitable[T]]) -> T:
        """One call within `timeout_s`, its errors translated, its outcome told to the breaker."""
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await call()
        except (TimeoutError, RedisTimeoutError) as error:
            if self._breaker.closed:
                log.warning("redis.frozen", timeout_s=self._timeout_s)
            self._breaker.timed_out()
            raise Unavailable(f"Redis did not answer within {self._timeout_s:g} s") from error
        except (RedisError, OSError) as error:
            self._breaker.answered()
            raise Unavailable(f"Redis cannot be used: {error}") from error
        if not self._breaker.closed:
            log.info("redis.back")
        self._breaker.answered()
        return answer


class _Pool(BlockingConnectionPool):
    """A pool that gives out no connection which the server has closed meanwhile, as it does when it restarts."""

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        reader = connection._reader
        if reader is not None and reader.at_eof():
            await connection.disconnect(nowait=True)
        await super().ensure_connection(connection)


def _pool(url: str, timeout_s: float) -> BlockingConnectionPool:
    """Connections that give up in time and never retry by themselves: a retried `create` would deny its own success."""
    return _Pool.from_url(
        url,
        max_connections=CONNECTIONS,
        timeout=2 * timeout_s,  # the caller's own time-out comes first
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
        decode_responses=False,
    )


def _key(owner: str, job_id: str) -> str:
    return f"nexus:job:{quote(owner, safe='')}:{quote(job_id, safe='')}"


def _parse(raw: bytes | str, job_id: str) -> JobRecord:
    try:
        return JobRecord.model_validate_json(raw)
    except ValidationError as error:
        log.error("redis.malformed_record", job=job_id, error=str(error))
        raise InternalError(f"the record of job {job_id} cannot be read") from error
