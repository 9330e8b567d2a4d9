"""The shutdown of the HTTP server, for callers that connect at that moment."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from gateway.health import ShutdownState
from gateway.http.asgi import Receive, Reply, Scope, Send
from gateway.server import _server

QUESTION = b"GET / HTTP/1.1\r\nhost: nexus\r\n\r\n"


async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
    await Reply(send, "req_1").send_response(200, "text/plain", b"here")


async def test_a_pending_connection_is_answered() -> None:
    """A connection that nobody has accepted when the server stops listening is answered, and then closed; the next one is refused."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    shutdown_state = ShutdownState()
    server = _server(app, 5.0, shutdown_state, 5.0)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0)
    # The kernel connects them; the loop has no turn before the server stops.
    callers = [socket.create_connection(address) for _ in range(5)]
    for caller in callers[:3]:
        caller.sendall(QUESTION)
    shutdown_state.begin()
    stopping = asyncio.create_task(server.shutdown([listener]))
    await asyncio.sleep(0)
    for caller in callers[3:]:
        caller.sendall(QUESTION)
    for caller in callers:
        reader, writer = await asyncio.open_connection(sock=caller)
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer
        writer.close()
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(address)
        raise AssertionError("somebody still listens")
    await stopping
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
