"""The HTTP client, on servers that send exactly the bytes that a test wants. On both event loops."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from workers.adapter_kit import http_connection
from workers.adapter_kit.http_client import TRACE_HEADERS, HttpClient
from workers.backends.base import BackendError, BackendUnavailable, is_unreachable

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Server:
    """Answers each request with `handler`."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.connections = 0
        self.requests: list[bytes] = []
        self.gone = asyncio.Event()
        self.url = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                await self.handler(reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            self.gone.set()
        finally:
            writer.close()


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Awaitable[tuple[Server, HttpClient]]]]:
    opened: list[Any] = []

    async def start(answer: bytes | Handler, close: bool = False) -> tuple[Server, HttpClient]:
        async def send(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert isinstance(answer, bytes)
            writer.write(answer)
            if close:
                await writer.drain()
                writer.close()

        server = Server(send if isinstance(answer, bytes) else answer)
        await server.start()
        client = HttpClient(server.url)
        opened.extend((client.close, server.stop))
        return server, client

    yield start
    for stop in opened:
        await stop()


async def test_a_connection_serves_many_requests_one_after_another(serve: Any) -> None:
    server, client = await serve(OK)
    for _ in range(5):
        response = await client.request("GET", "/x")
        assert (response.status, await response.read_all(10)) == (200, b"ok")
        assert response.headers["content-length"] == "2"
    assert server.connections == 1


async def test_a_request_says_what_it_must(serve: Any) -> None:
    server, _ = await serve(OK)
    client = HttpClient(f"{server.url}/prefix/", headers={"authorization": "Bearer k"})
    await client.request("POST", "/x", b"")
    await client.close()
    head = server.requests[0].decode()
    assert head.startswith("POST /prefix/x HTTP/1.1\r\nhost: 127.0.0.1:")
    for line in ("authorization: Bearer k", "content-length: 0", "accept-encoding: identity"):
        assert f"\r\n{line}\r\n" in head


async def test_a_request_continues_the_trace_of_its_task(serve: Any) -> None:
    """In its own headers; the requests of other tasks have none."""
    server, client = await serve(OK)
    trace = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"

    async def request() -> None:
        TRACE_HEADERS.set(trace)
        await client.request("GET", "/x")

    await asyncio.create_task(request())
    await client.request("GET", "/x")
    assert [trace in request.decode() for request in server.requests] == [True, False]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\nx: y\r\n\r\n" + OK,
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK,
    ],
)
async def test_every_framing_is_read(serve: Any, answer: bytes) -> None:
    _, client = await serve(answer, close=True)
    response = await client.request("GET", "/")
    assert (response.status, await response.read_all(10)) == (200, b"ok")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n",
    ],
)
async def test_an_answer_cut_short_is_a_transient_error(serve: Any, answer: bytes) -> None:
    _, client = await serve(answer, close=True)
    response = await client.request("GET", "/")
    with pytest.raises(BackendError, match="middle") as caught:
        await response.read_all(100)
    assert caught.value.transient


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nx: y\r\n"])
async def test_no_answer_at_all_is_a_transient_error(serve: Any, answer: bytes) -> None:
    server, client = await serve(answer, close=True)
    with pytest.raises(BackendError, match="before") as caught:
        await client.request("GET", "/")
    assert caught.value.transient
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\ncontent-length: 1\r\n\r\nx", "'br'"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip, br\r\ncontent-length: 1\r\n\r\nx", "'gzip, br'"),
        (b"HTTP/1.1 301 Moved\r\nlocation: https://b/\r\ncontent-length: 0\r\n\r\n", "https://b/"),
        (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 300_000, "headers"),
    ],
)
async def test_what_is_not_spoken_here_is_an_error(serve: Any, answer: bytes, message: str) -> None:
    _, client = await serve(answer)
    with pytest.raises(BackendError, match=message) as caught:
        await client.request("GET", "/")
    assert not caught.value.transient


