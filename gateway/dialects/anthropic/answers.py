"""Translates an answer of Nexus into one of Anthropic while it is sent: whole answers, streams, and errors of any part of Nexus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from contextlib import suppress
from typing import Any

import orjson

from gateway import clock
from gateway.chat_chunks import read_chunks
from gateway.dialects.anthropic.errors import anthropic_error, anthropic_status
from gateway.dialects.anthropic.from_chat import PING, AnswerFacts, MessageStream, message_of
from gateway.dialects.anthropic.rate_headers import anthropic_rate_headers
from gateway.http.asgi import NO_STORE, RATE_HEADERS, Headers, Scope, Send, request_id_of
from gateway.sse_frames import DONE
from schemas.errors import BackendFailed

JSON = dict[str, Any]
Message = MutableMapping[str, Any]

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""The largest answer in one piece. An adapter reads no larger one."""
MAX_FRAME_BYTES = 16 * 1024 * 1024
TOO_LARGE = f"The answer has more than {MAX_ANSWER_BYTES} bytes. Ask for a stream."
UNREADABLE = "The inference server's answer is not a JSON object. Check the worker's server."
JOB_ID = b"x-nexus-job-id"
TOKEN_COUNT = b"x-nexus-token-count"
"""Header that says whether a count is `exact` or an `estimate`."""
JSON_TYPE = (b"content-type", b"application/json")
UNSUPPORTED_ENDPOINT = "unsupported_endpoint"
"""The code of a server's refusal of an endpoint that it does not have."""
FRAME_END = b"\n\n"


def encode_events(events: Iterable[JSON]) -> bytes:
    """Encode events as server-sent events."""
    return b"".join(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event)) for event in events)


def message_id(job: str) -> str:
    """Return the id of the message that a job makes."""
    return "msg_" + job.removeprefix("job_")


class StreamTranslation:
    """Translates the bytes of a chat stream, however they are cut."""

    def __init__(self, stream: MessageStream, request_id: str) -> None:
        self._stream = stream
        self._request_id = request_id
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """Return the events of the frames that are complete. Raises BackendFailed."""
        whole, end, rest = (self._rest + data).rpartition(FRAME_END)
        self._rest = rest
        if len(rest) > MAX_FRAME_BYTES:
            raise BackendFailed(f"An event of this answer has more than {MAX_FRAME_BYTES} bytes.")
        return b"".join(map(self._frame, whole.split(FRAME_END))) if end else b""

    def _frame(self, frame: bytes) -> bytes:
        if frame.startswith(b":"):  # the position in the queue, or progress
            return frame + FRAME_END + encode_events([PING])
        if frame + FRAME_END == DONE:
            return encode_events(self._stream.end())
        return b"".join(self._chunk(chunk) for chunk in read_chunks(frame))

    def _chunk(self, chunk: JSON) -> bytes:
        if "error" in chunk:
            return encode_events([anthropic_error(500, chunk, self._request_id)])
        return encode_events(self._stream.add(chunk))


