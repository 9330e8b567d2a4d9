"""The one file that touches nats-py's private names: these fail when a release changes one of them."""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.errors import BadSubjectError
from nats.protocol.parser import Parser as TheirParser

from backbone.bus.nats.connection import FLUSH_INTERVAL_S, NatsConnection
from backbone.bus.nats.headers import parse_ack_subject, parse_status
from backbone.bus.nats.protocol_parser import DirectReader, ProtocolParser
from backbone.bus.refusal_counter import RefusalCounter
from backbone.bus.subjects import InvalidSubject
from cli.embedded.servers import NatsServer, free_port
from tests.conftest import Eventually
from tests.servers import Server


def test_private_names_are_where_we_use_them() -> None:
    """Every private attribute and method of nats-py's client that NatsConnection uses exists, with the form it is used in."""
    client = Client()
    for name, kind in {
        "_ps": TheirParser, "_subs": dict, "_pending": list, "_pending_data_size": int, "_max_pending_size": int,
        "_pongs": list, "_server_pool": list,
    }.items():  # fmt: skip
        assert isinstance(getattr(client, name), kind), name
    assert hasattr(client, "_transport")
    for name in (
        "_process_msg",
        "_process_err",
        "_process_ping",
        "_process_pong",
        "_process_info",
        "_send_command",
        "_process_op_err",
        "_attempt_reconnect",
        "_read_loop",
    ):
        assert inspect.iscoroutinefunction(getattr(client, name)), name
    assert list(inspect.signature(client._process_msg).parameters) == ["sid", "subject", "reply", "data", "headers"]
    assert inspect.iscoroutinefunction(TheirParser.parse)
    assert list(inspect.signature(TheirParser.parse).parameters) == ["self", "data"]
    source = inspect.getsource(Client)
    assert "await self._ps.parse(" in source
    assert "self._ps.reset()" in source
    assert "self._transport.writelines(self._pending[:])" in source
    assert isinstance(asyncio.StreamReader(loop=asyncio.new_event_loop())._buffer, bytearray)  # type: ignore[attr-defined]


class _Client:
    """Takes what the parser passes on."""

    is_connected = True

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    async def _process_ping(self) -> None:
        self.seen.append(("ping",))

    async def _process_pong(self) -> None:
        self.seen.append(("pong",))

    async def _process_info(self, info: dict[str, object]) -> None:
        self.seen.append(("info", info["x"]))

    async def _process_err(self, text: str) -> None:
        self.seen.append(("err", text))

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self.seen.append(("msg", sid, subject, reply, data, headers))


WIRE = (
    b"PING\r\n"
    b"MSG a.b 1 5\r\nhello\r\n"
    b'INFO {"x": 1}\r\n'
    b"MSG a.b 1 reply.to 0\r\n\r\n"
    b"+OK\r\n"
    b"HMSG a.c 1 ans 22 27\r\nNATS/1.0\r\nA: b c d\r\n\r\nwor\r\n\r\n"
    b"PONG\r\n"
    b"MSG other 9 r 3\r\nxyz\r\n"
    b"HMSG s 1 16 16\r\nNATS/1.0 503\r\n\r\n\r\n"
    b"-ERR 'Permissions Violation'\r\n"
)
MESSAGES = [
    (b"a.b", b"", b"", b"hello"),
    (b"a.b", b"reply.to", b"", b""),
    (b"a.c", b"ans", b"NATS/1.0\r\nA: b c d\r\n\r\n", b"wor\r\n"),
    (b"s", b"", b"NATS/1.0 503\r\n\r\n", b""),
]
OTHERS = [
    ("ping",),
    ("info", 1),
    ("pong",),
    ("msg", 9, b"other", b"r", b"xyz", None),
    ("err", "'permissions violation'"),
]


