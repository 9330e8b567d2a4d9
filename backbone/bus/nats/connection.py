"""A fast connection to NATS on top of nats-py.

nats-py connects, authenticates, keeps subscriptions over reconnects and pings. It takes 11 µs to handle a message through an
iterator, and 4 µs through a callback; with the parser replaced and one write per turn of the loop it takes 1 µs. This is the
only file that uses nats-py's private names; `tests/backbone/test_connection.py` fails when a release changes one of them.

Private names in use: `Client._ps`, `._subs`, `._pending`, `._pending_data_size`, `._transport`, `._process_msg`,
`._process_err`, `._process_ping`, `._process_pong`, `._process_info`, `._send_command`, `._flush_pending`, `._process_op_err`,
`._remove_sub`, `._connect_command`, `._server_info`, `._attempt_reconnect`, `._read_loop`, `._pongs`, `._server_pool`,
`TcpTransport._io_reader` / `._io_writer`, and `Parser.parse` / `.reset`; of asyncio: `StreamReader._buffer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import Awaitable, Callable
from typing import Any

import nats
import structlog
from nats.aio.client import Client

from backbone.bus.nats.auth import NatsAccess
from backbone.bus.nats.connection_errors import describe_error, describe_permanent_error
from backbone.bus.nats.liveness import LivenessMonitor
from backbone.bus.nats.protocol_parser import DirectReader, MessageHandler, ProtocolParser
from backbone.bus.subjects import InvalidSubject, require_pattern, require_subject
from backbone.ids import new_token
from backbone.secret_files import ConfigurationError
from schemas.errors import Unavailable

log = structlog.get_logger(__name__)

_MESSAGE_ID = re.compile(rb"[!-~]+")

MAX_UNSENT_BYTES = 64 * 1024 * 1024
"""Writing is refused beyond this number of unsent bytes, connected or not."""
BUSY_MESSAGES_PER_S = 4000
"""Above this rate of messages that may not wait, these are gathered too."""
JOINED_MESSAGES_PER_S = 2000
"""Above this rate of all messages, those that may wait are gathered."""
FLUSH_INTERVAL_S = 0.002
"""The time for which messages are gathered into one write, instead of one turn of the loop."""
RATE_WINDOW_S = 0.1
RECONNECT_DELAY_S = 0.2
OUTAGE_AFTER_S = 2.0
"""NATS counts as away once each of its servers was tried, or no server has accepted the connection for this time."""
CLUSTER_CONNECT_TIMEOUT_S = 1.0
"""The time that one of several servers gets to accept a connection before the next one is tried."""
REFUSED_RECONNECT_DELAY_S = 2.0
"""Between attempts to connect to a server that refuses this user: it will not change its mind soon."""


class _NatsPyClient(Client):
    """nats-py's client with safer defaults.

    nats-py believes a server that says it has no TLS, and would send it the password in the clear. Before it reconnects, it
    waits for unsent data to reach a server that is frozen, or half a minute for the end of a TLS connection. It publishes to
    subjects with control characters, wildcards and empty tokens.
    """

    secure = False

    async def _read_loop(self) -> None:
        raw: Any = self
        reader = getattr(raw._transport, "_io_reader", None)
        if reader is not None:  # not over a websocket
            transport = raw._transport._io_writer.transport
            transport.set_protocol(DirectReader(raw._ps, transport.get_protocol(), len(reader._buffer)))
        await super()._read_loop()

    def drop(self) -> None:
        """Abort the connection without a goodbye."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def _attempt_reconnect(self) -> None:
        self.drop()
        await super()._attempt_reconnect()

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: dict[str, Any] | None = None
    ) -> None:
        require_subject(subject.encode())
        if reply:
            require_subject(reply.encode())
        await super().publish(subject, payload, reply, headers)

    def _connect_command(self) -> bytes:
        if self.secure and not self._server_info.get("tls_required"):
            raise nats.errors.Error("nats: the server offers no TLS")
        return super()._connect_command()


