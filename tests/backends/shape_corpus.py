"""Recorded wire shapes of servers of text, and a double that replays them over HTTP, cut as a test likes.

`shapes/*.json` hold what was seen: server, version, quirk, where it was reported, the answer's status, headers and body, and
what a caller must get. In a body, a lone surrogate U+DC80…U+DCFF stands for a byte that is not UTF-8.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from tests.servers import here

JSON = dict[str, Any]

FOLDER = Path(__file__).parent / "shapes"
MODEL = "shape"
CUTS = ("whole", "events", "random", "characters", "bytes")
DRIBBLE_LIMIT = 4_000
"""Bytes that are sent one by one at most."""
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
DOCUMENTS: dict[str, Any] = {
    "/health": {},
    "/readyz": {"status": "ready"},
    "/v1/models": {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "tests"}]},
    "/v1/metadata": {
        "schema_version": "v1",
        "service": {"name": "shapes"},
        "models": [{"id": MODEL, "capabilities": ["chat", "completions"]}],
        "endpoints": [{"path": path, "method": "POST", "operation_id": path} for path in PATHS.values()],
    },
    "/api/version": {"version": "0.13.1"},
    "/api/tags": {"models": [{"name": f"{MODEL}:latest", "model": f"{MODEL}:latest", "digest": "d"}]},
    "/api/ps": {"models": [{"name": f"{MODEL}:latest", "model": f"{MODEL}:latest"}]},
    "/api/show": {"capabilities": ["completion", "tools", "thinking"], "model_info": {}},
}


@dataclass(frozen=True)
class Shape:
    """One recorded shape."""

    file: str
    entry: JSON

    @property
    def id(self) -> str:
        """Its name, which no other has."""
        return f"{self.file}/{self.entry['name']}"

    @property
    def adapter(self) -> str:
        """The adapter whose wire it is."""
        return str(self.entry.get("adapter", "openai"))

    @property
    def endpoint(self) -> str:
        """`chat` or `completions`."""
        return str(self.entry.get("endpoint", "chat"))

    @property
    def request(self) -> JSON:
        """What a caller sends beside the prompt."""
        return dict(self.entry.get("request", {}))

    @property
    def want(self) -> JSON:
        """What a caller must get."""
        return {name: _expanded(value) if name == "content" else value for name, value in self.entry["want"].items()}

    @property
    def headers(self) -> dict[str, str]:
        """The answer's."""
        return dict(self.entry["headers"])

    @property
    def pieces(self) -> list[bytes]:
        """The body, as the server wrote it."""
        pieces = [_expanded(piece).encode("utf-8", "surrogateescape") for piece in self.entry["body"]]
        return [gzip.compress(b"".join(pieces))] if self.headers.get("content-encoding") == "gzip" else pieces

    def cut(self, how: str) -> list[bytes]:
        """The body in the pieces in which it arrives."""
        data = b"".join(self.pieces)
        if how == "events":
            return self.pieces
        if how == "bytes":
            return [data[at : at + 1] for at in range(min(len(data), DRIBBLE_LIMIT))] + [data[DRIBBLE_LIMIT:]]
        edges: list[int] = []
        if how == "random":
            luck = random.Random(self.id)
            edges = [luck.randrange(max(1, len(data))) for _ in range(12)]
        elif how == "characters":  # within UTF-8 sequences, escapes, and line ends
            edges = [at for at in range(1, len(data)) if data[at] & 0xC0 == 0x80 or data[at - 1 : at] in b"\r\n\\"][
                :500
            ]
        marks = [0, *sorted(edges), len(data)]
        return [data[start:end] for start, end in pairwise(marks)]


def _expanded(value: Any) -> str:
    """`{"repeat": [front, text, times, back]}` stands for a long text."""
    if isinstance(value, str):
        return value
    front, text, times, back = value["repeat"]
    return str(front + text * times + back)


@cache
def shapes() -> tuple[Shape, ...]:
    """Every recorded shape."""
    files = sorted(FOLDER.glob("*.json"))
    found = [Shape(file.stem, entry) for file in files for entry in json.loads(file.read_text())]
    assert len({shape.id for shape in found}) == len(found)
    return tuple(found)


@cache
def _by_id() -> dict[str, Shape]:
    return {shape.id: shape for shape in shapes()}


class ShapeServer:
    """`async with ShapeServer() as server`: answers each POST with `server.shape`, cut as `server.how` says.

    Without a shape, a request's `user` names the one that answers it.
    """

    def __init__(self) -> None:
        self.shape: Shape | None = None
        self.how = "whole"
        self.requests: list[JSON] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where it listens."""
        assert self._server is not None
        return f"http://{here()}:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, here(), 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    await self._one(reader, writer)
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        path = head.split(" ", 2)[1]
        headers = dict(line.lower().split(": ", 1) for line in head.strip().split("\r\n")[1:])
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        document = DOCUMENTS.get(path)
        if document is not None or head.startswith("GET"):
            await _send(
                writer,
                404 if document is None else 200,
                {"content-type": "application/json"},
                [json.dumps(document).encode()],
            )
            return
        self.requests.append(json.loads(body))
        shape = self.shape or _by_id()[self.requests[-1]["user"]]
        await _send(writer, int(shape.entry.get("status", 200)), shape.headers, shape.cut(self.how))


async def _send(writer: asyncio.StreamWriter, status: int, headers: dict[str, str], pieces: list[bytes]) -> None:
    lines = [
        f"HTTP/1.1 {status} X",
        "transfer-encoding: chunked",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
    for piece in filter(None, pieces):
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await writer.drain()
        await asyncio.sleep(0)  # the reader sees it alone
    writer.write(b"0\r\n\r\n")
    await writer.drain()


# What a caller must get


def check_error(info: Any, want: JSON) -> None:
    """Compare an error's status, code and words."""
    assert info.status == want["status"], info
    assert want.get("code") in (None, info.code), info
    assert want.get("says", "") in info.message, info


