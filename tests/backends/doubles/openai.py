"""A protocol-true double of an OpenAI-compatible server, with faults on request. It counts what it is doing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from tests.servers import here


@dataclass
class Behavior:
    """What the next answers look like."""

    words: tuple[str, ...] = ("Hello", " there", ",", " world", "!")
    deltas: tuple[dict[str, Any], ...] = ()
    """Instead of words: whole deltas."""
    finish: str | None = "stop"
    raw: bytes | None = None
    """Instead of anything: the stream's bytes."""
    token_delay_s: float = 0.0
    first_delay_s: float = 0.0
    hold: asyncio.Event | None = None
    """Nothing is answered until it is set."""
    hang: Literal["", "before_head", "before", "mid"] = ""
    drop: Literal["", "before", "mid", "end"] = ""
    done: bool = True
    error_in_stream: dict[str, Any] | None = None
    status: int = 200
    error: Any = None
    """The body of an answer whose status is not 200."""
    headers: dict[str, str] = field(default_factory=dict)
    loading: bool = False
    role: bool = True
    newline: str = "\n"
    dribble: bool = False
    pings: bool = False
    model: str | None = None
    usage: Literal["chunk", "last", "no"] = "chunk"
    spaces: bool = False
    """JSON as Python's `json.dumps` writes it."""
    no_stream_options: bool = False
    chunked: bool = True
    """Otherwise the body ends with the connection."""
    ticking: bool = False
    """`created` grows from chunk to chunk, `id` changes."""
    models: tuple[dict[str, Any], ...] = ({"id": "double", "object": "model", "created": 7, "owned_by": "tests"},)
    models_status: int = 200
    health_status: int = 200
    props: dict[str, Any] | None = None


