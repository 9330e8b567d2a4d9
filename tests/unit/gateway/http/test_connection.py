"""The HTTP server's bounds, on real connections: what a caller without a key may make it do and store."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from gateway.health import ShutdownState
from gateway.http import connection
from gateway.http.asgi import CALLER_INFO, EXCHANGE, Receive, Reply, Scope, Send
from gateway.http.client_addresses import TrustedProxies
from gateway.http.connection import MAX_FRAMING_BYTES, MAX_HEADERS, MAX_PIPELINED_BYTES, HttpProtocol, http_protocol
from gateway.http.connection_limits import ConnectionBounds, ConnectionLimiter
from gateway.http.pipelining import MAX_PER_ITERATION
from gateway.http.unread_budget import UnreadBudget
from gateway.server import _Server
from tests.conftest import Eventually

READ = 256 * 1024
"""Bytes that one read may bring."""
TIMEOUT_S = 10.0


def get(path: str = "/", *lines: str, version: str = "1.1") -> bytes:
    """A request without a body."""
    return "\r\n".join([f"GET {path} HTTP/{version}", "host: nexus", *lines, "", ""]).encode()


@dataclass
class Site:
    """A server, and what its application saw."""

    connections: ConnectionLimiter = field(default_factory=ConnectionLimiter)
    head_timeout_s: float = 5.0
    paths: list[str] = field(default_factory=list)
    headers: list[list[tuple[bytes, bytes]]] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    """`/slow` waits for it."""
    port: int = 0
    server: Any = None

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.paths.append(scope["path"])
        self.headers.append(scope["headers"])
        self.callers.append(scope[CALLER_INFO].address)
        if scope["path"] == "/slow":
            await self.gate.wait()
        if scope["path"] == "/body":
            body, more = b"", True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body, more = body + message["body"], message["more_body"]
            self.bodies.append(body)
        if scope["path"] == "/large":
            reply = Reply(send, "req_1")
            await reply.send_head(200, [])
            for _ in range(1000):
                await reply.send_chunk(b"x" * 65536)
            await reply.send_end()
            return
        await Reply(send, "req_1").send_response(200, "text/plain", scope["path"].encode())

    @property
    def protocols(self) -> list[HttpProtocol]:
        return list(self.server.server_state.connections)


@asynccontextmanager
async def serving(site: Site | None = None) -> AsyncIterator[Site]:
    """A server for the block."""
    site = site or Site()
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    protocol = http_protocol(site.head_timeout_s, ShutdownState(), site.connections)
    app = site if callable(site) else site.app
    config = uvicorn.Config(
        app,
        http=protocol,
        lifespan="off",
        log_config=None,
        loop="none",
        ws="none",
        interface="asgi3",
        proxy_headers=False,
    )
    site.server, site.port = _Server(config), listener.getsockname()[1]
    task = asyncio.create_task(site.server.serve(sockets=[listener]))
    try:
        yield site
    finally:
        site.server.should_exit = site.server.force_exit = True
        await task


class Caller:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, bytes]:
        """Status and body of the next answer."""
        async with asyncio.timeout(TIMEOUT_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
            return int(head.split()[1]), await self.reader.readexactly(length)

    async def ends(self) -> bytes:
        """What comes until the server closes."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self.reader.read()

    async def refused(self, status: int, code: str) -> None:
        """One answer more, OpenAI's error object, and the end."""
        found, body = await self.answer()
        assert (found, json.loads(body)["error"]["code"]) == (status, code)
        assert await self.ends() == b""


@asynccontextmanager
async def calling(site: Site) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port, limit=8 * READ)
    try:
        yield Caller(reader, writer)
    finally:
        writer.transport.abort()


