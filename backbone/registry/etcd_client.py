"""A client for etcd with bounded calls, which knows whether etcd answers.

Only this file uses the client library. Each endpoint has one gRPC channel, which reconnects by itself within about a second;
calls go to one endpoint until a probe of it fails, then to the next. The channels are created here, since the library's own
accept IP addresses only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc  # type: ignore[import-untyped]
import grpc.aio  # type: ignore[import-untyped]
import structlog
from etcd3aio import EtcdError, prefix_range_end
from etcd3aio.auth import AuthService
from etcd3aio.kv import KVService
from etcd3aio.lease import LeaseService
from etcd3aio.maintenance import MaintenanceService
from etcd3aio.watch import WatchService

from backbone.registry.auth import EtcdCredentials, EtcdTls, parse_endpoints
from backbone.secret_files import ConfigurationError
from schemas.errors import Unavailable

log = structlog.get_logger(__name__)
T = TypeVar("T")

CALL_TIMEOUT_S = 1.0
"""Seconds that one call may take."""
PROBE_INTERVAL_S = 1.0
LOGIN_TIMEOUT_S = 3.0
"""For one login: etcd hashes slowly on purpose, and handles one login at a time."""
LOGIN_RETRY_DELAY_S = 5.0
"""After a refused login: each attempt costs etcd's processor, and it will not change its mind soon."""
TOKEN_EXPIRED_TEXTS = ("invalid auth token", "revision of auth store is old", "user name is empty")
"""etcd's answers to calls whose token has expired, or was issued before the last change of permissions."""
CHANNEL_OPTIONS = [
    # They detect dead peers behind a silent network. etcd disconnects clients that ping more often than every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # also the minimum time of one attempt to connect
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.enable_retries", 0),
]


class LeaseNotFound(Exception):
    """The lease has expired or was revoked."""


