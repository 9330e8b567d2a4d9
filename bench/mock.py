r"""A mock OpenAI server that costs little, so that what is measured is what stands in front of it.

    python -m bench.mock --port 9100

`GET /health`, `GET /v1/models`, `POST /v1/chat/completions`, streaming or not; `/v1/images/generations` (`mock_size`
bytes of picture), `/v1/embeddings` (384 numbers a text) and `/v1/audio/speech` (`mock_size` bytes in `PIECES` pieces),
each after `mock_delay_us`, the pieces of sound as far apart. A request's `max_tokens` says how many tokens it gets, its `mock_delay_us` how long before each but the first; `GET /_set?delay_us=20000` sets the delay for
requests that do not say. Without a delay a stream gets one token per turn of the loop, as fast as it is read.

The text of a token is `T<ns>.<index> `: its time on CLOCK_MONOTONIC, which is the same in every process of a machine,
and its place in the stream. Anyone who receives it can tell how long it was under way, and whether one is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import struct
import time
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httptools
import orjson
import uvloop

TOKENS = 9
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
COMMON = b'data: {"id":"chatcmpl-mock","object":"chat.completion.chunk","created":1700000000,"model":"mock","choices":['
FIRST = COMMON + b'{"index":0,"delta":{"role":"assistant","content":"T%d.%d "},"finish_reason":null}]}\n\n'
NEXT = COMMON + b'{"index":0,"delta":{"content":"T%d.%d "},"finish_reason":null}]}\n\n'
STOP = COMMON + b'{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = COMMON + b'],"usage":%b}\n\n'
NAMES = ("mock", "mock-sdxl", "mock-embed", "mock-tts")
MODELS = {
    "object": "list",
    "data": [{"id": name, "object": "model", "created": 1700000000, "owned_by": "mock"} for name in NAMES],
}
PIECES = 20
NUMBERS = [round(((i * 37) % 200 - 100) / 1000, 6) for i in range(384)]
VECTORS = {
    "float": orjson.dumps(NUMBERS),
    "base64": b'"%b"' % base64.b64encode(struct.pack("<384f", *NUMBERS)),
}
SOUND = b"HTTP/1.1 200 OK\r\ncontent-type: audio/pcm\r\ntransfer-encoding: chunked\r\n\r\n"

IHDR = b"IHDR" + struct.pack(">IIBBBBB", 1024, 1024, 8, 2, 0, 0, 0)
PNG_HEAD = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + IHDR + struct.pack(">II", zlib.crc32(IHDR), 2**30) + b"IDAT"


@lru_cache
def picture(size: int) -> bytes:
    """An answer with a PNG of so many bytes, whose head says its size."""
    image = PNG_HEAD + bytes(max(0, size - len(PNG_HEAD)))
    return b'{"created":1700000000,"data":[{"b64_json":"%b"}]}' % base64.b64encode(image)


def vectors(request: dict[str, Any]) -> bytes:
    """An answer with the same vector for each text."""
    texts = request["input"] if isinstance(request["input"], list) else [request["input"]]
    vector = VECTORS[request.get("encoding_format") or "float"]
    data = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}' % (index, vector) for index in range(len(texts))
    )
    count = len(texts) * 8
    return b'{"object":"list","data":[%b],"model":"mock-embed","usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (
        data,
        count,
        count,
    )


def usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 8, "completion_tokens": tokens, "total_tokens": 8 + tokens}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Connection(asyncio.Protocol):
    """One caller's connection: one request after the other."""

    def __init__(self, defaults: dict[str, int]) -> None:
        self.defaults = defaults
        self.loop = asyncio.get_running_loop()
        self.parser = httptools.HttpRequestParser(self)
        self.transport: asyncio.Transport
        self.url = b""
        self.body = b""
        self.tokens = self.sent = self.size = 0
        self.delay = self.due = 0.0
        self.with_usage = False
        self.writable = True
        self.streaming = False
        self.next: asyncio.Handle | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.streaming = False
        if self.next is not None:
            self.next.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def pause_writing(self) -> None:
        self.writable = False

    def resume_writing(self) -> None:
        self.writable = True
        if self.streaming and not self.delay:
            self.step()

    # What the parser calls

    def on_message_begin(self) -> None:
        self.url = self.body = b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        parts = urlsplit(self.url.decode())
        if parts.path == "/v1/chat/completions":
            self.complete(orjson.loads(self.body))
        elif parts.path == "/v1/images/generations":
            request = orjson.loads(self.body)
            self.later(request, lambda: self.write_json(picture(request["mock_size"])))
        elif parts.path == "/v1/embeddings":
            request = orjson.loads(self.body)
            self.later(request, lambda: self.write_json(vectors(request)))
        elif parts.path == "/v1/audio/speech":
            request = orjson.loads(self.body)
            self.sent, self.size = 0, request["mock_size"]
            self.delay = request.get("mock_delay_us", 0) / 1e6
            self.due = self.loop.time()
            self.later(request, self.sound)
        elif parts.path == "/v1/models":
            self.answer(MODELS)
        elif parts.path == "/health":
            self.answer({"ok": True})
        elif parts.path == "/_set":
            self.defaults.update((name, int(value)) for name, value in parse_qsl(parts.query))
            self.answer(self.defaults)
        else:
            self.answer({"error": {"message": "nothing here"}}, b"404 Not Found")

    # Answers

    def later(self, request: dict[str, Any], work: Callable[[], None]) -> None:
        """As if somebody had worked on it."""
        delay = request.get("mock_delay_us", self.defaults["delay_us"]) / 1e6
        self.next = self.loop.call_later(delay, work) if delay else self.loop.call_soon(work)

    def sound(self) -> None:
        """Send one piece, and with the last one the end."""
        self.sent += 1
        head = SOUND if self.sent == 1 else b""
        last = self.sent == PIECES
        self.transport.write(head + chunk(bytes(self.size // PIECES)) + (b"0\r\n\r\n" if last else b""))
        if not last:
            self.due += self.delay
            self.next = self.loop.call_at(self.due + self.delay, self.sound)

    def answer(self, value: Any, status: bytes = b"200 OK") -> None:
        self.write_json(orjson.dumps(value), status)

    def write_json(self, body: bytes, status: bytes = b"200 OK") -> None:
        head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
        self.transport.write(head + body)

    def complete(self, request: dict[str, Any]) -> None:
        self.tokens = max(1, request.get("max_tokens") or TOKENS)
        if not request.get("stream"):
            message = {"role": "assistant", "content": "Hello from the mock."}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            base = {"id": "chatcmpl-mock", "object": "chat.completion", "created": 1700000000, "model": "mock"}
            self.answer(base | {"choices": choices, "usage": usage(self.tokens)})
            return
        self.delay = request.get("mock_delay_us", self.defaults["delay_us"]) / 1e6
        self.with_usage = bool((request.get("stream_options") or {}).get("include_usage"))
        self.sent = 0
        self.streaming = True
        self.due = self.loop.time()
        self.transport.write(HEAD)
        self.step()

    def step(self) -> None:
        """Send one token, and with the last one the end."""
        if not self.streaming:
            return
        data = chunk((NEXT if self.sent else FIRST) % (time.monotonic_ns(), self.sent))
        self.sent += 1
        if self.sent == self.tokens:
            self.streaming = False
            end = USAGE % orjson.dumps(usage(self.sent)) if self.with_usage else b""
            self.transport.write(data + chunk(STOP + end + b"data: [DONE]\n\n") + b"0\r\n\r\n")
            return
        self.transport.write(data)
        if self.delay:
            self.due += self.delay
            self.next = self.loop.call_at(self.due, self.step)
        elif self.writable:
            self.next = self.loop.call_soon(self.step)


async def serve(port: int) -> None:
    defaults = {"delay_us": 0}
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(defaults), "127.0.0.1", port, backlog=4096
    )
    gc.freeze()
    gc.disable()  # a collection would show as a late token
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--port", type=int, default=9100)
    uvloop.run(serve(options.parse_args().port))