class AnswerTranslator:
    """Stands between Nexus and the caller of one request; `send` takes Nexus's messages. Only errors are translated."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._request_id = request_id_of(scope)
        self._start: Message = {}
        self._job = ""
        self._buffer: list[bytes] | None = None
        self._buffered = 0
        self._stream: StreamTranslation | None = None

    @property
    def began(self) -> bool:
        """Whether Nexus has begun to answer."""
        return bool(self._start)

    async def send(self, message: Message) -> None:
        """Send a message of Nexus, translated. Raises BackendFailed for an event that cannot be."""
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif self._buffer is not None:
            await self._collect(message)
        elif self._stream is not None:
            data = self._stream.feed(message.get("body", b""))
            if data or not message.get("more_body"):
                await self._send({**message, "body": data})
        else:
            await self._send(message)

    def translates(self, status: int) -> bool:
        """Return whether answers of this status are translated."""
        return status >= 400

    def reshape(self, status: int, value: Any) -> tuple[int, JSON, Headers]:
        """Return the status, the body and more headers for a complete JSON answer; `value` is None if that was none, or too large."""
        if status < 400:
            problem = UNREADABLE if self._buffered <= MAX_ANSWER_BYTES else TOO_LARGE
            status, value = BackendFailed.status, BackendFailed(problem).info.body()
        value = value if isinstance(value, dict) else {}
        return anthropic_status(status, value), anthropic_error(status, value, self._request_id), []

    def open_stream(self, _job: str) -> StreamTranslation | None:
        """Return the translation of a stream of events; None: it passes as it is."""
        return None

    async def _begin(self, message: Message) -> None:
        status = message["status"]
        headers: Headers = list(message.get("headers", ()))
        self._start = message = {**message, "headers": [*headers, *self._more_headers(headers)]}
        kind = next((value for name, value in headers if name == b"content-type"), b"")
        self._job = next((value.decode() for name, value in headers if name == JOB_ID), "")
        if self.translates(status):
            if kind.startswith(b"application/json"):
                self._buffer = []
                return
            if kind.startswith(b"text/event-stream"):
                self._stream = self.open_stream(self._job)
        await self._send(message)

    def _more_headers(self, headers: Headers) -> Headers:
        limits = self._scope.get(RATE_HEADERS)
        rates: Headers = limits() if limits is not None else []
        named = anthropic_rate_headers([*headers, *rates], clock.now())
        return [(b"request-id", self._request_id.encode()), *rates, *named]

    async def _collect(self, message: Message) -> None:
        """Collect a JSON answer, and send it when it is complete."""
        assert self._buffer is not None
        body = message.get("body", b"")
        self._buffered += len(body)
        if self._buffered > MAX_ANSWER_BYTES:
            self._buffer.clear()
        else:
            self._buffer.append(body)
        if message.get("more_body"):
            return
        value: Any = None
        with suppress(orjson.JSONDecodeError):
            value = orjson.loads(b"".join(self._buffer))
        status, answer, more = self.reshape(self._start["status"], value)
        data = orjson.dumps(answer)
        headers = [header for header in self._start["headers"] if header[0] != b"content-length"]
        headers += [(b"content-length", b"%d" % len(data)), *more]
        await self._send({**self._start, "status": status, "headers": headers})
        await self._send({**message, "body": data})


class MessageTranslator(AnswerTranslator):
    """Makes messages of chat completions and streams."""

    def __init__(self, scope: Scope, send: Send, facts: Callable[[], AnswerFacts]) -> None:
        """`facts`: of the request, once it was read."""
        super().__init__(scope, send)
        self._facts = facts

    def translates(self, status: int) -> bool:
        """Translate what is no job: a 202 passes as it is."""
        return status == 200 or super().translates(status)

    def reshape(self, status: int, value: Any) -> tuple[int, JSON, Headers]:
        """Return the message for a completion."""
        if status == 200 and isinstance(value, dict):
            return status, message_of(value, message_id(self._job), self._facts()), []
        return super().reshape(status, value)

    def open_stream(self, job: str) -> StreamTranslation:
        """Return the translation of a chat stream."""
        return StreamTranslation(MessageStream(message_id(job), self._facts()), self._request_id)


class TokenCountTranslator(AnswerTranslator):
    """Makes token counts, with an estimate in place of a server's count where there is none."""

    def __init__(self, scope: Scope, send: Send, estimate: Callable[[], int]) -> None:
        """`estimate`: of the request's tokens, once it was read."""
        super().__init__(scope, send)
        self._estimate = estimate

    def translates(self, status: int) -> bool:
        """Translate every answer."""
        return status == 200 or super().translates(status)

    def reshape(self, status: int, value: Any) -> tuple[int, JSON, Headers]:
        """Return the count, and how it was made."""
        if status == 200 and isinstance(value, dict):
            return status, {"input_tokens": value.get("input_tokens")}, [(TOKEN_COUNT, b"exact")]
        error = value.get("error") if isinstance(value, dict) else None
        if isinstance(error, dict) and error.get("code") == UNSUPPORTED_ENDPOINT:
            return 200, {"input_tokens": self._estimate()}, [(TOKEN_COUNT, b"estimate")]
        return super().reshape(status, value)

    async def send_estimate(self) -> None:
        """Answer without the server's count."""
        error = {"error": {"code": UNSUPPORTED_ENDPOINT}}
        await self.send({"type": "http.response.start", "status": 400, "headers": [JSON_TYPE, NO_STORE]})
        await self.send({"type": "http.response.body", "body": orjson.dumps(error), "more_body": False})
