"""The HttpExchange of Nexus's HTTP server, on a real connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from gateway.health import ShutdownState
from gateway.http.asgi import EXCHANGE, HttpExchange, Reply
from gateway.http.connection import http_protocol
from gateway.http.connection_limits import ConnectionLimiter
from gateway.server import _Server
from tests.conftest import Eventually

Handler = Callable[[HttpExchange, Reply, Any], Awaitable[None]]
REQUEST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    """A server whose requests go to `handler`, on the port that this yields."""

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await handler(scope[EXCHANGE], Reply(send, "req_1"), receive)

    listener = await asyncio.get_running_loop().run_in_executor(None, _listener)
    protocol = http_protocol(5.0, ShutdownState(), ConnectionLimiter())
    config = uvicorn.Config(app, http=protocol, lifespan="off", log_config=None, loop="none")
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        await task


def _listener() -> Any:
    import socket

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


async def exchange(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(REQUEST)
    return reader, writer


async def test_direct_writes_and_sent_chunks_keep_their_order() -> None:
    """A stream may mix both ways of writing; the chunks arrive in the order they were written."""

    async def handler(exchange: HttpExchange, reply: Reply, _receive: Any) -> None:
        assert not exchange.try_write(b"before the head")
        await reply.send_head(200, [])
        assert exchange.try_write(b"one")
        await reply.send_chunk(b"two")
        assert exchange.try_write(b"three")
        await reply.send_end(b"four")
        assert not exchange.try_write(b"after the end")

    async with serving(handler) as port:
        reader, writer = await exchange(port)
        assert await reader.readuntil(b"0\r\n\r\n")
        writer.close()
        reader, writer = await exchange(port)
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readuntil(b"0\r\n\r\n") == b"3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n4\r\nfour\r\n0\r\n\r\n"
        writer.close()


async def test_an_answer_of_known_length_takes_no_direct_writes() -> None:
    """Chunks have no place in an answer with a Content-Length."""

    async def handler(exchange: HttpExchange, reply: Reply, _receive: Any) -> None:
        await reply.send_head(200, [(b"content-length", b"2")])
        assert not exchange.try_write(b"xx")
        await reply.send_end(b"ok")

    async with serving(handler) as port:
        reader, writer = await exchange(port)
        assert (await reader.readuntil(b"ok")).endswith(b"\r\n\r\nok")
        writer.close()


async def test_a_complete_answer_leaves_in_one_write_and_the_connection_continues() -> None:
    """An answer sent past ASGI has the same headers as one through it, and the next request is answered."""
    past_asgi = True

    async def handler(exchange: HttpExchange, reply: Reply, _receive: Any) -> None:
        if past_asgi:
            assert exchange.try_send(200, "text/plain", b"hello", [(b"x-one", b"1")])
            assert not exchange.try_send(200, "text/plain", b"again", [])
        else:
            await reply.send_response(200, "text/plain", b"hello", [(b"x-one", b"1")])

    async with serving(handler) as port:
        reader, writer = await exchange(port)
        one = await reader.readuntil(b"hello")
        past_asgi = False
        writer.write(REQUEST)
        other = await reader.readuntil(b"hello")
        assert sorted(one.split(b"\r\n")) == sorted(other.split(b"\r\n"))
        past_asgi = True
        writer.write(REQUEST.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1))
        last = await reader.read()
        assert b"\r\nconnection: close\r\n" in last
        assert last.endswith(b"\r\n\r\nhello")
        writer.close()


async def test_an_answer_to_head_has_no_body() -> None:
    """The answer of a poll by HEAD goes the way that leaves its body out, and the connection goes on."""

    async def handler(exchange: HttpExchange, reply: Reply, _receive: Any) -> None:
        assert not exchange.try_send(200, "text/plain", b"hello", [])
        await reply.send_response(200, "text/plain", b"hello")

    async with serving(handler) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert b"content-length: 5\r\n" in head
        writer.close()


@pytest.mark.parametrize("content_type", ["text/plain\r\nset-cookie: a=b", "text/plain\0", "a\nb"])
async def test_a_content_type_adds_no_header(content_type: str) -> None:
    """The type of an answer comes from a worker, which may be hostile."""

    async def handler(exchange: HttpExchange, _reply: Reply, _receive: Any) -> None:
        assert exchange.try_send(200, content_type, b"hello", [])

    async with serving(handler) as port:
        reader, writer = await exchange(port)
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-type: application/octet-stream\r\n" in head
        assert b"set-cookie" not in head
        writer.close()


async def test_a_complete_body_is_reported(eventually: Eventually) -> None:
    """A request whose body came with its head needs no time limit; one that is still coming does."""
    seen: list[bool] = []

    async def handler(exchange: HttpExchange, reply: Reply, receive: Any) -> None:
        seen.append(exchange.body_complete)
        while (await receive()).get("more_body"):
            pass
        await reply.send_response(200, "text/plain", b"ok")

    async with serving(handler) as port:
        reader, writer = await exchange(port)
        await reader.readuntil(b"ok")
        writer.write(REQUEST[:-2])
        await eventually(lambda: len(seen) == 2)
        writer.write(b"{}")
        await reader.readuntil(b"ok")
        writer.close()
    assert seen == [True, False]


async def test_a_disconnect_is_reported_once(eventually: Eventually) -> None:
    """Anyone who asked hears that the caller is gone; who asks too late hears it at once; who took it back, not."""
    heard: list[str] = []
    lines: list[HttpExchange] = []

    async def handler(exchange: HttpExchange, _reply: Reply, receive: Any) -> None:
        lines.append(exchange)
        exchange.on_disconnect(lambda: heard.append("taken back"))
        exchange.on_disconnect(None)
        exchange.on_disconnect(lambda: heard.append("gone"))
        while (await receive())["type"] != "http.disconnect":
            pass

    async with serving(handler) as port:
        _, writer = await exchange(port)
        await eventually(lambda: lines)
        writer.transport.abort()
        await eventually(lambda: heard)
        lines[0].on_disconnect(lambda: heard.append("late"))
    assert heard == ["gone", "late"]