@given(st.lists(st.integers(0, len(WIRE)), max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_split_of_the_bytes_reads_the_same(cuts: list[int]) -> None:
    """However the network cuts the stream, the same messages come out."""
    client, got = _Client(), []
    parser = ProtocolParser(client, {1: lambda *message: got.append(message)}, RefusalCounter())  # type: ignore[arg-type]
    edges = [0, *sorted(cuts), len(WIRE)]

    async def feed() -> None:
        for start, stop in pairwise(edges):
            await parser.parse(WIRE[start:stop])

    asyncio.run(feed())
    assert got == MESSAGES
    assert client.seen == OTHERS


class _Stream(asyncio.Protocol):
    """The stream from which nats-py reads when it comes to it."""

    def __init__(self) -> None:
        self.unread = b""

    def data_received(self, data: bytes) -> None:
        self.unread += data


@given(
    cuts=st.lists(st.integers(0, len(WIRE)), max_size=12),
    reads=st.lists(st.booleans(), min_size=14, max_size=14),
    buffered=st.integers(0, len(WIRE)),
)
@settings(max_examples=300, deadline=None)
def test_messages_that_are_read_directly_keep_their_order(cuts: list[int], reads: list[bool], buffered: int) -> None:
    """Whatever nats-py has read of the stream when data arrives, and however the network cuts it, the same messages come out."""
    client, got = _Client(), []
    parser = ProtocolParser(client, {1: lambda *message: got.append(message)}, RefusalCounter())  # type: ignore[arg-type]
    stream = _Stream()
    stream.unread = WIRE[:buffered]
    reader = DirectReader(parser, stream, buffered)
    edges = [buffered, *sorted(cut for cut in cuts if cut > buffered), len(WIRE)]

    async def feed() -> None:
        for (start, stop), read in zip(pairwise(edges), reads, strict=False):
            reader.data_received(WIRE[start:stop])
            if read:
                unread, stream.unread = stream.unread, b""
                await parser.parse(unread)
        await parser.parse(stream.unread)

    asyncio.run(feed())
    assert got == MESSAGES
    assert client.seen == OTHERS
    assert parser.behind == 0


async def test_a_lost_connection_is_not_read_any_further() -> None:
    """Data that arrives once nats-py has given the connection up does not reach the parser, which waits for the next one."""
    client, got = _Client(), []
    parser = ProtocolParser(client, {1: lambda *message: got.append(message)}, RefusalCounter())  # type: ignore[arg-type]
    client.is_connected = False
    DirectReader(parser, _Stream(), 0).data_received(b"MSG a 1 1\r\nx\r\nMSG a 1 5\r\n")
    assert (got, parser.parts) == ([], [])


NAME = st.one_of(
    st.binary(max_size=40),
    st.text(st.characters(codec="utf-8"), max_size=40).map(str.encode),
    st.lists(st.sampled_from([b"a", b"$JS", b".", b"*", b">", b" ", b"\r\n", b"\0", b"\x7f", b"\xff", b"PUB b 0"])).map(
        b"".join
    ),
)


def _line(written: list[bytes]) -> list[bytes]:
    """Read one command as nats-server does: words that are divided by blanks, up to the first end of a line."""
    line, _, rest = b"".join(written).partition(b"\r\n")
    assert rest == b"payload\r\n", written
    return line.split()


@given(subject=NAME, reply=NAME, message_id=NAME)
@settings(max_examples=500, deadline=None)
def test_a_name_never_becomes_protocol(subject: bytes, reply: bytes, message_id: bytes) -> None:
    """Whatever the subject and the reply are: nothing is written, or one command with exactly these words."""
    connection = NatsConnection("nats://127.0.0.1:1", "test")
    connection._write = lambda command, **_: written.append(command)  # type: ignore[method-assign]
    written: list[bytes] = []
    try:
        connection.publish(subject, b"payload", reply)
    except InvalidSubject:
        assert written == []
    else:
        assert _line(written) == [b"PUB", subject, *([reply] if reply else []), b"7"]
        for name in (subject, reply):
            assert not any(byte <= 0x20 or byte >= 0x7F for byte in name)
            assert not {b"*", b">"} & set(name.split(b"."))
            assert b"" not in name.split(b".") or name == b""
    written.clear()
    try:
        connection.publish_with_id(b"a.b", b"payload", b"c", message_id)
    except InvalidSubject:
        assert written == []
    else:
        head, _, body = b"".join(written).partition(b"\r\n\r\n")
        assert body == b"payload\r\n"
        assert head.split(b"\r\n")[1:] == [b"NATS/1.0", b"Nats-Msg-Id: " + message_id]


@pytest.mark.parametrize(
    "name", ["", "a b", "a\r\nPUB b 0", "a..b", ".a", "a.", "a.*", "a.>", "a\x00", "a\x7f", "\u00e9"]
)
async def test_no_way_past_the_check(own_nats: Server, name: str) -> None:
    """A subject that is none is refused on every way to the server, nats-py's own included; a correct one still passes."""
    connection = NatsConnection(own_nats.url, "test")
    await connection.connect()
    client = connection.client
    for attempt in (client.publish(name, b"x"), client.request(name, b"x", timeout=1)):
        with pytest.raises((InvalidSubject, BadSubjectError)):
            await attempt
    if name:
        with pytest.raises((InvalidSubject, BadSubjectError)):
            await client.publish("a", b"x", reply=name)
        with pytest.raises(InvalidSubject):
            connection.publish(b"a", b"x", name.encode())
    if name not in {"a.*", "a.>"}:
        with pytest.raises(InvalidSubject):
            await connection.subscribe(name, lambda *_: None)
    for subject in ("a.*", "a.>", ">", "*.b"):
        await connection.subscribe(subject, lambda *_: None)
    await connection.ping()
    await connection.close()


async def test_a_message_that_breaks_its_handler_is_dropped(own_nats: Server, eventually: Eventually) -> None:
    """The connection goes on reading: the next message is handled, and the refusal is counted."""
    got: list[bytes] = []

    def handle(_subject: bytes, _reply: bytes, _headers: bytes, data: bytes) -> None:
        if data == b"bad":
            raise ValueError("this cannot be read")
        got.append(data)

    connection = NatsConnection(own_nats.url, "test")
    await connection.connect()
    await connection.subscribe("a", handle)
    for data in (b"bad", b"good", b"bad", b"again"):
        connection.publish(b"a", data)
    await eventually(lambda: got == [b"good", b"again"])
    assert connection.refusals.counts["message"] == 2
    await connection.close()


def test_status_lines() -> None:
    """What JetStream says about pulls, as nats-server 2.15 was seen to say it."""
    assert parse_status(b"NATS/1.0 404 No Messages\r\n\r\n") == (404, "No Messages", None)
    assert parse_status(b"NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: 5\r\nNats-Pending-Bytes: 0\r\n\r\n") == (
        408, "Request Timeout", 5,
    )  # fmt: skip
    assert parse_status(b"NATS/1.0 503\r\n\r\n") == (503, "", None)
    assert parse_status(b"NATS/1.0\r\nA: b\r\n\r\n") is None


def test_ack_subjects_of_both_forms() -> None:
    """With and without a JetStream domain."""
    assert parse_ack_subject(b"$JS.ACK.J.c.2.17.4.1795381762309910883.3") == (2, 17, 1795381762309910883, 3)
    assert parse_ack_subject(b"$JS.ACK.hub.acc.J.c.2.17.4.1795381762309910883.3.tok") == (2, 17, 1795381762309910883, 3)


class _ManualLoop:
    """A clock that the test sets, and the flushes that are scheduled on it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.flushes: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, flush: Callable[[], None]) -> asyncio.TimerHandle:
        return self.call_later(0.0, flush)

    def call_later(self, delay: float, flush: Callable[[], None]) -> asyncio.TimerHandle:
        self.flushes.append((delay, flush))
        return asyncio.TimerHandle(self.now, lambda: None, (), asyncio.get_running_loop())


def _publish(connection: NatsConnection, loop: _ManualLoop, *, may_wait: bool) -> list[float]:
    """Publish a message, and return after how many seconds the flushes are due that this schedules."""
    loop.flushes = []
    connection.publish(b"a", b"", may_wait=may_wait)
    return [delay for delay, _ in loop.flushes]


@pytest.mark.parametrize(
    ("tokens_per_s", "urgent_per_s", "tokens_wait", "urgent_wait"),
    [
        (1_600, 100, False, False),
        (3_000, 100, True, False),
        (25_000, 500, True, False),
        (0, 9_000, True, True),
    ],
)
async def test_messages_wait_for_each_other_where_there_are_many(
    tokens_per_s: int, urgent_per_s: int, tokens_wait: bool, urgent_wait: bool
) -> None:
    """Tokens wait in a process that sends many; what a caller waits for does so only where there is nothing but that."""
    connection, loop = NatsConnection("nats://127.0.0.1:1", "test"), _ManualLoop()
    connection._loop = loop  # type: ignore[assignment]
    _publish(connection, loop, may_wait=False)
    connection._flush()
    total_per_s = tokens_per_s + urgent_per_s
    for index in range(total_per_s // 4):
        loop.now += 1 / total_per_s
        is_urgent = (index + 1) * urgent_per_s // total_per_s > index * urgent_per_s // total_per_s
        _publish(connection, loop, may_wait=not is_urgent)
        connection._flush()
    assert _publish(connection, loop, may_wait=True) == [FLUSH_INTERVAL_S if tokens_wait else 0.0]
    connection._flush()
    assert _publish(connection, loop, may_wait=False) == [FLUSH_INTERVAL_S if urgent_wait else 0.0]


async def test_an_urgent_message_takes_the_waiting_ones_along(own_nats: Server, eventually: Eventually) -> None:
    """They are written with it, in their order, and the timer that they waited for is stopped."""
    got: list[bytes] = []
    connection = NatsConnection(own_nats.url, "test")
    await connection.connect()
    await connection.subscribe("a", lambda _s, _r, _h, data: got.append(data))
    connection._joins = True
    connection.publish(b"a", b"1", may_wait=True)
    connection.publish(b"a", b"2", may_wait=True)
    timer = connection._flush_timer
    assert timer is not None
    connection.publish(b"a", b"3")
    connection.publish(b"a", b"4", may_wait=True)
    await eventually(lambda: len(got) == 4)
    assert got == [b"1", b"2", b"3", b"4"]
    assert timer.cancelled()
    await connection.close()


async def test_publishing_continues_over_a_restart(own_nats: Server, eventually: Eventually) -> None:
    """What is written while the server is away is sent when it is back, and subscriptions are there again."""
    got: list[bytes] = []
    connection = NatsConnection(own_nats.url, "test")
    await connection.connect()
    await connection.subscribe("a.*", lambda _s, _r, _h, data: got.append(data))
    connection.publish(b"a.1", b"before")
    await eventually(lambda: got == [b"before"])
    own_nats.kill()
    await eventually(lambda: not connection.connected)
    connection.publish(b"a.2", b"while away")
    await own_nats.restart()
    await eventually(lambda: got == [b"before", b"while away"])
    await connection.close()


async def test_a_message_larger_than_the_read_buffer(own_nats: Server, eventually: Eventually) -> None:
    """Messages of a megabyte arrive whole, through many reads."""
    got: list[bytes] = []
    connection = NatsConnection(own_nats.url, "test")
    await connection.connect()
    await connection.subscribe("big", lambda _s, _r, _h, data: got.append(data))
    payload = bytes(range(256)) * 3_900
    for _ in range(3):
        connection.publish(b"big", payload)
    await eventually(lambda: len(got) == 3)
    assert got == [payload] * 3
    await connection.close()


async def test_no_server_is_a_clear_error() -> None:
    """A first connection that fails names the address."""
    from schemas.errors import Unavailable

    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        await NatsConnection("nats://127.0.0.1:1", "test").connect()


OVER_A_WEBSOCKET = """
import asyncio, sys
from backbone.lean_imports import lean_imports
with lean_imports():
    from backbone.bus.nats.auth import NatsAccess
    from backbone.bus.nats.connection import NatsConnection

async def main():
    connection = NatsConnection(NatsAccess(sys.argv[1]), "test")
    await connection.connect(timeout_s=20)
    await connection.close()

assert "aiohttp.client" not in sys.modules
asyncio.run(main())
assert "aiohttp.client" in sys.modules
"""


async def test_library_of_websockets_is_loaded_by_the_first_connection_over_one(tmp_path: Path) -> None:
    port = free_port()
    server = NatsServer(tmp_path, extra_config=f'websocket {{ listen: "127.0.0.1:{port}", no_tls: true }}')
    await server.start()
    try:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", OVER_A_WEBSOCKET, f"ws://127.0.0.1:{port}")
        assert await process.wait() == 0
    finally:
        await server.stop()
