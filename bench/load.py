"""The load generator: one process, one event loop, raw asyncio protocols.

    python -m bench.load '{"mode": "closed", "port": 8800, "key": "…", "conns": 64, "seconds": 3}'

prints one line of JSON. `closed`: every connection sends its next request when it has the answer to the last; `what`
says what it asks for, and each answer is checked for its length.
`stream`: every connection asks for one stream and checks it token by token against what mock.py sends: each one there,
in order, once, and `[DONE]` at the end. Times are microseconds.
"""

from __future__ import annotations

import asyncio
import gc
import re
import sys
import time
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import httptools
import orjson
import uvloop

from bench.report import summary

STAMP = re.compile(rb'"T(\d+)\.(\d+) "')
WARM_S = 0.5
"""Answers to requests sent before this are not counted."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One run."""

    mode: str
    port: int
    conns: int
    key: str = ""
    model: str = "mock"
    seconds: float = 3.0
    """Closed loop: how long."""
    tokens: int = 9
    delay_us: int = 0
    """Pace of the tokens that is asked of the mock."""
    ramp_s: float = 0.0
    """The streams begin evenly over this."""
    what: str = "chat"
    """Or `image`, `embeddings`, `speech`; of jobs `submit`, `durable`, `poll`, `events`."""
    job: str = ""
    """Which one is polled, or followed from its first event."""
    size: int = 0
    """Bytes of a picture or a sound; texts of a request for embeddings."""
    timeout_s: float = 30.0
    """A run that is not over this long after it should be is given up."""

    def request(self) -> bytes:
        auth = f"authorization: Bearer {self.key}\r\n" if self.key else ""
        if self.what in {"poll", "events"}:
            path = f"/v1/jobs/{self.job}" + ("/events" if self.what == "events" else "")
            return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\n{auth}\r\n".encode()
        path, body = self._asked()
        if self.what == "durable":
            auth += "prefer: respond-async, wait=30\r\n"
        data = orjson.dumps(body | ({} if self.what == "submit" else {"mock_delay_us": self.delay_us}))
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\n{auth}"
        return f"{head}content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data

    def _asked(self) -> tuple[str, dict[str, Any]]:
        if self.what == "image":
            return "/v1/images/generations", {"model": "mock-sdxl", "prompt": "a cat", "mock_size": self.size}
        if self.what == "embeddings":
            texts = [f"text number {index} of a batch that is to be embedded" for index in range(self.size)]
            return "/v1/embeddings", {"model": "mock-embed", "input": texts}
        if self.what == "speech":
            sound = {"model": "mock-tts", "input": "Hello.", "voice": "alloy", "response_format": "pcm"}
            return "/v1/audio/speech", sound | {"mock_size": self.size}
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": "Say hello."}]}
        body["max_tokens"] = self.tokens
        if self.mode == "stream":
            body["stream"] = True
        if self.what == "submit":
            return "/v1/jobs", {"endpoint": "/v1/chat/completions", "body": body}
        return "/v1/chat/completions", body

    def is_right(self, status: int, body: bytes) -> bool:
        """Whether this is the answer that was asked for."""
        if self.what == "submit":
            return status == 202 and b'"object":"job"' in body
        if status != 200:
            return False
        if self.what == "poll":
            return b'"object":"job"' in body
        if self.what == "events":
            return body.count(b"event: job.chunk\n") >= self.size and b"event: job.completed\n" in body
        if self.what == "image":
            return b'"b64_json"' in body and len(body) > self.size * 4 // 3
        if self.what == "embeddings":
            return body.count(b'"embedding":') == self.size
        if self.what == "speech":
            return len(body) == self.size
        return b'"choices"' in body


