"""Parses NATS's protocol in place of nats-py's parser, which costs several times as much per message.

The private names of nats-py that this file uses are listed in `backbone.bus.nats.connection`.
"""

from __future__ import annotations

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

    def reset(self) -> None:
        """Drop a half-read message, for a new connection."""
        self.parts = []
        self.size = self.needed = 0

    async def parse(self, data: bytes = b"") -> None:  # noqa: PLR0915 - one flat loop: a call per message would show
        """Handle every complete message in the data so far."""
        self.received = True
        if self.parts:
            self.parts.append(data)
            self.size += len(data)
            if self.size < self.needed:
                return
            data = b"".join(self.parts)
            self.parts = []
        handlers = self.handlers
        pos, end = 0, len(data)
        self.needed = 0
        while pos < end:
            eol = data.find(b"\r\n", pos)
            if eol < 0:
                if end - pos > MAX_LINE_BYTES:
                    raise ProtocolError
                break
            op = data[pos]
            if op == 77:  # MSG
                args = data[pos + 4 : eol].split(b" ")
                start = eol + 2
                stop = start + int(args[-1])
                if stop + 2 > end:
                    self.needed = stop + 2 - pos
                    break
                pos = stop + 2
                reply = args[2] if len(args) == 4 else b""
                handler = handlers.get(int(args[1]))
                if handler is not None:
                    try:
                        handler(args[0], reply, b"", data[start:stop])
                    except Exception as error:  # nats-py would stop reading, and still report a connection
                        self.refusals.add("message", subject=repr(args[0][:100]), error=repr(error))
                else:
                    await self.client._process_msg(int(args[1]), args[0], reply, data[start:stop], None)
            elif op == 72:  # HMSG
                args = data[pos + 5 : eol].split(b" ")
                start = eol + 2
                body = start + int(args[-2])
                stop = start + int(args[-1])
                if stop + 2 > end:
                    self.needed = stop + 2 - pos
                    break
                pos = stop + 2
                reply = args[2] if len(args) == 5 else b""
                handler = handlers.get(int(args[1]))
                if handler is not None:
                    try:
                        handler(args[0], reply, data[start:body], data[body:stop])
                    except Exception as error:
                        self.refusals.add("message", subject=repr(args[0][:100]), error=repr(error))
                else:
                    await self.client._process_msg(int(args[1]), args[0], reply, data[body:stop], data[start:body])
            else:
                line = data[pos:eol]
                pos = eol + 2
                await self._control(line)
        if pos < end:
            rest = data[pos:]
            self.parts = [rest]
            self.size = len(rest)

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
