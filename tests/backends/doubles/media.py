"""A protocol-true double of OpenAI-style servers for all that is no text, with the ways in which real ones differ."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import wave
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal

from python_multipart import parse_form

from tests.backends.doubles.openai import OpenAIDouble, ReceivedRequest

LENGTH = 4
"""Numbers in an embedding."""
SLOW_S = 0.5
SEGMENTS = [
    {"id": 0, "start": 0.0, "end": 1.5, "text": " Hello there."},
    {"id": 1, "start": 1.5, "end": 3.0, "text": " Bye."},
]
MODELS = tuple(
    {"id": name, "object": "model", "created": 7, "owned_by": "tests"}
    for name in ("e5", "sdxl", "tts-1", "whisper-1", "reranker")
)


def png() -> bytes:
    """A red dot."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0\xff\0\0")
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", rows) + part(b"IEND", b"")


def wav(seconds: float = 0.5, rate: int = 24_000) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(bytes(range(250)) * 2 * int(seconds * rate / 250))
    return out.getvalue()


@dataclass
class Media:
    """How this server is."""

    base64: Literal["yes", "ignores", "refuses"] = "yes"
    dimensions: bool = True
    """Otherwise it ignores them."""
    backwards: bool = False
    """Embeddings come in the wrong order, with their true index."""
    missing: int = 0
    """So many answers fewer than asked for."""
    sounds: tuple[str, ...] = ("mp3", "opus", "aac", "flac", "wav", "pcm")
    always: str | None = None
    """The sound that it gives whatever it is asked for."""
    transcripts: tuple[str, ...] = ("json", "text", "srt", "vtt", "verbose_json")
    text_as_json: bool = False
    stream: Literal["openai", "segments", "no", "refuses"] = "openai"
    pictures: Literal["b64_json", "url"] = "b64_json"
    picture: bytes = field(default_factory=png)
    picture_url: str = "/files/1.png?a=b"
    refuses: tuple[str, ...] = ()
    """Fields that it does not know."""
    rerank: Literal["/v1/rerank", "/rerank", "/v2/rerank", "tei", "none"] = "/v1/rerank"
    cut: bool = False
    """The connection breaks within the answer."""
    until_close: bool = False
    voices: Any = None
    relayed: dict[str, Any] = field(default_factory=dict)
    """Answers by path, given as they are."""
    info: Any = None
    metadata: Any = None
    """What it says as a service."""


@dataclass
class Form:
    """A form that arrived."""

    fields: list[tuple[str, str]]
    files: list[tuple[str, str, bytes]]

    def field(self, name: str) -> str | None:
        return next((value for key, value in self.fields if key == name), None)