class TestEndedKeys:
    async def test_a_call_without_an_answer_is_refused(self, eventually: Eventually) -> None:
        """Also one whose body still comes; other callers are answered."""
        async with serving() as site, calling(site) as caller, calling(site) as sender, calling(site) as other:
            caller.send(get("/slow"))
            sender.send(b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n123")
            await eventually(lambda: len(site.paths) == 2)
            for protocol in site.protocols:
                protocol._caller.key_id = "key_1" if protocol.cycle is not None else ""
            other.send(get("/slow"))
            await eventually(lambda: len(site.paths) == 3)
            site.connections.end_calls_of("key_1")
            for ended in (caller, sender):
                await ended.refused(401, "invalid_api_key")
            site.gate.set()
            assert await other.answer() == (200, b"/slow")
            assert site.bodies == []

    async def test_a_call_with_a_part_of_its_answer_is_reset(self, eventually: Eventually) -> None:
        """So that its caller sees that the answer is not complete."""
        async with serving() as site, calling(site) as caller:
            caller.send(get("/large"))
            await eventually(lambda: site.paths == ["/large"])
            assert await caller.reader.readline() == b"HTTP/1.1 200 OK\r\n"
            site.protocols[0]._caller.key_id = "key_1"
            site.connections.end_calls_of("key_1")
            with pytest.raises(ConnectionResetError):
                await caller.ends()


class TestPipelining:
    async def test_requests_are_answered_in_order(self) -> None:
        """Requests sent in one go, with bodies and without, are answered one after the other."""
        requests = [
            get("/a"),
            b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n\r\n\r\n12345",
            b"POST /body HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            get("/b"),
        ]
        async with serving() as site, calling(site) as caller:
            caller.send(b"".join(requests))
            assert [(await caller.answer())[1] for _ in requests] == [b"/a", b"/body", b"/body", b"/b"]
            assert site.bodies == [b"\r\n\r\n12345", b"hello"]

    async def test_requests_behind_a_slow_one_are_buffered_within_bounds(self, eventually: Eventually) -> None:
        """Behind a request that takes its time, the socket is not read beyond a bound; then all are answered, none is lost."""
        count = 10_000
        async with serving() as site, calling(site) as caller:
            caller.send(get("/slow") + b"".join(get(f"/{number}") for number in range(count)))
            await eventually(lambda: site.paths == ["/slow"])
            await eventually(lambda: not site.protocols[0].transport.is_reading())
            assert len(site.protocols[0]._pipelined_bytes) <= MAX_PIPELINED_BYTES + READ
            assert site.connections.stored == len(site.protocols[0]._pipelined_bytes)
            assert site.paths == ["/slow"]
            site.gate.set()
            await caller.answer()
            assert [(await caller.answer())[1] for _ in range(count)] == [f"/{n}".encode() for n in range(count)]
            assert site.connections.stored == 0

    async def test_each_byte_is_parsed_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What many small requests cost grows with their number alone."""
        fed = 0
        plain = HttpProtocol._feed

        def counted(protocol: HttpProtocol, piece: bytes) -> int:
            nonlocal fed
            fed += len(piece)
            return plain(protocol, piece)

        monkeypatch.setattr(HttpProtocol, "_feed", counted)
        requests = get("/") * 5000
        async with serving() as site, calling(site) as caller:
            caller.send(requests)
            for _ in range(5000):
                await caller.answer()
        assert fed == len(requests)

    async def test_offers_to_upgrade_in_a_row(self) -> None:
        """Any number of pipelined offers to upgrade is declined, one by one."""
        async with serving() as site, calling(site) as caller:
            caller.send(get("/u", "connection: upgrade", "upgrade: h2c") * 2000 + get("/end"))
            answers = [(await caller.answer())[1] for _ in range(2001)]
        assert answers == [b"/u"] * 2000 + [b"/end"]

    async def test_a_disconnect_behind_pipelined_requests(self, eventually: Eventually) -> None:
        """A caller who hangs up is heard although it has sent more requests."""
        async with serving() as site:
            async with calling(site) as caller:
                caller.send(get("/slow") + get("/a") * 10)
                await eventually(lambda: site.paths == ["/slow"])
            await eventually(lambda: not site.protocols)
            assert len(site.connections) == 0

    async def test_many_connections_take_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One round of the event loop begins few pipelined requests, however many connections have some; all are answered."""
        begun: list[HttpProtocol] = []
        most = 0
        plain = HttpProtocol.read_next_request

        def counted(protocol: HttpProtocol) -> None:
            begun.append(protocol)
            plain(protocol)

        async def rounds() -> None:
            nonlocal most
            while True:
                before = len(begun)
                await asyncio.sleep(0)
                most = max(most, len(begun) - before)

        monkeypatch.setattr(HttpProtocol, "read_next_request", counted)
        async with serving() as site:
            callers = [await asyncio.open_connection("127.0.0.1", site.port) for _ in range(80)]
            for _, writer in callers:
                writer.write(get("/slow") + get("/a") * 50)
            watching = asyncio.create_task(rounds())
            site.gate.set()
            for reader, writer in callers:
                for _ in range(51):
                    await Caller(reader, writer).answer()
                writer.transport.abort()
            watching.cancel()
        assert len(begun) == 80 * 50
        assert 1 < most <= MAX_PER_ITERATION

    async def test_memory_for_all_is_bounded(self, eventually: Eventually) -> None:
        """What all connections pipeline together is bounded too: beyond it, sockets are left unread."""
        site = Site(ConnectionLimiter(ConnectionBounds(max_stored=READ)))
        async with serving(site):
            callers = [await asyncio.open_connection("127.0.0.1", site.port) for _ in range(40)]
            for _, writer in callers:
                writer.write(get("/slow") + get("/a", "x: " + "a" * 1000) * 500)
            await eventually(lambda: len(site.paths) == 40)
            await eventually(lambda: all(not p.transport.is_reading() for p in site.protocols))
            assert site.connections.stored <= READ + 40 * READ / 2
            for _, writer in callers:
                writer.transport.abort()
            site.gate.set()


class TestHeads:
    @pytest.mark.parametrize("complete", [True, False])
    async def test_too_large(self, *, complete: bool) -> None:
        """A head beyond 64 KiB is 431, complete or not, in one piece or many."""
        async with serving() as site, calling(site) as caller:
            caller.send(get("/", "x: " + "a" * 70_000) if complete else get("/", "x: " + "a" * 70_000)[:-4])
            await caller.refused(431, "headers_too_large")
            assert site.paths == []

    @pytest.mark.parametrize("complete", [True, False])
    async def test_too_many(self, *, complete: bool) -> None:
        """So is one with very many headers: each costs far more memory than its bytes."""
        head = get("/", *(f"a{n}: b" for n in range(MAX_HEADERS + 1)))
        async with serving() as site, calling(site) as caller:
            caller.send(head if complete else head[:-2])
            await caller.refused(431, "headers_too_large")
            assert site.paths == []

    async def test_a_head_that_never_ends(self) -> None:
        """A head must be complete in time, however it trickles in, also behind another request."""
        async with serving(Site(head_timeout_s=0.2)) as site, calling(site) as caller:
            caller.send(get("/a") + b"GET / HTTP/1.1\r\n")
            assert (await caller.answer())[1] == b"/a"
            await caller.refused(408, "request_timeout")

    async def test_a_head_that_waited_for_its_turn_is_not_late(self) -> None:
        """Time begins when the request before it has been answered."""
        async with serving(Site(head_timeout_s=1.0)) as site, calling(site) as caller:
            caller.send(get("/slow") + b"GET /b HTTP/1.1\r\n")
            await asyncio.sleep(1.5)
            site.gate.set()
            assert (await caller.answer())[1] == b"/slow"
            caller.send(b"host: x\r\n\r\n")
            assert (await caller.answer())[1] == b"/b"

    async def test_all_together(self, eventually: Eventually) -> None:
        """Memory for incomplete heads is bounded over all connections; small heads keep their place."""
        site = Site(ConnectionLimiter(ConnectionBounds(max_stored=100_000)))
        async with serving(site), calling(site) as one, calling(site) as two, calling(site) as small:
            one.send(b"GET / HTTP/1.1\r\nx: " + b"a" * 60_000)
            await eventually(lambda: site.connections.stored > 50_000)
            small.send(b"GET /small HTTP/1.1\r\n")
            two.send(b"GET / HTTP/1.1\r\nx: " + b"a" * 60_000)
            await two.refused(503, "unavailable")
            small.send(b"\r\n")
            assert (await small.answer())[1] == b"/small"
            one.send(b"\r\n\r\n")
            assert (await one.answer())[0] == 200
            await eventually(lambda: site.connections.stored == 0)

    async def test_empty_lines(self) -> None:
        """A few empty lines before a request are passed over; a connection that sends nothing else ends."""
        async with serving() as site, calling(site) as caller:
            caller.send(b"\r\n\r\n" + get("/a"))
            assert (await caller.answer())[1] == b"/a"
            caller.send(b"\r\n" * 5000)
            await caller.refused(400, "invalid_http")

    async def test_empty_lines_do_not_keep_a_connection(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An idle connection is closed in time although it sends empty lines."""
        async with serving() as site:
            site.server.config.timeout_keep_alive = 0.3
            async with calling(site) as caller:
                closed = asyncio.ensure_future(caller.ends())
                while not closed.done():
                    caller.send(b"\r\n")
                    await asyncio.wait([closed], timeout=0.05)
                assert await closed == b""

    @pytest.mark.parametrize("version", ["2.0", "0.9", "1.7"])
    async def test_other_versions(self, version: str) -> None:
        """HTTP/1.0 and 1.1 are served, others refused."""
        async with serving() as site, calling(site) as caller:
            caller.send(get("/", version=version))
            await caller.refused(400, "invalid_http")


class TestBodies:
    CHUNKED = b"POST %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"

    async def test_trailers_are_no_headers(self) -> None:
        """What comes as a trailer is read by nobody, least of all as a key."""
        async with serving() as site, calling(site) as caller:
            caller.send(self.CHUNKED % b"/body" + b"2\r\nhi\r\n0\r\nauthorization: Bearer x\r\nhost: y\r\n\r\n")
            assert (await caller.answer())[1] == b"/body"
            caller.send(self.CHUNKED % b"/body" + b"2\r\nhi\r\n")
            caller.send(b"0\r\nauthorization: Bearer x\r\n\r\n")
            assert (await caller.answer())[1] == b"/body"
            assert [sorted(name for name, _ in headers) for headers in site.headers] == [
                [b"host", b"transfer-encoding"]
            ] * 2

    @pytest.mark.parametrize("path", [b"/body", b"/"], ids=["read", "answered"])
    @pytest.mark.parametrize("what", ["trailers", "one trailer", "extensions", "zeros"])
    async def test_framing_is_bounded(self, path: bytes, what: str) -> None:
        """Trailers and chunk extensions without end are refused, whether the body is waited for or not."""
        endless = {
            "trailers": b"0\r\n" + b"a:b\r\n" * MAX_FRAMING_BYTES,
            "one trailer": b"0\r\na: " + b"b" * 4 * MAX_FRAMING_BYTES,
            "extensions": b"1;" + b"a" * 4 * MAX_FRAMING_BYTES,
            "zeros": b"0" * 4 * MAX_FRAMING_BYTES,
        }[what]
        async with serving() as site, calling(site) as caller:
            caller.send(self.CHUNKED % path)
            if path == b"/":
                assert (await caller.answer())[0] == 200
            for start in range(0, len(endless), 8192):
                caller.send(endless[start : start + 8192])
                await asyncio.sleep(0)
            if path == b"/":
                assert await caller.ends() == b""
            else:
                await caller.refused(400, "invalid_http")
            assert site.bodies == []

    async def test_many_small_chunks(self) -> None:
        """Small chunks with short extensions are no abuse."""
        async with serving() as site, calling(site) as caller:
            caller.send(self.CHUNKED % b"/body" + b"1;x=y\r\na\r\n" * 50_000 + b"0\r\n\r\n")
            assert (await caller.answer())[0] == 200
            assert site.bodies == [b"a" * 50_000]

    @pytest.mark.parametrize("framing", ["content-length: 1000000", "transfer-encoding: chunked"])
    async def test_a_body_that_is_not_read_before_the_answer(self, framing: str) -> None:
        """What is left of a body after the answer is dropped; it must come in time."""
        async with serving(Site(head_timeout_s=0.3)) as site, calling(site) as caller:
            caller.send(f"POST / HTTP/1.1\r\nhost: x\r\n{framing}\r\n\r\n".encode())
            assert (await caller.answer())[0] == 200
            closed = asyncio.ensure_future(caller.ends())
            while not closed.done():
                caller.send(b"1\r\na\r\n")
                await asyncio.wait([closed], timeout=0.05)
            assert await closed == b""

    async def test_the_connection_goes_on_behind_it(self) -> None:
        """A body that comes late, but comes, costs its caller nothing."""
        async with serving() as site, calling(site) as caller:
            for framing, body in [
                ("content-length: 5", b"hello"),
                ("transfer-encoding: chunked", b"1\r\na\r\n0\r\n\r\n"),
            ]:
                caller.send(f"POST / HTTP/1.1\r\nhost: x\r\n{framing}\r\n\r\n".encode())
                assert (await caller.answer())[0] == 200
                caller.send(body + get("/next"))
                assert (await caller.answer())[1] == b"/next"

    async def test_an_answer_before_100_continue_ends_the_connection(self) -> None:
        """Whether the body that it offered comes is for the caller to say: what comes next could be read in two ways."""
        async with serving() as site, calling(site) as caller:
            caller.send(b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 30\r\n\r\n")
            assert (await caller.answer())[0] == 200
            caller.send(get("/smuggled"))
            assert await caller.ends() == b""
            assert site.paths == ["/"]

    @pytest.mark.parametrize(
        ("old", "new"), [(b"1.1", b"1.0"), (b"chunked", b"gzip, chunked"), (b"chunked", b"identity")]
    )
    async def test_other_codings(self, old: bytes, new: bytes) -> None:
        """A chunked body of HTTP/1.0 could be read in two ways, and one in another coding by nobody."""
        async with serving() as site, calling(site) as caller:
            caller.send((self.CHUNKED % b"/body").replace(old, new) + b"1\r\na\r\n0\r\n\r\n")
            await caller.refused(400, "invalid_http")
            assert site.bodies == []

    @pytest.mark.parametrize("coding", [b"Chunked", b"chunked "])
    async def test_chunked_however_it_is_written(self, coding: bytes) -> None:
        """Case and blanks do not matter."""
        async with serving() as site, calling(site) as caller:
            caller.send((self.CHUNKED % b"/body").replace(b"chunked", coding) + b"1\r\na\r\n0\r\n\r\n")
            assert (await caller.answer())[0] == 200


REQUESTS = [
    get("/a"),
    b"\r\n" + get("/b", "x: y"),
    b"POST /body HTTP/1.1\r\nhost: x\r\ncontent-length: 12\r\n\r\n\r\n\r\nGET / \r\n",
    b"POST /body HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n4\r\n\r\n\r\n\r\n2;a=b\r\nhi\r\n0\r\nt: 1\r\n\r\n",
    b"POST /d HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\n\r\nunread",
    get("/e", "connection: upgrade", "upgrade: websocket"),
]
EXPECTED = {0: "/a", 1: "/b", 2: "/body", 3: "/body", 4: "/d", 5: "/e"}


class Pipe(asyncio.Transport):
    """Takes what is written, at once."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closing = False

    def write(self, data: Any) -> None:
        self.written += data

    def write_eof(self) -> None:
        self.closing = True

    def close(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


@given(
    st.lists(st.sampled_from(range(len(REQUESTS))), min_size=1, max_size=6), st.lists(st.integers(0, 700), max_size=8)
)
def test_requests_split_at_any_byte(chosen: list[int], cuts: list[int]) -> None:
    """The same bytes mean the same requests, however the network cuts them."""

    async def run() -> list[str]:
        site, pipe = Site(), Pipe()
        config = uvicorn.Config(
            site.app,
            http=HttpProtocol,
            lifespan="off",
            log_config=None,
            ws="none",
            interface="asgi3",
            proxy_headers=False,
        )
        state = SimpleNamespace(connections=set(), tasks=set(), default_headers=[], total_requests=0)
        protocol = HttpProtocol(
            config=config,
            server_state=state,
            app_state={},
            head_timeout_s=5.0,
            shutdown_state=ShutdownState(),
            limiter=site.connections,
        )
        protocol.connection_made(pipe)
        data = b"".join(REQUESTS[number] for number in chosen)
        places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
        for start, end in pairwise(places):
            protocol.data_received(data[start:end])
            await asyncio.sleep(0)
        for _ in range(200):
            await asyncio.sleep(0)
        assert pipe.written.count(b"HTTP/1.1 200 OK") == len(chosen), pipe.written
        protocol.connection_lost(None)
        return site.paths

    assert asyncio.run(run()) == [EXPECTED[number] for number in chosen]


class TestConnections:
    async def test_a_bound_for_each_address(self, eventually: Eventually) -> None:
        """One address has so many connections; the next is told so, and there is room again when one has ended."""
        site = Site(ConnectionLimiter(ConnectionBounds(most_per_address=2)))
        async with serving(site), calling(site), calling(site) as second:
            await eventually(lambda: len(site.connections) == 2)
            async with calling(site) as third:
                head = (await third.reader.readuntil(b"\r\n\r\n")).lower()
                assert head.startswith(b"http/1.1 503 ")
                assert b"\r\nretry-after: " in head
                assert b"\r\nconnection: close" in head
                error = json.loads(await third.ends())["error"]
                assert error["code"] == "too_many_connections"
                assert "MAX_CONNECTIONS_PER_ADDRESS" in error["message"]
            second.writer.close()
            await eventually(lambda: len(site.connections) == 1)
            async with calling(site) as fourth:
                fourth.send(get("/a"))
                assert (await fourth.answer())[1] == b"/a"
            assert site.connections.refused == 1

    async def test_a_bound_in_all(self, eventually: Eventually) -> None:
        """So has the gateway as a whole, trusted proxies included."""
        site = Site(ConnectionLimiter(ConnectionBounds(most=2), TrustedProxies("127.0.0.0/8")))
        async with serving(site), calling(site), calling(site):
            await eventually(lambda: len(site.connections) == 2)
            async with calling(site) as third:
                await third.refused(503, "too_many_connections")

    async def test_trusted_proxies_are_not_bound(self, eventually: Eventually) -> None:
        """Behind a proxy all connections come from one address: a trusted one has as many as it needs, and says whose they are."""
        site = Site(ConnectionLimiter(ConnectionBounds(most_per_address=1), TrustedProxies("127.0.0.0/8")))
        async with serving(site), calling(site), calling(site) as second:
            second.send(get("/a", "x-forwarded-for: 10.9.9.9, 203.0.113.7"))
            assert (await second.answer())[1] == b"/a"
            assert site.callers == ["203.0.113.7"]

    async def test_untrusted_peers_cannot_set_their_address(self) -> None:
        """`X-Forwarded-For` of a caller who is no trusted proxy counts for nothing."""
        async with serving() as site, calling(site) as caller:
            caller.send(get("/a", "x-forwarded-for: 203.0.113.7"))
            await caller.answer()
            assert site.callers == ["127.0.0.1"]


async def unread(site: Site) -> tuple[socket.socket, HttpProtocol]:
    """A connection whose caller has asked for a large answer, with the smallest of buffers."""
    loop = asyncio.get_running_loop()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    before = set(site.protocols)
    await loop.sock_connect(client, ("127.0.0.1", site.port))
    await loop.sock_sendall(client, get("/large"))
    while not (new := [p for p in site.protocols if p not in before and p.flow.write_paused]):
        await asyncio.sleep(0.01)
    return client, new[0]


class TestUnread:
    async def test_an_answer_that_is_never_read(self, eventually: Eventually) -> None:
        """A connection whose caller reads nothing ends when the time is over, not before, its answer complete or not."""
        site = Site(ConnectionLimiter(ConnectionBounds(write_timeout_s=60.0)))
        async with serving(site):
            client, protocol = await unread(site)
            reached = None
            while reached != site.connections._progress.get(protocol) or reached is None:
                # Until the caller's kernel has taken all that it will.
                reached = site.connections._progress.get(protocol)
                await asyncio.sleep(0.5)
                site.connections.sweep(0.0)
            site.connections.sweep(59.9)
            assert site.connections.stalled == 0
            assert protocol in site.protocols
            site.connections.sweep(60.1)
            assert site.connections.stalled == 1
            await eventually(lambda: not site.protocols)
            assert site.connections.unread.total == 0
            client.close()

    async def test_a_slow_reader_goes_on(self) -> None:
        """A caller who reads a little now and then keeps its connection, also while the kernel still holds enough for it."""
        site = Site(ConnectionLimiter(ConnectionBounds(write_timeout_s=60.0)))
        loop = asyncio.get_running_loop()
        async with serving(site):
            client, protocol = await unread(site)
            for minute in range(20):
                site.connections.sweep(minute * 50.0)
                taken = 0
                while taken < 16384:
                    taken += len(await loop.sock_recv(client, 4096))
                await asyncio.sleep(0.05)
            assert site.connections.stalled == 0
            assert protocol in site.protocols
            client.close()

    async def test_all_unread_bytes_have_a_bound(self, eventually: Eventually) -> None:
        """Beyond the bound for all, the owner that holds most loses its largest; the one that holds little keeps its own."""
        site = Site(ConnectionLimiter(unread=UnreadBudget(400_000)))
        clients = []
        async with serving(site):
            first, honest = await unread(site)
            honest._caller.owner = "honest"
            honest.report_unread(0)
            for _ in range(10):
                client, protocol = await unread(site)
                protocol._caller.owner = "hoarder"
                protocol.report_unread(0)
                clients.append(client)
                assert site.connections.unread.total <= 400_000
            assert site.connections.unread.shed >= 1
            await eventually(lambda: len(site.protocols) < 11)
            assert honest in site.protocols
            for client in [first, *clients]:
                client.close()
            await eventually(lambda: not site.protocols)
            assert site.connections.unread.total == 0


async def test_a_request_is_offered_before_a_task_is_made(eventually: Eventually) -> None:
    """The app may serve a request whose body came with its head; it is called for all others, and for what it begins and leaves."""

    class App(Site):
        offered: ClassVar[list[tuple[str, bytes]]] = []

        def begin(self, scope: Scope, body: bytes) -> bool:
            self.offered.append((scope["path"], body))
            exchange = scope[EXCHANGE]
            return scope["path"] == "/served" and exchange.writable and exchange.try_send(200, "a/b", body.upper(), [])

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await self.app(scope, receive, send)

    def post(path: str) -> bytes:
        return f"POST {path} HTTP/1.1\r\nhost: nexus\r\ncontent-length: 3\r\n\r\n".encode()

    async with serving(App()) as site, calling(site) as caller:
        for path in ("/served", "/left", "/served"):
            caller.send(post(path) + b"abc")
            assert await caller.answer() == (200, b"ABC" if path == "/served" else path.encode())
        for first in (b"", b"a"):
            site.paths.clear()
            caller.send(post("/body") + first)
            await eventually(lambda: site.paths == ["/body"])
            caller.send(b"abc"[len(first) :])
            assert await caller.answer() == (200, b"/body")
        caller.send(post("/served") + b"abc" + post("/served") + b"abc")
        assert [await caller.answer() for _ in range(2)] == [(200, b"ABC")] * 2
        assert App.offered == [("/left" if number == 1 else "/served", b"abc") for number in range(5)]


async def test_a_body_that_comes_behind_its_head_is_awaited(
    monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    """Many HTTP clients send the two apart; the app is offered both."""
    monkeypatch.setattr(connection, "AWAITED_BODY_S", 60)

    class App(Site):
        def begin(self, scope: Scope, body: bytes) -> bool:
            return bool(scope[EXCHANGE].try_send(200, "a/b", body, []))

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            raise AssertionError

    async with serving(App()) as site, calling(site) as caller:
        caller.send(b"POST / HTTP/1.1\r\nhost: nexus\r\ncontent-length: 3\r\n\r\n")
        await eventually(lambda: any(protocol.cycle for protocol in site.protocols))
        caller.send(b"abc")
        assert await caller.answer() == (200, b"abc")


async def test_a_served_request_leaves_nothing_to_the_garbage_collector() -> None:
    """No reference cycle is left behind an answer: collecting them would cost as much as serving."""

    class App(Site):
        cycles: ClassVar[list[weakref.ref[Any]]] = []

        def begin(self, scope: Scope, _body: bytes) -> bool:
            self.cycles.append(weakref.ref(scope[EXCHANGE]._cycle))
            scope[EXCHANGE].on_disconnect(lambda: scope.clear())
            return bool(scope[EXCHANGE].try_send(200, "a/b", b"ok", []))

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            raise AssertionError

    async with serving(App()) as site, calling(site) as caller:
        gc.disable()
        try:
            for _ in range(3):
                caller.send(b"POST / HTTP/1.1\r\nhost: nexus\r\ncontent-length: 2\r\n\r\n{}")
                assert await caller.answer() == (200, b"ok")
            assert [cycle() for cycle in App.cycles[:2]] == [None, None]
        finally:
            gc.enable()