def check_whole(body: JSON, shape: Shape, model: str) -> None:
    """Compare an answer in one piece, and hold that it is what OpenAI's client expects."""
    _check_envelope([body], shape, model, "chat.completion" if shape.endpoint == "chat" else "text_completion")
    (choice,) = body["choices"]
    assert choice["index"] == 0
    want = shape.want
    assert choice["finish_reason"] == want["finish_reason"]
    if shape.endpoint == "completions":
        assert choice["text"] == want["content"]
    else:
        message = choice["message"]
        assert message["role"] == "assistant"
        _check_message(message, want)
        assert all("index" not in call for call in message.get("tool_calls") or ())
    _check_usage(body.get("usage"), want)


def check_stream(events: list[JSON], shape: Shape, model: str) -> None:
    """Compare a stream that was asked for with its usage, added up as clients do it."""
    _check_envelope(events, shape, model, "chat.completion.chunk" if shape.endpoint == "chat" else "text_completion")
    want, usage = shape.want, None
    if not events[-1]["choices"]:
        usage = events.pop()["usage"]
    assert all(event.get("usage") is None for event in events)
    choices = [choice for event in events for choice in event["choices"]]
    assert [choice["index"] for choice in choices] == [0] * len(choices)
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [want["finish_reason"]]
    if shape.endpoint == "completions":
        assert "".join(choice["text"] for choice in choices) == want["content"]
    else:
        deltas = [choice["delta"] for choice in choices]
        assert [delta.get("role") for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        _check_message(_added_up(deltas), want)
    _check_usage(usage, want)


def _check_envelope(events: list[JSON], shape: Shape, model: str, kind: str) -> None:
    names = ("id", "object", "created", "model")
    assert len({tuple(event[name] for name in names) for event in events}) == 1, "it changes from event to event"
    first = events[0]
    assert isinstance(first["id"], str)
    assert first["id"]
    assert (first["object"], first["model"]) == (kind, model)
    assert isinstance(first["created"], int)
    assert 1_000_000_000 < first["created"] < 10_000_000_000
    for name in ("id", "created"):
        assert shape.want.get(name) in (None, first[name])


def _added_up(deltas: list[JSON]) -> JSON:
    """As OpenAI's clients add up: strings grow, calls by their index."""
    message: JSON = {}
    calls: dict[int, JSON] = {}
    for delta in deltas:
        for name in ("content", "reasoning_content", "reasoning", "refusal"):
            if delta.get(name) is not None:
                assert isinstance(delta[name], str), delta
                message[name] = message.get(name, "") + delta[name]
        for piece in _pieces(delta):
            call = calls.setdefault(
                piece["index"], {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
            )
            call["id"] += piece.get("id") or ""
            for name, value in piece.get("function", {}).items():
                call["function"][name] += value or ""
    assert list(calls) == list(range(len(calls)))
    if calls:
        message["tool_calls"] = list(calls.values())
    functions = [delta["function_call"] for delta in deltas if delta.get("function_call")]
    if functions:
        names = ("name", "arguments")
        message["function_call"] = {name: "".join(one.get(name) or "" for one in functions) for name in names}
    return message


def _pieces(delta: JSON) -> Iterator[JSON]:
    calls = delta.get("tool_calls") or []
    assert isinstance(calls, list)
    yield from calls


def _check_message(message: JSON, want: JSON) -> None:
    assert (message.get("content") or "") == want["content"]
    assert (message.get("reasoning_content") or message.get("reasoning") or "") == want.get("reasoning", "")
    assert (message.get("refusal") or "") == want.get("refusal", "")
    calls = message.get("tool_calls") or []
    assert len(calls) == len(want.get("tool_calls", ())), calls
    assert len({call["id"] for call in calls}) == len(calls)
    for call, expected in zip(calls, want.get("tool_calls", ()), strict=True):
        assert call["id"]
        assert call["type"] == "function"
        assert expected.get("id") in (None, call["id"])
        assert call["function"]["name"] == expected["name"]
        assert json.loads(call["function"]["arguments"]) == expected["arguments"]
    if "function_call" in want:
        assert message["function_call"]["name"] == want["function_call"]["name"]
        assert json.loads(message["function_call"]["arguments"]) == want["function_call"]["arguments"]


def _check_usage(usage: JSON | None, want: JSON) -> None:
    if "usage" in want:
        assert usage is not None
        assert [usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")] == want["usage"]