class MediaDouble(OpenAIDouble):
    """As OpenAIDouble; `double.media` is how it is. A request with `user: slow` takes `SLOW_S`."""

    def __init__(self) -> None:
        super().__init__()
        self.behave(models=MODELS)
        self.media = Media()

    @property
    def form(self) -> Form:
        """The form that came last."""
        return form_of(self.last)

    async def _get(self, path: str, writer: asyncio.StreamWriter) -> bool:
        if path == "/v1/audio/voices" and self.media.voices is not None:
            return await self._answer(writer, 200, "application/json", _once(json.dumps(self.media.voices).encode()))
        if path == "/v1/metadata" and self.media.metadata is not None:
            return await self._answer(writer, 200, "application/json", _once(json.dumps(self.media.metadata).encode()))
        if path == "/info" and self.media.info is not None:
            return await self._answer(writer, 200, "application/json", _once(json.dumps(self.media.info).encode()))
        if path == self.media.picture_url:
            return await self._answer(writer, 200, "image/png", _once(self.media.picture))
        return await super()._get(path, writer)

    async def _post(self, seen: ReceivedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if self.behavior.status != 200 or seen.path.endswith("completions"):
            return await super()._post(seen, reader, writer)
        return await self._work(reader, self._media(seen, writer))

    async def _media(self, seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        try:
            is_form = seen.headers["content-type"].startswith("multipart/")
            body: dict[str, Any] = dict(form_of(seen).fields) if is_form else seen.json
            slow = body.get("user") == "slow"
            for name in self.media.refuses:
                if name in body:
                    raise Refused(f"Unknown parameter: '{name}'", name)
            kind, pieces = self._make(seen, body)
        except Refused as error:
            told = {"message": error.args[0], "type": "invalid_request_error", "param": error.args[1], "code": None}
            return await self._answer(
                writer,
                error.args[2] if len(error.args) > 2 else 400,
                "application/json",
                _once(json.dumps({"error": told}).encode()),
            )
        if slow and not kind.startswith("audio/"):
            await asyncio.sleep(SLOW_S)
        return await self._answer(writer, 200, kind, _paced(pieces, SLOW_S / len(pieces) if slow else 0.0))

    async def _answer(self, writer: asyncio.StreamWriter, status: int, kind: str, pieces: AsyncIterator[bytes]) -> bool:
        close = self.media.until_close
        framing = "connection: close" if close else "transfer-encoding: chunked"
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\n{framing}\r\n\r\n".encode())
        async for piece in pieces:
            if self.media.cut and status == 200:
                writer.write(
                    piece[: len(piece) // 2] if close else b"%x\r\n%b" % (len(piece), piece[: len(piece) // 2])
                )
                await writer.drain()
                writer.close()
                return False
            writer.write(piece if close else b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
        if not close:
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        return not close

    def _make(self, seen: ReceivedRequest, body: dict[str, Any]) -> tuple[str, list[bytes]]:
        path = seen.path
        if path == "/v1/embeddings":
            return _json(self._embeddings(body))
        if path.startswith("/v1/images/"):
            return self._images(body, edit=path.endswith("edits"))
        if path == "/v1/audio/speech":
            return self._speech(body)
        if path.startswith("/v1/audio/"):
            return self._transcription(seen, body)
        if path == ("/rerank" if self.media.rerank == "tei" else self.media.rerank):
            return _json(self._rerank(body))
        if path in self.media.relayed:
            return _json(self.media.relayed[path])
        raise Refused("File Not Found", None, 404)

    def _embeddings(self, body: dict[str, Any]) -> Any:
        value = body.get("input")
        if not value:
            raise Refused("input must not be empty", "input")
        count = len(value) if isinstance(value, list) and not isinstance(value[0], int) else 1
        length = body.get("dimensions", LENGTH) if self.media.dimensions else LENGTH
        packed = body.get("encoding_format") == "base64"
        if packed and self.media.base64 == "refuses":
            raise Refused("encoding_format: base64 is not supported", "encoding_format")
        packed = packed and self.media.base64 == "yes"
        data = [
            {"object": "embedding", "embedding": vector(at, length, packed=packed), "index": at}
            for at in range(count - self.media.missing)
        ]
        if self.media.backwards:
            data.reverse()
        usage = {"prompt_tokens": 3 * count, "total_tokens": 3 * count}
        return {"object": "list", "data": data, "model": "its own name", "usage": usage}

    def _rerank(self, body: dict[str, Any]) -> Any:
        tei = self.media.rerank == "tei"
        documents = body.get("texts" if tei else "documents")
        if not documents or not all(isinstance(one, str) for one in documents):
            raise Refused("missing field `texts`" if tei else "documents must be texts", None, 422)
        query = body["query"]
        ranked = sorted(((document.count(query) / 4, at) for at, document in enumerate(documents)), reverse=True)
        if tei:
            return [{"index": at, "score": score} for score, at in ranked]
        results = [{"index": at, "relevance_score": score} for score, at in ranked]
        return {"results": results[: body.get("top_n")], "usage": {"total_tokens": 11}}

    def _images(self, body: dict[str, Any], edit: bool) -> tuple[str, list[bytes]]:
        media = self.media
        if body.get("prompt") == "forbidden":
            raise Refused("that is not allowed", "prompt")
        coded = base64.b64encode(media.picture).decode()
        if str(body.get("stream")).lower() == "true" and media.stream != "no":
            return "text/event-stream", list(_picture_events(coded, "image_edit" if edit else "image_generation", body))
        item = {"b64_json": coded} if media.pictures == "b64_json" else {"url": media.picture_url}
        count = int(body.get("n") or 1) - media.missing
        return _json({"created": 7, "data": [item | {"revised_prompt": f"p{at}"} for at in range(count)]})

    def _speech(self, body: dict[str, Any]) -> tuple[str, list[bytes]]:
        wanted = body.get("response_format", "mp3")
        if wanted not in self.media.sounds:
            raise Refused(f"response_format '{wanted}' is not supported", "response_format")
        if body.get("voice") == "nobody":
            raise Refused("there is no voice 'nobody'", "voice")
        codec = wanted if self.media.always is None else self.media.always
        data = sound_of(codec) if codec else b""
        return f"audio/{codec}", [data[at : at + 4000] for at in range(0, len(data), 4000)]

    def _transcription(self, seen: ReceivedRequest, body: dict[str, Any]) -> tuple[str, list[bytes]]:
        wanted = body.get("response_format", "json")
        if wanted not in self.media.transcripts:
            raise Refused(f"response_format {wanted} is not compatible with this model", "response_format")
        if form_of(seen).files[0][2] == b"noise":
            raise Refused("the file is no sound", "file")
        text = "".join(str(segment["text"]) for segment in SEGMENTS).strip()
        if body.get("stream") == "true":
            if self.media.stream == "refuses":
                raise Refused("stream is not supported", "stream")
            if self.media.stream != "no":
                return "text/event-stream", list(_transcript_events(text, self.media.stream))
        if wanted == "json":
            return _json({"text": text, "logprobs": [1]})
        if wanted == "verbose_json":
            return _json({"task": "transcribe", "language": "en", "duration": 3.0, "text": text, "segments": SEGMENTS})
        if wanted == "text":
            return _json(text) if self.media.text_as_json else ("text/plain", [f"{text}\n".encode()])
        clock = "00:00:00,000 --> 00:00:01,500" if wanted == "srt" else "00:00.000 --> 00:01.500"
        lead = "1\n" if wanted == "srt" else "WEBVTT\n\n"
        return "text/plain", [f"{lead}{clock}\nHello there.\n\n".encode()]


class Refused(Exception):
    """Message, param, and perhaps the status."""


def vector(at: int, length: int, *, packed: bool) -> Any:
    numbers = [at + number / 4 for number in range(length)]
    return base64.b64encode(struct.pack(f"<{length}f", *numbers)).decode() if packed else numbers


def sound_of(codec: str) -> bytes:
    """Real where it is simple, else something with the right beginning."""
    if codec == "wav":
        return wav()
    beginnings = {"mp3": b"ID3\4", "opus": b"OggS", "flac": b"fLaC", "aac": b"\xff\xf1", "bare mp3": b"\xff\xfb"}
    return beginnings[codec] + bytes(20_000) if codec in beginnings else wav()[44:]


def form_of(seen: ReceivedRequest) -> Form:
    fields: list[tuple[str, str]] = []
    files: list[tuple[str, str, bytes]] = []

    def on_file(file: Any) -> None:
        file.file_object.seek(0)
        files.append((file.field_name.decode(), file.file_name.decode(), file.file_object.read()))

    headers: Any = {"Content-Type": seen.headers["content-type"], "Content-Length": str(len(seen.body)).encode()}
    parse_form(
        headers,
        io.BytesIO(seen.body),
        lambda one: fields.append(((one.field_name or b"").decode(), (one.value or b"").decode())),
        on_file,
    )
    return Form(fields, files)


def _json(value: Any) -> tuple[str, list[bytes]]:
    data = json.dumps(value).encode()
    return "application/json", [data[at : at + 100_000] for at in range(0, len(data), 100_000)]


def _picture_events(coded: str, kind: str, body: dict[str, Any]) -> list[bytes]:
    partial = int(body.get("partial_images") or 0)
    events = [{"type": f"{kind}.partial_image", "b64_json": coded, "partial_image_index": at} for at in range(partial)]
    events.append({"type": f"{kind}.completed", "b64_json": coded, "usage": {}})
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]


def _transcript_events(text: str, manner: str) -> list[bytes]:
    if manner == "segments":
        return [f"data: {json.dumps({'text': str(one['text']).strip()})}\n\n".encode() for one in SEGMENTS]
    events = [{"type": "transcript.text.delta", "delta": one["text"]} for one in SEGMENTS]
    events.append({"type": "transcript.text.done", "text": text})
    return [f"data: {json.dumps(event)}\n\n".encode() for event in events] + [b"data: [DONE]\n\n"]


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _paced(pieces: list[bytes], wait: float) -> AsyncIterator[bytes]:
    for piece in pieces:
        await asyncio.sleep(wait)
        yield piece