async def test_a_stale_connection_is_replaced_once(serve: Any) -> None:
    async def twice(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(server.requests) == 2:
            writer.transport.abort()  # the kept connection dies as the second request arrives
        writer.write(OK)

    server, client = await serve(twice)
    for _ in range(2):
        response = await client.request("POST", "/", b"")
        assert await response.read_all(10) == b"ok"
    assert server.connections == 2
    assert len(server.requests) == 3


async def failure(client: HttpClient) -> tuple[bool, bool]:
    """Return whether the server saw nothing of the request, and whether it may be gone."""
    with pytest.raises(BackendError) as caught:
        response = await client.request("POST", "/", b"")
        await response.read_all(100)
    return isinstance(caught.value, BackendUnavailable) and caught.value.unsent, is_unreachable(caught.value)


@pytest.mark.parametrize(
    ("answer", "gone"),
    [(b"", True), (b"HTTP/1.1 200 OK\r\n", True), (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok", False)],
)
async def test_a_connection_that_breaks_says_whether_the_server_may_be_gone(
    serve: Any, answer: bytes, gone: bool
) -> None:
    """It broke before the response's head; the server may have begun the request all the same."""
    _, client = await serve(answer, close=True)
    assert await failure(client) == (False, gone)


async def test_a_refused_connection_and_an_unknown_name_have_sent_nothing(serve: Any) -> None:
    server, client = await serve(OK)
    await server.stop()
    assert await failure(client) == (True, True)
    unknown = HttpClient("http://no-such-host.invalid")
    assert await failure(unknown) == (True, True)


async def test_a_request_that_a_dying_server_may_have_seen_counts_as_sent(serve: Any) -> None:
    """The request was sent on a kept connection, which broke; a refused new connection does not change that."""

    async def dies(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(server.requests) == 2:
            server._server.close()
            writer.transport.abort()
        writer.write(OK)

    server, client = await serve(dies)
    response = await client.request("POST", "/", b"")
    assert await response.read_all(10) == b"ok"
    assert await failure(client) == (False, True)


async def test_a_new_connection_is_not_tried_twice(serve: Any) -> None:
    async def never(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    server, client = await serve(never)
    with pytest.raises(BackendError):
        await client.request("POST", "/", b"")
    assert len(server.requests) == 1


async def test_an_answer_that_was_not_read_costs_its_connection(serve: Any) -> None:
    server, client = await serve(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nok")
    response = await client.request("GET", "/")
    response.close()
    await asyncio.wait_for(server.gone.wait(), 2)
    await client.request("GET", "/")
    assert server.connections == 2


async def test_a_cancelled_request_closes_its_connection(serve: Any) -> None:
    server, client = await serve(b"")
    waiting = asyncio.create_task(client.request("GET", "/"))
    while not server.requests:
        await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait_for(server.gone.wait(), 2)


async def test_a_released_answer_keeps_its_connection_if_it_ends_soon(serve: Any) -> None:
    async def late(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n")
        await asyncio.sleep(0.05)
        writer.write(b"0\r\n\r\n")

    server, client = await serve(late)
    response = await client.request("GET", "/")
    assert await response.read() == b"ok"
    response.release()
    await asyncio.sleep(0.2)
    response = await client.request("GET", "/")
    assert server.connections == 1


async def test_a_released_answer_that_does_not_end_costs_its_connection(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connection, "RELEASE_GRACE_S", 0.05)
    server, client = await serve(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n")
    response = await client.request("GET", "/")
    assert await response.read() == b"ok"
    response.release()
    await asyncio.wait_for(server.gone.wait(), 2)


async def test_a_server_is_made_to_wait_for_a_slow_reader(serve: Any) -> None:
    total, written = 64 * 1024 * 1024, 0

    async def flood(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % total)
        for _ in range(total // 65536):
            writer.write(b"x" * 65536)
            await writer.drain()
            written += 65536

    _, client = await serve(flood)
    response = await client.request("GET", "/")
    before = -1
    while before != written:
        before = written
        await asyncio.sleep(0.1)
    assert written < total / 2
    size = 0
    while data := await response.read():
        size += len(data)
        assert len(data) <= http_connection.UNREAD_LIMIT + 256 * 1024
    assert size == total


async def test_bytes_that_a_sink_takes_do_not_wake_the_reader(serve: Any) -> None:
    """The reader gets the others, in their order; the end always wakes it."""
    begun, taken = asyncio.Event(), {b"2": asyncio.Event(), b"3": asyncio.Event()}

    async def send(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n1")
        await begun.wait()
        for byte, event in taken.items():
            writer.write(byte)
            await event.wait()
        writer.write(b"4")

    _, client = await serve(send)
    response = await client.request("GET", "/")

    def sink(data: bytes) -> bool:
        if data in taken:
            taken[data].set()
        return data in taken

    response.sink = sink
    begun.set()
    assert [await response.read() for _ in range(3)] == [b"1", b"4", b""]


async def test_a_body_larger_than_allowed_is_an_error(serve: Any) -> None:
    _, client = await serve(b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n" + b"x" * 20)
    response = await client.request("GET", "/")
    with pytest.raises(BackendError, match="larger"):
        await response.read_all(10)


async def test_what_arrived_together_is_read_together(serve: Any) -> None:
    chunks = b"".join(b"1\r\n%d\r\n" % (number % 10) for number in range(50))
    _, client = await serve(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    response = await client.request("GET", "/")
    assert await response.read() == b"0123456789" * 5
    assert await response.read() == b""


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://no-such-host.invalid:80", "https://127.0.0.1:1"])
async def test_no_connection_is_unavailable(url: str) -> None:
    client = HttpClient(url)
    with pytest.raises(BackendUnavailable):
        await client.request("GET", "/")
    await client.close()


async def test_plain_http_behind_https_is_unavailable(serve: Any) -> None:
    server, _ = await serve(OK)
    client = HttpClient(server.url.replace("http:", "https:"))
    with pytest.raises(BackendUnavailable):
        await client.request("GET", "/")
    await client.close()


async def test_tls_is_verified_against_the_systems_certificates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost"]
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
    distrustful = HttpClient(url)
    with pytest.raises(BackendUnavailable, match="certificate"):
        await distrustful.request("GET", "/")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    client = HttpClient(url)
    for _ in range(2):
        response = await client.request("GET", "/")
        assert await response.read_all(10) == b"ok"
    await client.close()
    server.close()


async def test_two_answers_to_one_request_cost_the_connection(serve: Any) -> None:
    server, client = await serve(OK + OK)
    response = await client.request("GET", "/")
    assert await response.read_all(10) == b"ok"
    await asyncio.wait_for(server.gone.wait(), 2)


@pytest.mark.parametrize("headers", [{"a": "b\r\nc: d"}, {"a\n": "b"}, {"a": "\u00e9"}])
def test_a_header_cannot_smuggle_another(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="header"):
        HttpClient("http://x", headers=headers)


# Streamed bodies


async def pieces_of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


class Feed:
    """Endless pieces; it knows whether it was closed, and how many were read."""

    def __init__(self, piece: bytes = b"x" * 65536) -> None:
        self.piece = piece
        self.taken = 0
        self.closed = False

    def __aiter__(self) -> Feed:
        return self

    async def __anext__(self) -> bytes:
        self.taken += 1
        return self.piece

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("length", "framing", "wire_form"),
    [
        (7, b"content-length: 7", b"one two"),
        (None, b"transfer-encoding: chunked", b"3\r\none\r\n4\r\n two\r\n0\r\n\r\n"),
    ],
)
async def test_a_body_is_streamed(serve: Any, length: int | None, framing: bytes, wire_form: bytes) -> None:
    """Its length is sent where it is known, and the connection is used again."""
    bodies: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        bodies.append(await reader.readexactly(len(wire_form)))
        writer.write(OK)

    server, client = await serve(answer)
    for _ in range(2):
        response = await client.request(
            "POST",
            "/x",
            pieces=pieces_of(b"one", b"", b" two"),
            length=length,
            content_type="a/b",
            headers={"x-y": "z"},
        )
        assert (response.status, await response.read_all(10)) == (200, b"ok")
    assert bodies == [wire_form] * 2
    assert framing in server.requests[0]
    assert b"\r\ncontent-type: a/b\r\n" in server.requests[0]
    assert b"\r\nx-y: z\r\n" in server.requests[0]


async def test_a_streamed_body_waits_for_a_slow_server(serve: Any) -> None:
    """No piece is read before the server takes the previous ones."""
    go = asyncio.Event()
    begun = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        begun.set()
        await go.wait()
        writer.write(OK)

    _, client = await serve(answer)
    feed = Feed()
    sending = asyncio.create_task(client.request("POST", "/x", pieces=feed, length=1 << 40))
    await begun.wait()
    before = -1
    while feed.taken != before:  # until it goes no further
        before = feed.taken
        await asyncio.sleep(0.05)
    assert feed.taken < 500
    assert not sending.done()
    go.set()
    response = await sending
    assert response.status == 200
    assert feed.closed


@pytest.mark.parametrize("closes", [False, True])
async def test_an_answer_before_the_body_is_sent_counts(serve: Any, closes: bool) -> None:
    """The sending ends, nothing is sent again, and the connection is not used again."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig")
        if closes:  # with bytes unread, which resets the connection
            await writer.drain()
            writer.close()

    server, client = await serve(answer)
    feed = Feed()
    response = await client.request("POST", "/x", pieces=feed, length=1 << 40)
    assert (response.status, await response.read_all(10)) == (413, b"big")
    assert feed.closed
    assert sum(request.startswith(b"POST") for request in server.requests) == 1
    server.handler = lambda _, writer: _write(writer, OK)
    await (await client.request("GET", "/y")).read_all(10)
    assert server.connections == 2


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)


async def test_a_streamed_body_is_never_sent_twice(serve: Any) -> None:
    """That holds even where an idle connection may have died."""
    server, client = await serve(OK)
    await (await client.request("GET", "/")).read_all(10)

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(3)
        writer.transport.abort()

    server.handler = hang_up
    with pytest.raises(BackendError) as caught:
        await client.request("POST", "/", pieces=pieces_of(b"one"), length=3)
    assert caught.value.transient
    assert server.connections == 2


@pytest.mark.parametrize(("length", "word"), [(2, "longer"), (9, "shorter")])
async def test_a_body_of_another_length_is_an_error(serve: Any, length: int, word: str) -> None:
    server, client = await serve(lambda reader, _: reader.readexactly(length))
    with pytest.raises(ValueError, match=word):
        await client.request("POST", "/", pieces=pieces_of(b"one"), length=length)
    await server.gone.wait()


async def test_what_the_source_of_a_body_raises_is_raised(serve: Any) -> None:
    """The server sees that the request is broken off."""

    async def broken() -> AsyncIterator[bytes]:
        yield b"one"
        raise KeyError("gone")

    server, client = await serve(lambda reader, _: reader.readexactly(100))
    with pytest.raises(KeyError):
        await client.request("POST", "/", pieces=broken(), length=100)
    await server.gone.wait()


async def test_a_cancelled_upload_closes_connection_and_source(serve: Any) -> None:
    begun = asyncio.Event()

    async def stall(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        begun.set()
        await asyncio.Event().wait()

    _, client = await serve(stall)
    feed = Feed()
    sending = asyncio.create_task(client.request("POST", "/", pieces=feed, length=1 << 40))
    await begun.wait()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert feed.closed
    assert not client._open or all(not connection.usable for connection in client._open)