class NatsConnection:
    """One connection with raw subscriptions, whose writes are joined per turn of the loop."""

    def __init__(
        self,
        server: NatsAccess | str,
        name: str,
        *,
        on_reconnect: Callable[[], Awaitable[None]] | None = None,
        resend_on_reconnect: bool = True,
        monitor_liveness: bool = False,
    ) -> None:
        """Configure the connection.

        Without `resend_on_reconnect`, unsent data of a lost connection is dropped: its writers repeat it in their order. With
        `monitor_liveness`, a server that no longer answers is given up within seconds.
        """
        self._monitor_liveness = monitor_liveness
        self._liveness_task: asyncio.Task[None] | None = None
        self.on_lost: list[Callable[[], None]] = []
        """Called when the connection is lost: no reply to earlier requests will come."""
        self._lost_at = math.inf
        self._failed_servers = 0
        """Servers that have not accepted the connection since it was lost."""
        self._gave_up = False
        """The connection was given up because its server did not answer."""
        self._resend_on_reconnect = resend_on_reconnect
        self.auth = server if isinstance(server, NatsAccess) else NatsAccess(server)
        self.name = name
        self.refusals = self.auth.refusals
        self.client = _NatsPyClient()
        self.client.secure = self.auth.requires_tls
        self._raw: Any = self.client
        self._handlers: dict[int, MessageHandler] = {}
        self._parser = ProtocolParser(self.client, self._handlers, self.refusals)
        self._on_reconnect = on_reconnect
        self._flush_is_due = False
        """A flush at the end of this turn of the loop is scheduled."""
        self._flush_timer: asyncio.TimerHandle | None = None
        self._window_start = 0.0
        self._message_count = self._urgent_count = 0
        """Messages of this window, and those of them that may not wait."""
        self._joins = self._joins_all = False
        """Messages that may wait are gathered for FLUSH_INTERVAL_S; all messages are."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connecting = False
        self._last_error: Exception | None = None
        self._logged_refusals: set[str] = set()
        """Refusals that are in the log already."""

    async def connect(self, timeout_s: float = 5.0) -> None:
        """Connect, and reconnect forever from then on. Raises Unavailable when the first connection fails, at once where the
        server refuses this user.
        """
        self._loop = asyncio.get_running_loop()
        self._raw._ps = self._parser
        self._connecting = True
        try:
            async with asyncio.timeout(timeout_s):
                await self.client.connect(
                    self.auth.servers,
                    name=self.name,
                    inbox_prefix=self.auth.inbox_prefix,
                    **self._credentials(),
                    max_reconnect_attempts=-1,
                    reconnect_time_wait=RECONNECT_DELAY_S,  # type: ignore[arg-type]  # it is only slept on
                    connect_timeout=2,
                    ping_interval=5,
                    max_outstanding_pings=2,
                    allow_reconnect=True,
                    pending_size=MAX_UNSENT_BYTES,
                    error_cb=self._error,
                    disconnected_cb=self._disconnected,
                    reconnected_cb=self._reconnected,
                )
        except (OSError, nats.errors.Error, TimeoutError) as error:
            self.client.drop()
            with contextlib.suppress(Exception):
                async with asyncio.timeout(1):  # after a failed handshake it would wait forever
                    await self.client.close()
            raise Unavailable(self._describe_failure(error)) from error
        finally:
            self._connecting = False
        self._failed_servers = 0
        if len(self._raw._server_pool) > 1:
            self.client.options["connect_timeout"] = CLUSTER_CONNECT_TIMEOUT_S
        if self._monitor_liveness:
            self._liveness_task = asyncio.create_task(LivenessMonitor(self, self._loop.time).run())

    def new_inbox(self) -> str:
        """Return a new, unguessable inbox below this process's prefix; subjects below it are free to use."""
        return f"{self.auth.inbox_prefix}.{new_token()}"

    def _credentials(self) -> dict[str, Any]:
        access = self.auth
        found: dict[str, Any] = {"tls": access.tls} if access.tls is not None else {}
        if access.creds_file:
            found["user_credentials"] = access.creds_file
        if access.password is not None:
            found |= {"user": access.user, "password": self._password}
        return found

    def _password(self) -> str:
        """Read the password, again for each connection."""
        assert self.auth.password is not None
        try:
            return self.auth.password.read()
        except ConfigurationError as error:
            raise nats.errors.Error(f"nats: {error}") from error

    def _describe_failure(self, error: Exception) -> str:
        """Describe a failed connection to the operator, with advice where it is known."""
        last = self._last_error or error
        hint = describe_permanent_error(error) or describe_permanent_error(last)
        if hint is not None:
            return f"NATS at {self.auth.redacted_url} {hint}"
        return f"NATS does not answer at {self.auth.redacted_url}: {describe_error(error, last)}"

    async def _error(self, error: Exception) -> None:
        if not isinstance(error, TimeoutError) or self._last_error is None:
            self._last_error = error
        if self.client.is_reconnecting:
            self._failed_servers += 1
        hint = describe_permanent_error(error)
        if hint is None:
            log.debug("nats.error", connection=self.name, error=f"{type(error).__name__}: {error}")
            return
        if self._connecting:
            raise error
        if "may not" not in hint:
            self.client.options["reconnect_time_wait"] = REFUSED_RECONNECT_DELAY_S
        if hint not in self._logged_refusals:
            self._logged_refusals.add(hint)
            log.error("nats.access_refused", connection=self.name, error=f"NATS at {self.auth.redacted_url} {hint}")

    async def _disconnected(self) -> None:
        assert self._loop is not None
        self._lost_at, self._failed_servers, self._gave_up = self._loop.time(), int(self._gave_up), False
        if not self._resend_on_reconnect:
            self._raw._pending, self._raw._pending_data_size = [], 0
        if not self.client.is_closed:
            log.warning("nats.disconnected", connection=self.name)
        for lost in self.on_lost:
            lost()

    async def _reconnected(self) -> None:
        log.info("nats.reconnected", connection=self.name)
        self._lost_at, self._failed_servers = math.inf, 0
        self.client.options["reconnect_time_wait"] = RECONNECT_DELAY_S
        self._logged_refusals.clear()
        if self._on_reconnect is not None:
            await self._on_reconnect()

    @property
    def connected(self) -> bool:
        """Whether the connection stands now."""
        return self.client.is_connected

    @property
    def unavailable(self) -> bool:
        """Whether NATS is known to be away: each of its servers was tried since the connection was lost, or none has accepted
        it for OUTAGE_AFTER_S. False while another server of a cluster may still take over.
        """
        if self.client.is_connected or self._loop is None:
            return False
        return self._failed_servers >= len(self._raw._server_pool) or self._loop.time() - self._lost_at > OUTAGE_AFTER_S

    def take_received(self) -> bool:
        received, self._parser.received = self._parser.received, False
        return received

    def send_ping(self) -> None:
        """Send a ping; its pong counts as any other arrival."""
        raw = self._raw
        transport = raw._transport._io_writer.transport
        if not transport.is_closing():
            raw._pongs.append(asyncio.get_running_loop().create_future())
            transport.write(b"PING\r\n")

    async def give_up(self) -> None:
        log.warning("nats.silent", connection=self.name)
        self._gave_up = True
        await self._raw._process_op_err(nats.errors.StaleConnectionError())

    @property
    def clustered(self) -> bool:
        """Whether the server belongs to a cluster."""
        return bool(self._raw._server_info.get("cluster"))

    async def close(self) -> None:
        """Send the unsent data, then disconnect."""
        if self._liveness_task is not None:
            self._liveness_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._liveness_task
        if self.client.is_closed or self._loop is None:  # None: never connected
            return
        if self.connected:
            self._flush()
            with contextlib.suppress(Exception):
                await self.client.flush(1)
        with contextlib.suppress(OSError, RuntimeError):  # the server died; RuntimeError is uvloop's error for that
            await self.client.close()

    async def ping(self, timeout_s: float = 1.0) -> None:
        """Make one round trip to the server. Raises Unavailable."""
        if not self.connected:
            raise Unavailable("this process is not connected to NATS")
        try:
            async with asyncio.timeout(timeout_s):
                self._flush()  # nats-py's PING would overtake unwritten commands, such as a subscription
                await self.client.flush(2)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise Unavailable("NATS does not answer") from error

    async def subscribe(self, subject: str, handler: MessageHandler, *, group: str = "") -> int:
        """Call `handler` for each message on `subject`, also after reconnects, and return the subscription's id.

        With `group`, each message goes to one subscriber of that group. Raises Unavailable after `close`.
        """
        require_pattern(subject.encode())
        # nats-py numbers and re-sends the subscription; without a callback it starts no task for it.
        try:
            subscription: Any = await self.client.subscribe(subject, group)
        except nats.errors.Error as error:
            raise Unavailable("the connection to NATS is closed") from error
        self._handlers[subscription._id] = handler
        return int(subscription._id)

    async def unsubscribe(self, sid: int) -> None:
        """End a subscription. Messages that the server had sent before have reached the handler when this returns."""
        await self._raw._send_command(b"UNSUB %d\r\n" % sid)
        self._flush()
        self._raw._subs.pop(sid, None)
        if self.connected:
            with contextlib.suppress(Exception):
                await self.client.flush(2)
        self._handlers.pop(sid, None)

    def drop_subscription(self, sid: int) -> None:
        """End a subscription now; messages on their way are dropped. Idempotent."""
        self._handlers.pop(sid, None)
        if self._raw._subs.pop(sid, None) is not None and not self.client.is_closed:
            with contextlib.suppress(Unavailable):
                self._write(b"UNSUB %d\r\n" % sid)

    def publish(
        self,
        subject: bytes,
        payload: bytes | memoryview,
        reply: bytes = b"",
        headers: bytes = b"",
        *,
        may_wait: bool = False,
    ) -> None:
        """Queue a message for this turn's write. Raises InvalidSubject, and Unavailable when too much data is unsent.

        `headers` are complete: from `NATS/1.0` to the empty line. A message that `may_wait` is written within FLUSH_INTERVAL_S
        where this process sends many, together with the others, and never after a later message.
        """
        require_subject(subject)
        if reply:
            require_subject(reply)
            subject = b"%b %b" % (subject, reply)
        size = len(payload)
        if headers:
            head = b"HPUB %b %d %d\r\n%b" % (subject, len(headers), len(headers) + size, headers)
        else:
            head = b"PUB %b %d\r\n" % (subject, size)
        self._write(b"".join((head, payload, b"\r\n")), may_wait=may_wait)

    def publish_with_id(self, subject: bytes, payload: bytes, reply: bytes, message_id: bytes) -> None:
        """Publish with a `Nats-Msg-Id`: JetStream stores the message once per duplicate window."""
        self.publish(subject, payload, reply, id_headers(message_id))

    def _write(self, command: bytes, *, may_wait: bool = False) -> None:
        """Queue raw protocol bytes. Nothing in them may come from others unchecked."""
        raw = self._raw
        if raw._pending_data_size > MAX_UNSENT_BYTES:
            raise Unavailable("NATS does not read messages fast enough; retry shortly")
        raw._pending.append(command)
        raw._pending_data_size += len(command)
        self._message_count += 1
        self._urgent_count += not may_wait
        waits = self._joins if may_wait else self._joins_all
        if self._flush_is_due or (waits and self._flush_timer is not None):
            return
        loop = self._loop
        assert loop is not None
        if waits:
            self._flush_timer = loop.call_later(FLUSH_INTERVAL_S, self._flush)
        else:
            self._flush_is_due = True
            loop.call_soon(self._flush)
        now = loop.time()
        if now - self._window_start > RATE_WINDOW_S:
            self._measure_rates(now)

    def _measure_rates(self, now: float) -> None:
        """Decide by the window that ends now which messages are gathered in the next one."""
        elapsed = now - self._window_start
        self._joins = self._message_count > JOINED_MESSAGES_PER_S * elapsed
        self._joins_all = self._urgent_count > BUSY_MESSAGES_PER_S * elapsed
        self._window_start, self._message_count, self._urgent_count = now, 0, 0

    def _flush(self) -> None:
        """Write the queued data in one call. While disconnected it stays queued; nats-py sends it after the reconnect."""
        self._flush_is_due = False
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        raw = self._raw
        if not raw._pending or not raw.is_connected:
            return
        transport = raw._transport._io_writer.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            # The server does not read: keep the count up, so that `_write` refuses.
            self._flush_is_due = True
            assert self._loop is not None
            self._loop.call_later(0.05, self._flush)
            return
        data = b"".join(raw._pending)
        raw._pending = []
        raw._pending_data_size = 0
        transport.write(data)


def id_headers(message_id: bytes) -> bytes:
    """Return the headers that make JetStream store a message once per duplicate window. Raises InvalidSubject."""
    if _MESSAGE_ID.fullmatch(message_id) is None:
        raise InvalidSubject(f"invalid message id: {message_id[:100]!r}")
    return b"NATS/1.0\r\nNats-Msg-Id: %b\r\n\r\n" % message_id
