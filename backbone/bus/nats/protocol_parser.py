"""Parses NATS's protocol in place of nats-py's parser, which costs several times as much per message.

The private names of nats-py that this file uses are listed in `backbone.bus.nats.connection`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import nats.errors
from nats.aio.client import Client
from nats.errors import ProtocolError

from backbone.bus.refusal_counter import RefusalCounter

MessageHandler = Callable[[bytes, bytes, bytes, bytes], None]
"""(subject, reply subject or b"", raw headers or b"", payload)"""
MAX_LINE_BYTES = 8192
"""Twice the limit of nats-server, whose line for a message may be longer than the one it received."""


class DirectReader(asyncio.Protocol):
    """Feeds the parser from the socket, past nats-py's stream and its task; nats-py gets the lines that it must handle."""

    def __init__(self, parser: ProtocolParser, stream: Any, buffered: int) -> None:
        """`stream` is the protocol of nats-py's stream, which holds `buffered` bytes."""
        self._parser = parser
        self._stream = stream
        parser.behind = buffered
        self.connection_lost = stream.connection_lost  # type: ignore[method-assign]
        self.eof_received = stream.eof_received  # type: ignore[method-assign]
        self.pause_writing = stream.pause_writing  # type: ignore[method-assign]
        self.resume_writing = stream.resume_writing  # type: ignore[method-assign]

    def data_received(self, data: bytes) -> None:
        """Handle the messages at once; leave what follows a line for nats-py to the stream until that is handled."""
        parser = self._parser
        if not parser.client.is_connected:
            return  # given up: the parser already waits for the next connection
        rest = data if parser.behind else parser.feed(data)
        if rest:
            parser.behind += len(rest)
            self._stream.data_received(rest)


class ProtocolParser:
    """Parses NATS's protocol in place of nats-py's parser, and calls the handlers of this process's subscriptions directly."""

    def __init__(self, client: Client, handlers: dict[int, MessageHandler], refusals: RefusalCounter) -> None:
        self.client: Any = client
        self.handlers = handlers
        self.refusals = refusals
        self.parts: list[bytes] = []
        self.size = 0
        self.needed = 0
        self.received = False
        """Data has arrived since `NatsConnection.take_received` was last called."""
        self.behind = 0
        """Bytes that nats-py has received and `parse` has not handled; `feed` must not overtake them."""

    def reset(self) -> None:
        """Drop a half-read message, for a new connection."""
        self.parts = []
        self.size = self.needed = self.behind = 0

    async def parse(self, data: bytes = b"") -> None:
        """Handle every complete message in the data so far. Raises ProtocolError."""
        rest = self.feed(data)
        while rest:
            rest = await self._pass_on(rest)
            if not self.client.is_connected:
                return  # the line has ended the connection, and the parser is reset
            rest = self.feed(rest)
        self.behind -= len(data)

    def feed(self, data: bytes) -> bytes:
        """Handle the messages of this process's subscriptions, up to the first line that nats-py must handle.

        Return that line and what follows it. Empty: everything is handled, or waits for the rest of a message.
        """
        self.received = True
        if self.parts:
            self.parts.append(data)
            self.size += len(data)
            if self.size < self.needed:
                return b""
            data = b"".join(self.parts)
            self.parts = []
        handlers = self.handlers
        pos, end = 0, len(data)
        self.needed = 0
        while pos < end:  # one flat loop: a call per message would show
            eol = data.find(b"\r\n", pos)
            if eol < 0:
                if end - pos > MAX_LINE_BYTES:
                    return data[pos:]
                break
            op = data[pos]
            if op == 77:  # MSG
                args = data[pos + 4 : eol].split(b" ")
                start = body = eol + 2
                reply = args[2] if len(args) == 4 else b""
            elif op == 72:  # HMSG
                args = data[pos + 5 : eol].split(b" ")
                start = eol + 2
                body = start + int(args[-2])
                reply = args[2] if len(args) == 5 else b""
            else:
                return data[pos:]
            stop = start + int(args[-1])
            if stop + 2 > end:
                self.needed = stop + 2 - pos
                break
            handler = handlers.get(int(args[1]))
            if handler is None:
                return data[pos:]
            pos = stop + 2
            try:
                handler(args[0], reply, data[start:body], data[body:stop])
            except Exception as error:  # nats-py would stop reading, and still report a connection
                self.refusals.add("message", subject=repr(args[0][:100]), error=repr(error))
        if pos < end:
            rest = data[pos:]
            self.parts = [rest]
            self.size = len(rest)
        return b""

    async def _pass_on(self, data: bytes) -> bytes:
        """Let nats-py handle the first line, with its message, and return what follows. Raises ProtocolError."""
        eol = data.find(b"\r\n")
        if eol < 0:
            raise ProtocolError
        start = eol + 2
        if not data.startswith((b"MSG ", b"HMSG ")):
            await self._control(data[:eol])
            return data[start:]
        op, *args = data[:eol].split(b" ")
        body = start + (int(args[-2]) if op == b"HMSG" else 0)
        stop = start + int(args[-1])
        reply = args[2] if len(args) == (5 if op == b"HMSG" else 4) else b""
        await self.client._process_msg(int(args[1]), args[0], reply, data[body:stop], data[start:body] or None)
        return data[stop + 2 :]

    async def _control(self, line: bytes) -> None:
        if line.startswith(b"PING"):
            await self.client._process_ping()
        elif line.startswith(b"PONG"):
            await self.client._process_pong()
        elif line.startswith(b"-ERR"):
            await self._on_server_error(line[4:].strip().decode().lower())
        elif line.startswith(b"INFO"):
            await self.client._process_info(json.loads(line[4:]))
        elif not line.startswith(b"+OK"):
            raise ProtocolError

    async def _on_server_error(self, text: str) -> None:
        """Handle an error of the server. nats-py would close forever, except for a missing permission; the server may accept
        the next connection.
        """
        if "permissions violation" in text:
            await self.client._process_err(text)
        else:
            await self.client._error_cb(nats.errors.Error(f"nats: {text}"))
            await self.client._process_op_err(nats.errors.Error(f"nats: {text}"))