@dataclass
class ReceivedRequest:
    """A request that arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


class OpenAIDouble:
    """`async with OpenAIDouble() as double`: `double.url`; `double.behave(...)` sets how it answers from now on."""

    def __init__(self) -> None:
        self.behavior = Behavior()
        self.seen: list[ReceivedRequest] = []
        self.connections = 0
        self.streaming = 0
        """Answers being produced right now."""
        self.disconnected = asyncio.Event()
        """A client went away in the middle of an answer."""
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://{here()}:{self.port}"

    @property
    def last(self) -> ReceivedRequest:
        return next(seen for seen in reversed(self.seen) if seen.method == "POST")

    def behave(self, **changes: Any) -> None:
        self.behavior = replace(Behavior(), **changes)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Listen; again on the same port after `kill`."""
        self._server = await asyncio.start_server(self._connected, here(), self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def kill(self) -> None:
        """Die: every connection is cut."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def drop_idle(self) -> None:
        """Close the connections that nobody uses, as servers do after a while."""
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while await self._one(reader, writer):
                    pass
        finally:
            writer.close()
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *lines = head.strip().split("\r\n")
        method, path, _ = line.split(" ")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.seen.append(ReceivedRequest(method, path, headers, body))
        behavior = self.behavior
        if behavior.loading:
            return await send_answer(
                writer, 503, {"error": {"message": "Loading model", "code": 503}}, {"retry-after": "3"}
            )
        if method == "GET":
            return await self._get(path, writer)
        return await self._post(self.seen[-1], reader, writer)

    async def _get(self, path: str, writer: asyncio.StreamWriter) -> bool:
        behavior = self.behavior
        if path == "/health":
            return await send_answer(writer, behavior.health_status, {"status": "ok"})
        if path.endswith("/models"):
            return await send_answer(writer, behavior.models_status, {"object": "list", "data": list(behavior.models)})
        if path == "/props" and behavior.props is not None:
            return await send_answer(writer, 200, behavior.props)
        return await send_answer(writer, 404, {"error": {"message": "File Not Found", "code": 404}})

    async def _post(self, seen: ReceivedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        behavior = self.behavior
        if behavior.status != 200:
            return await send_answer(writer, behavior.status, behavior.error, behavior.headers)
        try:
            body = seen.json
        except json.JSONDecodeError:
            return await send_answer(writer, 400, {"error": {"message": "bad JSON", "type": "invalid_request_error"}})
        if behavior.no_stream_options and "stream_options" in body:
            error = {"message": "unknown field: stream_options", "type": "invalid_request_error"}
            return await send_answer(writer, 400, {"error": error})
        if not isinstance(body.get("messages", []), list):
            error = {"message": "messages must be a list", "type": "invalid_request_error", "param": "messages"}
            return await send_answer(writer, 400, {"error": error})
        if not body.get("stream"):
            return await send_answer(writer, 200, {"error": {"message": "this double only streams"}})
        return await self._work(reader, self._produce(seen, body, writer))

    async def _work(self, reader: asyncio.StreamReader, work: Coroutine[Any, Any, bool]) -> bool:
        """`work` is an answer being produced, until the client goes away."""
        watcher = asyncio.create_task(self._watch(reader))
        producer = asyncio.create_task(work)
        self.streaming += 1
        try:
            await asyncio.wait({watcher, producer}, return_when=asyncio.FIRST_COMPLETED)
            if watcher.done():
                self.disconnected.set()
                return False
            return producer.result()
        finally:
            self.streaming -= 1
            for task in (watcher, producer):
                task.cancel()
            await asyncio.gather(watcher, producer, return_exceptions=True)

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        """Return when the client has gone. It sends nothing before the answer is complete."""
        while not reader.at_eof() and reader.exception() is None:
            await asyncio.sleep(0.005)

    async def _produce(self, seen: ReceivedRequest, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        behavior = self.behavior
        if behavior.hang == "before_head":
            await asyncio.Event().wait()
        if behavior.drop == "before":
            writer.transport.abort()
            return False
        framing = "transfer-encoding: chunked" if behavior.chunked else "connection: close"
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{framing}\r\n\r\n".encode())
        async for piece in self._pieces(seen, body):
            for part in [piece[at : at + 1] for at in range(len(piece))] if behavior.dribble else [piece]:
                writer.write(b"%x\r\n%b\r\n" % (len(part), part) if behavior.chunked else part)
                await writer.drain()
                if behavior.dribble:
                    await asyncio.sleep(0)
        if behavior.drop == "end":
            writer.close()
            return False
        if behavior.drop == "mid":
            writer.transport.abort()
            return False
        if behavior.chunked:
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        return behavior.chunked

    async def _pieces(self, seen: ReceivedRequest, body: dict[str, Any]) -> AsyncIterator[bytes]:
        behavior = self.behavior
        if behavior.raw is not None:
            yield behavior.raw
            return
        if behavior.pings:
            yield f": waiting{behavior.newline * 2}".encode()
        if behavior.hang == "before":
            await asyncio.Event().wait()
        await asyncio.sleep(behavior.first_delay_s)
        if behavior.hold is not None:
            await behavior.hold.wait()
        events = list(self._events(seen.path.endswith("/chat/completions"), body))
        for number, event in enumerate(events):
            if number == len(events) // 2:
                if behavior.hang == "mid":
                    await asyncio.Event().wait()
                if behavior.drop == "mid":
                    return
                if behavior.error_in_stream is not None:
                    yield self._event({"error": behavior.error_in_stream})
                    return
            yield self._event(event)
            if behavior.pings:
                yield f": ping{behavior.newline * 2}".encode()
            await asyncio.sleep(behavior.token_delay_s)
        if behavior.done:
            yield f"data: [DONE]{behavior.newline * 2}".encode()

    def _event(self, event: dict[str, Any]) -> bytes:
        separators = None if self.behavior.spaces else (",", ":")
        text = json.dumps(event, ensure_ascii=False, separators=separators)
        return f"data: {text}{self.behavior.newline * 2}".encode()

    def _events(self, chat: bool, body: dict[str, Any]) -> list[dict[str, Any]]:
        behavior = self.behavior
        deltas = list(behavior.deltas) or [{"content": word} for word in behavior.words]
        if chat and behavior.role:
            deltas.insert(0, {"role": "assistant", "content": ""})
        events = []
        for number, delta in enumerate(deltas):
            content = {"delta": delta} if chat else {"text": delta["content"]}
            events.append(self._chunk(chat, number, [{"index": 0, **content, "logprobs": None, "finish_reason": None}]))
        usage = {"prompt_tokens": 3, "completion_tokens": len(deltas), "total_tokens": 3 + len(deltas)}
        if behavior.finish is not None:
            end: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
            last = self._chunk(chat, 98, [{"index": 0, **end, "logprobs": None, "finish_reason": behavior.finish}])
            events.append(last | ({"usage": usage} if behavior.usage == "last" else {}))
        wanted = (body.get("stream_options") or {}).get("include_usage")
        if behavior.usage == "chunk" and wanted:
            events.append(self._chunk(chat, 99, []) | {"usage": usage})
        return events

    def _chunk(self, chat: bool, number: int, choices: list[dict[str, Any]]) -> dict[str, Any]:
        ticks = number if self.behavior.ticking else 0
        return {
            "id": f"cmpl-{ticks}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": 1_700_000_000 + ticks,
            "model": self.behavior.model or "double",
            "system_fingerprint": "fp",
            "choices": choices,
        }


async def send_answer(
    writer: asyncio.StreamWriter, status: int, body: Any, headers: dict[str, str] | None = None
) -> bool:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = "text/html" if isinstance(body, bytes) else "application/json"
    lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer.write("\r\n".join([*lines, "", ""]).encode() + data)
    await writer.drain()
    return True
