"""The connections of this process to Redis (or Valkey): one pool behind one circuit breaker.

`RedisStore` and `RedisDocumentStore` share it, so that an outage that one of them meets spares the other its wait.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from backbone.stalls import MAX_EXTENSION_S, StallMonitor
from backbone.store.auth import RedisAccess
from backbone.store.breaker import CircuitBreaker
from backbone.store.pipeline import Argument, RedisPipeline, RedisScript
from schemas.errors import Unavailable

log = structlog.get_logger(__name__)
T = TypeVar("T")

CONNECTIONS = 64
"""Per process; further concurrent calls wait for a connection within their time."""


PROBE_KEY = "nexus:write-probe"
PROBE_TTL_MS = 1000


class RedisConnection:
    """Makes bounded calls to Redis.

    A call that Redis does not answer within `timeout_s` raises Unavailable, and so do all calls for `open_s` after it, at once;
    then one call is let through as a trial. A change whose call raised Unavailable may have been made all the same. Seconds in
    which this process stood still do not count: they say nothing about Redis.
    """

    def __init__(self, server: RedisAccess | str, *, timeout_s: float, open_s: float) -> None:
        """Configure a connection; nothing is opened yet. Raises ValueError for a URL that redis-py does not take."""
        self._timeout_s = timeout_s
        self._breaker = CircuitBreaker(open_s)
        self._redis = Redis(
            connection_pool=_pool(server if isinstance(server, RedisAccess) else RedisAccess(server), timeout_s)
        )
        self._stalls = StallMonitor()
        self._pipeline = RedisPipeline(self._redis, lambda: self._stalls.timeout(timeout_s))

    async def start(self) -> None:
        """Try the connection, and log a failure."""
        try:
            await self.ping()
        except Unavailable as error:
            log.warning("redis.unavailable", error=str(error))

    async def close(self) -> None:
        """Close connections. Idempotent."""
        await self._pipeline.close()
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def ping(self) -> None:
        """Make one round trip, also while the breaker is open; a success closes it. Raises Unavailable."""
        await self._call_with_timeout(lambda: self._pipeline.execute("PING"))

    async def check_write(self) -> None:
        """Write a small value: a server without memory refuses it while it answers PING. Raises Unavailable."""
        await self._call_with_timeout(lambda: self._pipeline.execute("SET", PROBE_KEY, "1", "PX", PROBE_TTL_MS))

    async def call(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make one call, and return its result. Raises Unavailable."""
        if not self._breaker.allows_call():
            raise Unavailable("Redis did not answer recent calls; retry shortly")
        return await self._call_with_timeout(call)

    def script(self, text: str) -> RedisScript:
        """Return a Lua script, for `run` and `call`."""
        return self._pipeline.script(text)

    async def get(self, key: str) -> bytes | None:
        """Return the value of `key`. Call it within `call`."""
        value: bytes | None = await self._pipeline.execute("GET", key)
        return value

    async def execute(self, *command: Argument) -> Any:
        """Return the reply to one command. Call it within `call`."""
        return await self._pipeline.execute(*command)

    async def run(self, script: RedisScript, keys: list[str], args: list[str | bytes | int | float]) -> Any:
        """Run a script, and return its result. Raises Unavailable."""
        return await self.call(lambda: script(keys, args))

    async def _call_with_timeout(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make one call within `timeout_s`, translate its errors, and tell the breaker the result."""
        try:
            async with self._stalls.timeout(self._timeout_s):
                answer = await call()
        except (TimeoutError, RedisTimeoutError) as error:
            if self._breaker.closed:
                log.warning("redis.timed_out", timeout_s=self._timeout_s)
            self._breaker.record_timeout()
            raise Unavailable(f"Redis did not answer within {self._timeout_s:g} s") from error
        except (RedisError, OSError) as error:
            self._breaker.record_answer()
            raise Unavailable(f"Redis cannot be used: {_describe_error(error)}") from error
        if not self._breaker.closed:
            log.info("redis.recovered")
        self._breaker.record_answer()
        return answer


class _CheckedConnectionPool(BlockingConnectionPool):
    """A pool that never lends a connection which the server has closed meanwhile, as it does when it restarts."""

    async def ensure_connection(self, connection: AbstractConnection) -> None:
        reader = connection._reader
        if reader is not None and reader.at_eof():
            await connection.disconnect(nowait=True)
        await super().ensure_connection(connection)


def _describe_error(error: Exception) -> str:
    """Describe an error, with what to do about it where that is known."""
    text = str(error).rstrip(".")
    if "Connection refused" in text or "Name or service not known" in text:
        return f"{text}. Is it running? REDIS_URL (--redis-url) says where it is"
    if text.startswith("Protocol Error"):
        return "the server there is not Redis; check REDIS_URL (--redis-url)"
    if isinstance(error, AuthenticationError) or "NOAUTH" in text or "WRONGPASS" in text:
        return f"{text}; check the user in REDIS_URL, and its password there or in REDIS_PASSWORD_FILE"
    if isinstance(error, NoPermissionError):
        return f"{text}; grant the user the permissions in deploy/redis"
    if text.startswith("OOM") or "maxmemory" in text:
        return f"{text}. Redis is out of memory: raise maxmemory, or lower JOB_KEEP_S or FILE_KEEP_S"
    if text.startswith("MISCONF"):
        return f"{text}. Free space on its disk"
    if "certificate" in text.lower() or "ssl" in text.lower():
        return f"{text}; check REDIS_TLS_CA, and that the certificate names this host"
    return text


def _pool(access: RedisAccess, timeout_s: float) -> BlockingConnectionPool:
    """Return a pool whose connections give up in time and never retry by themselves: a retried `create` would deny its own
    success.
    """
    more: dict[str, Any] = {"ssl_ca_certs": access.ca_file} if access.ca_file else {}
    if access.credentials is not None:
        more["credential_provider"] = access.credentials
    return _CheckedConnectionPool.from_url(
        access.url,
        **more,
        max_connections=CONNECTIONS,
        # The time-outs of callers and pipelines expire earlier: they do not count stalls of this process.
        timeout=2 * timeout_s + MAX_EXTENSION_S,
        socket_timeout=2 * timeout_s + MAX_EXTENSION_S,
        socket_connect_timeout=2 * timeout_s + MAX_EXTENSION_S,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),
        decode_responses=False,
    )