class _TokenExpired(Unavailable):
    """etcd requires a login, or a newer one."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key of etcd with its value."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class KeyChange:
    """A change of one key; `value` None: the key was deleted."""

    key: str
    value: bytes | None
    revision: int
    """The revision of etcd with this change."""


class WatchEnded(Exception):
    """The watch cannot continue: list the keys again. `outage`: events may be lost because etcd was away."""

    def __init__(self, reason: str, *, outage: bool) -> None:
        super().__init__(reason)
        self.outage = outage


@dataclass(frozen=True, slots=True)
class EtcdEndpoint:
    """A channel, and the services on it."""

    address: str
    channel: grpc.aio.Channel
    kv: KVService
    lease: LeaseService
    watch: WatchService
    auth: AuthService
    maintenance: MaintenanceService

    def use(self, token: str) -> None:
        """Send this token with every call from now on."""
        for service in (self.kv, self.lease, self.watch, self.maintenance):
            service.set_token(token)


class EtcdClient:
    """Calls etcd. Each call ends within about `CALL_TIMEOUT_S`, and raises Unavailable when etcd does not answer it well."""

    def __init__(
        self, url: str, *, probe_key: str, tls: EtcdTls | None = None, login: EtcdCredentials | None = None
    ) -> None:
        """Configure the client. `url` is `http(s)://host:port`, several separated by commas; raises ValueError for another
        form.

        `probe_key` is read to check whether etcd answers; it need not exist.
        """
        self._probe_key = probe_key
        self._addresses = parse_endpoints(url)
        self._tls = tls or EtcdTls()
        self._login = login
        self._token = ""
        self._logging_in = asyncio.Lock()
        self._refused: tuple[float, Unavailable] | None = None
        """The time, by the loop's clock, until which a refused login is not repeated, and the error that it raises."""
        self._endpoints: list[EtcdEndpoint] = []
        self._endpoint_index = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._probed = asyncio.Event()
        self._lost = asyncio.Event()
        self._recovered: list[Callable[[], None]] = []
        self.connected = False

    async def open(self) -> None:
        """Open the channels, and probe them from now on. Returns after the first probe, whatever its result."""
        if self._tasks:
            return
        self._endpoints = [_open(address, secure, self._tls) for address, secure in self._addresses]
        self._tasks = [asyncio.create_task(self._probe_forever(), name="etcd-probe")]
        await self._probed.wait()

    async def close(self) -> None:
        """Stop the probes, and close the channels."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        endpoints, self._endpoints = self._endpoints, []
        for endpoint in endpoints:
            await endpoint.channel.close()
        self.connected = False

    def on_recovery(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` whenever etcd answers again after it did not. Returns a function that ends this."""
        self._recovered.append(callback)
        return lambda: self._recovered.remove(callback)

    async def ping(self) -> None:
        """Make one linearizable read, which fails in a cluster without a quorum too. Raises Unavailable."""
        await self._call(lambda at: at.kv.get(self._probe_key, count_only=True, timeout=CALL_TIMEOUT_S, max_attempts=1))

    async def version(self) -> str:
        """Return the version of the etcd that answers now. Raises Unavailable."""
        return str((await self._call(lambda at: at.maintenance.status(timeout=CALL_TIMEOUT_S, max_attempts=1))).version)

    async def get(self, key: str) -> KeyValue | None:
        """Return one key; None: it does not exist."""
        response = await self._call(lambda at: at.kv.get(key, timeout=CALL_TIMEOUT_S, max_attempts=1))
        return _entry(response.kvs[0]) if response.kvs else None

    async def list_prefix(self, prefix: str) -> tuple[list[KeyValue], int]:
        """Return all keys under `prefix`, and the revision of the listing."""
        response = await self._call(
            lambda at: at.kv.get(prefix, prefix_range_end(prefix), timeout=CALL_TIMEOUT_S, max_attempts=1)
        )
        return [_entry(kv) for kv in response.kvs], int(response.header.revision)

    async def put(self, key: str, value: bytes, *, lease: int = 0) -> int:
        """Write one key, and return the revision. Raises LeaseNotFound too."""
        response = await self._call(lambda at: at.kv.put(key, value, lease, timeout=CALL_TIMEOUT_S, max_attempts=1))
        return int(response.header.revision)

    async def delete(self, key: str) -> tuple[bool, int]:
        """Delete one key, and return whether it existed and the revision."""
        response = await self._call(lambda at: at.kv.delete(key, timeout=CALL_TIMEOUT_S, max_attempts=1))
        return bool(response.deleted), int(response.header.revision)

    async def exchange(self, key: str, value: bytes) -> bytes | None:
        """Write one key, and return its previous value; None: it did not exist.

        This takes no transaction: etcd is configured to refuse them all, since its roles did not hold within them
        (`version_check`).
        """
        response = await self._call(lambda at: at.kv.put(key, value, 0, True, timeout=CALL_TIMEOUT_S, max_attempts=1))
        return bytes(response.prev_kv.value) if response.HasField("prev_kv") else None

    async def grant_lease(self, ttl_s: int) -> int:
        """Return a new lease."""
        response = await self._call(lambda at: at.lease.grant(ttl_s, timeout=CALL_TIMEOUT_S, max_attempts=1))
        return int(response.ID)

    async def revoke_lease(self, lease: int) -> None:
        """End a lease, and delete the keys under it. Raises LeaseNotFound too."""
        await self._call(lambda at: at.lease.revoke(lease, timeout=CALL_TIMEOUT_S, max_attempts=1))

    async def renew_lease(self, lease: int) -> None:
        """Renew a lease for its full time. Raises LeaseNotFound too: etcd itself reports no error, only a TTL of 0."""
        ttl = await self._call(lambda at: _keep_alive(at.lease, lease))
        if ttl <= 0:
            raise LeaseNotFound

    async def watch(self, prefix: str, revision: int) -> AsyncGenerator[list[KeyChange], None]:
        """Yield batches of changes under `prefix` from `revision` on. Ends by WatchEnded only.

        The library's watch hides lost connections and, after one, may wait forever for a revision that a wiped etcd never
        reaches: so a second creation of the stream ends it, and so does a failed probe.
        """
        stream: Any = self._endpoint.watch.watch(prefix, prefix_range_end(prefix), revision)
        created = False
        try:
            while True:
                response = await self._next(stream)
                if response.canceled or response.compact_revision:
                    raise WatchEnded(f"canceled, compacted at {response.compact_revision}", outage=False)
                if response.created and created:
                    raise WatchEnded("reconnected", outage=True)
                created = created or response.created
                if response.events:
                    yield [_change(event) for event in response.events]
        finally:
            await stream.aclose()

    async def _next(self, stream: Any) -> Any:
        """Return the next response of a watch. Raises WatchEnded."""
        answer = asyncio.ensure_future(anext(stream))
        lost = asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait({answer, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise WatchEnded("etcd does not answer", outage=True)
            if answer.cancelled():  # gRPC cancels it when its channel closes
                raise WatchEnded("stream cancelled", outage=True)
            return answer.result()
        except (StopAsyncIteration, EtcdError, grpc.aio.AioRpcError) as error:
            raise WatchEnded(f"stream ended: {error}", outage=True) from error
        finally:
            await _cancel(answer, lost)

    @property
    def _endpoint(self) -> EtcdEndpoint:
        if not self._endpoints:
            raise Unavailable("the registry is closed")
        return self._endpoints[self._endpoint_index % len(self._endpoints)]

    async def _call(self, call: Callable[[EtcdEndpoint], Awaitable[T]]) -> T:
        """Make one bounded call with translated errors; after an expired token, once more with a new one."""
        endpoint, token = self._endpoint, self._token
        if self._login is None:
            return await self._translated(endpoint, call)
        if not token:
            token = await self._log_in(endpoint, "")
        try:
            return await self._translated(endpoint, call)
        except _TokenExpired:
            await self._log_in(endpoint, token)
            return await self._translated(endpoint, call)

    async def _log_in(self, endpoint: EtcdEndpoint, old: str) -> str:
        """Return a token that replaces `old`; one login at a time. Raises Unavailable."""
        assert self._login is not None
        async with self._logging_in:
            if self._token != old:
                return self._token
            clock = asyncio.get_running_loop().time
            if self._refused is not None and clock() < self._refused[0]:
                raise self._refused[1]
            try:
                async with asyncio.timeout(LOGIN_TIMEOUT_S):
                    answer = await endpoint.auth.authenticate(
                        self._login.user, self._login.password.read(), timeout=LOGIN_TIMEOUT_S, max_attempts=1
                    )
            except (EtcdError, grpc.aio.AioRpcError, TimeoutError, ConfigurationError) as error:
                unavailable = Unavailable(f"etcd at {endpoint.address} {_describe_login_error(error)}")
                if _is_refusal(error):
                    self._refused = clock() + LOGIN_RETRY_DELAY_S, unavailable
                raise unavailable from error
            self._refused = None
            self._token = answer.token
            for one in self._endpoints:
                one.use(self._token)
            return self._token

    async def _translated(self, endpoint: EtcdEndpoint, call: Callable[[EtcdEndpoint], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                return await call(endpoint)
        except (EtcdError, grpc.aio.AioRpcError, TimeoutError) as error:
            if isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.NOT_FOUND:
                raise LeaseNotFound from error  # only a lease can be missing: reads of absent keys are no errors
            kind = _TokenExpired if _is_token_expired(error) else Unavailable
            description = _describe_error(error, logged_in=self._login is not None)
            raise kind(f"etcd at {endpoint.address} did not answer: {description}") from error
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            raise Unavailable(
                "the registry was closed during the call"
            ) from None  # gRPC cancels open calls of a closed channel

    async def _probe_forever(self) -> None:
        while True:
            try:
                await self.ping()
            except Unavailable as error:
                self._on_probe_failed(error)
            else:
                self._on_probe_succeeded()
            self._probed.set()
            await asyncio.sleep(PROBE_INTERVAL_S if self.connected else PROBE_INTERVAL_S / 4)

    def _on_probe_failed(self, error: Unavailable) -> None:
        if self.connected or not self._probed.is_set():
            log.warning("etcd.unavailable", error=str(error))
        self.connected = False
        self._endpoint_index += 1
        self._lost.set()

    def _on_probe_succeeded(self) -> None:
        self._lost.clear()
        if self.connected:
            return
        if self._probed.is_set():
            log.info("etcd.recovered", endpoint=self._endpoint.address)
        self.connected = True
        for callback in list(self._recovered):
            callback()


def create_channel(address: str, secure: bool, tls: EtcdTls) -> grpc.aio.Channel:
    """Return a channel to one endpoint; the caller closes it."""
    if secure:
        credentials = grpc.ssl_channel_credentials(tls.ca, tls.key, tls.cert)
        return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def _open(address: str, secure: bool, tls: EtcdTls) -> EtcdEndpoint:
    channel = create_channel(address, secure, tls)
    watch = WatchService(channel, reconnect_backoff_seconds=0.2, max_reconnect_backoff_seconds=1.0)
    auth, maintenance = AuthService(channel), MaintenanceService(channel)
    return EtcdEndpoint(address, channel, KVService(channel), LeaseService(channel), watch, auth, maintenance)


async def _keep_alive(leases: LeaseService, lease: int) -> int:
    """Renew a lease, and return its TTL; 0: the lease does not exist any more."""
    call = leases.keep_alive(lease)
    try:
        async for response in call:
            return int(response.TTL)
        return 0
    finally:
        call.cancel()


async def _cancel(*futures: asyncio.Future[Any]) -> None:
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)


def _entry(kv: Any) -> KeyValue:
    return KeyValue(kv.key.decode(errors="replace"), bytes(kv.value), int(kv.lease))


def _change(event: Any) -> KeyChange:
    deleted = event.type == event.DELETE
    value = None if deleted else bytes(event.kv.value)
    return KeyChange(event.kv.key.decode(errors="replace"), value, int(event.kv.mod_revision))


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing within {CALL_TIMEOUT_S:g} s"
    return f"{error.code().name} {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error)


KNOWN_ERRORS = {
    "Connection refused": "the connection was refused. Check that etcd runs and that ETCD_URL (--etcd-url) is right",
    "Failed parsing HTTP/2": "the server there is not etcd; check ETCD_URL",
    "Socket closed": "the server closed the connection; it may require https: check ETCD_URL",
    "DNS resolution failed": "the host does not exist; check ETCD_URL",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not trusted",
    "ALERT_BAD_CERTIFICATE": "it requires a client certificate",
    "CERTIFICATE_REQUIRED": "it requires a client certificate",
}
"""Explanations of gRPC's errors, by a part of their texts."""


def _describe_error(error: BaseException, *, logged_in: bool) -> str:
    """Describe an error to an operator. gRPC's own text is left out where its meaning is known."""
    reason = _reason(error)
    description = next((description for part, description in KNOWN_ERRORS.items() if part in reason), reason)
    return description + _advice(reason.lower(), logged_in=logged_in)


def _advice(text: str, *, logged_in: bool) -> str:
    """Return what to do about it, where that is known."""
    if "alert_bad_certificate" in text or "certificate_required" in text or "unwrap failed" in text:
        return "; etcd requires a client certificate: set ETCD_TLS_CERT and ETCD_TLS_KEY"
    if "handshake" in text or "certificate" in text or "peer name" in text:
        return "; check ETCD_TLS_CA, and that etcd's certificate names this host"
    if "user name is empty" in text or ("permission denied" in text and not logged_in):
        return "; etcd requires a user: set ETCD_USER and ETCD_PASSWORD"
    if "permission denied" in text:
        return "; grant this user's role the permissions in deploy/etcd"
    return ""


def _is_token_expired(error: BaseException) -> bool:
    return any(text in str(_details(error)) for text in TOKEN_EXPIRED_TEXTS)


def _is_refusal(error: BaseException) -> bool:
    return "authentication failed" in _details(error) or "not enabled" in _details(error)


def _details(error: BaseException) -> str:
    return (error.details() or "") if isinstance(error, grpc.aio.AioRpcError) else str(error)


def _describe_login_error(error: BaseException) -> str:
    text = _details(error)
    if "authentication failed" in text:
        return "refuses this user or its password: check ETCD_USER and ETCD_PASSWORD"
    if "not enabled" in text:
        return "has no users (authentication is not enabled): remove ETCD_USER, or enable it"
    if isinstance(error, ConfigurationError):
        return f"cannot be used: {error}"
    return f"did not answer: {_describe_error(error, logged_in=True)}"
