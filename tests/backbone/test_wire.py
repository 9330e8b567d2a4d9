"""The one file that touches nats-py's private names: these fail when a release changes one of them."""

from __future__ import annotations

import asyncio
import inspect
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.protocol.parser import Parser as TheirParser

from backbone.bus.status import parse_ack_subject, parse_status
from backbone.bus.wire import Parser, Wire
from tests.conftest import Eventually
from tests.servers import Server


def test_private_names_are_where_we_use_them() -> None:
    """Every private attribute and method of nats-py's client that Wire uses exists, with the form it is used in."""
    client = Client()
    for name, kind in {
        "_ps": TheirParser, "_subs": dict, "_pending": list, "_pending_data_size": int, "_max_pending_size": int,
    }.items():  # fmt: skip
        assert isinstance(getattr(client, name), kind), name
    assert hasattr(client, "_transport")
    for name in ("_process_msg", "_process_err", "_process_ping", "_process_pong", "_process_info", "_send_command"):
        assert inspect.iscoroutinefunction(getattr(client, name)), name
    assert list(inspect.signature(client._process_msg).parameters) == ["sid", "subject", "reply", "data", "headers"]
    assert inspect.iscoroutinefunction(TheirParser.parse)
    assert list(inspect.signature(TheirParser.parse).parameters) == ["self", "data"]
    source = inspect.getsource(Client)
    assert "await self._ps.parse(" in source
    assert "self._ps.reset()" in source
    assert "self._transport.writelines(self._pending[:])" in source


class _Client:
    """Takes what the parser passes on."""

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
    parser = Parser(client, {1: lambda *message: got.append(message)})  # type: ignore[arg-type]
    edges = [0, *sorted(cuts), len(WIRE)]

    async def feed() -> None:
        for start, stop in pairwise(edges):
            await parser.parse(WIRE[start:stop])

    asyncio.run(feed())
    assert got == MESSAGES
    assert client.seen == OTHERS


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


async def test_publishing_continues_over_a_restart(own_nats: Server, eventually: Eventually) -> None:
    """What is written while the server is away is sent when it is back, and subscriptions are there again."""
    got: list[bytes] = []
    wire = Wire(own_nats.url, "test")
    await wire.connect()
    await wire.subscribe("a.*", lambda _s, _r, _h, data: got.append(data))
    wire.publish(b"a.1", b"before")
    await eventually(lambda: got == [b"before"])
    own_nats.kill()
    await eventually(lambda: not wire.connected)
    wire.publish(b"a.2", b"while away")
    await own_nats.restart()
    await eventually(lambda: got == [b"before", b"while away"])
    await wire.close()


async def test_a_message_larger_than_the_read_buffer(own_nats: Server, eventually: Eventually) -> None:
    """Messages of a megabyte arrive whole, through many reads."""
    got: list[bytes] = []
    wire = Wire(own_nats.url, "test")
    await wire.connect()
    await wire.subscribe("big", lambda _s, _r, _h, data: got.append(data))
    payload = bytes(range(256)) * 3_900
    for _ in range(3):
        wire.publish(b"big", payload)
    await eventually(lambda: len(got) == 3)
    assert got == [payload] * 3
    await wire.close()


async def test_no_server_is_a_clear_error() -> None:
    """A first connection that fails names the address."""
    from schemas.errors import Unavailable

    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"):
        await Wire("nats://127.0.0.1:1", "test").connect()