class Run:
    """What all connections share: the clock, and what they have seen."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.request = spec.request()
        self.latency, self.ttft, self.relay, self.gap = (array("d") for _ in range(4))
        self.errors: Counter[str] = Counter()
        self.first_error = ""
        self.answers = self.in_window = self.tokens = self.open = 0
        self.began = time.monotonic_ns()
        self.count_from = self.began + int(WARM_S * 1e9)
        self.stop_at = self.count_from + int(spec.seconds * 1e9)
        self.first_token = self.last_token = 0
        self.over = asyncio.Event()

    def error(self, kind: str, detail: str) -> None:
        self.errors[kind] += 1
        self.first_error = self.first_error or f"{kind}: {detail[:300]}"

    def closed(self) -> None:
        self.open -= 1
        if not self.open:
            self.over.set()

    def result(self) -> dict[str, Any]:
        spec, stream = self.spec, self.spec.mode == "stream"
        span = (self.last_token - self.first_token) / 1e9
        return {
            "spec": asdict(spec) | {"key": ""},
            "elapsed_s": round((time.monotonic_ns() - self.began) / 1e9, 3),
            "answers": self.answers,
            "tokens": self.tokens,
            "units": self.tokens if stream else self.answers,
            "per_s": None if stream else round(self.in_window / spec.seconds, 1),
            "tokens_per_s": round(self.tokens / span, 1) if span else None,
            "latency_us": summary(self.latency),
            "ttft_us": summary(self.ttft),
            "relay_us": summary(self.relay),
            "gap_us": summary(self.gap),
            "errors": dict(self.errors),
            "failed": self.errors.total(),
            "first_error": self.first_error,
        }


class Connection(asyncio.Protocol):
    """One connection of the closed loop."""

    def __init__(self, run: Run, began: int) -> None:
        self.run = run
        self.parser: Any = None
        self.transport: asyncio.Transport
        self.sent_at = began
        self.now = self.first = 0
        self.busy = True
        self.body: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.parser = httptools.HttpResponseParser(self)
        self.transport.write(self.run.request)

    def data_received(self, data: bytes) -> None:
        self.now = time.monotonic_ns()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.run.error("http", str(error))
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.busy:
            return
        self.run.error("connection", f"closed in the middle of an answer ({exc})")
        self.run.closed()

    def on_body(self, data: bytes) -> None:
        if not self.body:
            self.first = self.now
        self.body.append(data)

    def on_message_complete(self) -> None:
        run, now = self.run, self.now
        body, self.body = b"".join(self.body), []
        status = self.parser.get_status_code()
        if run.spec.is_right(status, body):
            run.answers += 1
            run.in_window += run.count_from <= now <= run.stop_at
            if self.sent_at >= run.count_from:
                run.latency.append((now - self.sent_at) / 1e3)
                run.ttft.append((self.first - self.sent_at) / 1e3)
        else:
            run.error(f"status {status}", body[:300].decode(errors="replace"))
        if now >= run.stop_at:
            self.finish()
        else:
            self.sent_at = time.monotonic_ns()
            self.transport.write(run.request)

    def finish(self) -> None:
        self.busy = False
        self.transport.close()
        self.run.closed()


class StreamConnection(Connection):
    """One stream."""

    def __init__(self, run: Run, began: int) -> None:
        super().__init__(run, began)
        self.rest = b""
        self.count = 0
        self.done = self.disordered = False
        self.last = 0

    def on_body(self, data: bytes) -> None:
        data = self.rest + data if self.rest else data
        end = data.rfind(b"\n") + 1
        data, self.rest = data[:end], data[end:]
        stamps = STAMP.findall(data)
        if stamps:
            self.take(stamps)
        elif b'"error"' in data:
            self.run.error("stream", data.decode(errors="replace"))
        if b"data: [DONE]" in data:
            self.done = True

    def take(self, stamps: list[tuple[bytes, bytes]]) -> None:
        run, now = self.run, self.now
        if self.last:
            run.gap.append((now - self.last) / 1e3)
        else:
            run.ttft.append((now - self.sent_at) / 1e3)
            run.first_token = run.first_token or now
        self.last = run.last_token = now
        for sent, index in stamps:
            run.relay.append((now - int(sent)) / 1e3)
            self.disordered |= int(index) != self.count
            self.count += 1
        run.tokens += len(stamps)

    def on_message_complete(self) -> None:
        run, status = self.run, self.parser.get_status_code()
        if status != 200:
            run.error(f"status {status}", self.rest.decode(errors="replace"))
        elif self.disordered:
            run.error("order", "a token is missing, doubled or out of its place")
        elif self.count != run.spec.tokens or not self.done:
            run.error("short", f"{self.count} of {run.spec.tokens} tokens, [DONE]: {self.done}")
        else:
            run.answers += 1
            run.latency.append((self.now - self.sent_at) / 1e3)
        self.finish()


async def connect(run: Run, kind: type[Connection]) -> None:
    connection = kind(run, time.monotonic_ns())
    try:
        await asyncio.get_running_loop().create_connection(lambda: connection, "127.0.0.1", run.spec.port)
    except OSError as error:
        run.error("connect", str(error))
        run.closed()


async def measure(spec: Spec) -> dict[str, Any]:
    run = Run(spec)
    kind = StreamConnection if spec.mode == "stream" else Connection
    expected = spec.ramp_s + spec.tokens * spec.delay_us / 1e6 if spec.mode == "stream" else WARM_S + spec.seconds
    run.open = spec.conns
    loop = asyncio.get_running_loop()
    began = loop.time()
    tasks = []
    for i in range(spec.conns):
        await asyncio.sleep(max(0.0, began + spec.ramp_s * i / spec.conns - loop.time()))
        tasks.append(loop.create_task(connect(run, kind)))
    try:
        await asyncio.wait_for(run.over.wait(), began + expected + spec.timeout_s - loop.time())
    except TimeoutError:
        for _ in range(run.open):
            run.error("timeout", f"not over {spec.timeout_s:g} s after it should have been")
    return run.result()


if __name__ == "__main__":
    gc.disable()
    sys.stdout.buffer.write(orjson.dumps(uvloop.run(measure(Spec(**orjson.loads(sys.argv[1]))))) + b"\n")
