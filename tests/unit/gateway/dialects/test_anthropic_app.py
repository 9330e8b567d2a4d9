"""What Anthropic's clients get, whatever Nexus sends: keys, headers, errors, answers cut anywhere."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any

import orjson
import pytest

from gateway.dialects.anthropic.answers import AnswerTranslator, MessageTranslator
from gateway.dialects.anthropic.asgi_app import is_anthropic, with_bearer
from gateway.dialects.anthropic.from_chat import AnswerFacts
from gateway.dialects.anthropic.rate_headers import anthropic_rate_headers
from gateway.http.asgi import RATE_HEADERS, REQUEST_ID, Reply
from gateway.http.stream_writer import StreamWriter
from gateway.sse_frames import DONE, comment_frame
from schemas.endpoints import SSE
from schemas.errors import (
    AuthenticationFailed,
    BackendFailed,
    DeadlineExceeded,
    ErrorInfo,
    InvalidRequest,
    ModelNotFound,
    PermissionDenied,
    QueueFull,
    RateLimited,
    RequestTooLarge,
    Unavailable,
)

CHUNKS: Any = [
    {"model": "m", "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}]} for word in ("a", "é")
]
LAST: Any = {"model": "m", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


class Caller:
    """Takes what is sent to one caller of `/v1/messages`."""

    def __init__(self, *, translates: bool = True, scope: dict[str, Any] | None = None) -> None:
        self.messages: list[MutableMapping[str, Any]] = []
        scope = {REQUEST_ID: "req_1", **(scope or {})}
        whole = MessageTranslator(scope, self._take, AnswerFacts)
        self.reply = Reply((whole if translates else AnswerTranslator(scope, self._take)).send, "req_1")
        self.reply.headers.append((b"x-nexus-job-id", b"job_7"))

    async def _take(self, message: MutableMapping[str, Any]) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])

    @property
    def events(self) -> list[dict[str, Any]]:
        found = []
        for frame in self.body.decode().split("\n\n")[:-1]:
            if not frame.startswith(":"):
                name, data = frame.split("\n")
                found.append(json.loads(data.removeprefix("data: ")))
                assert name == "event: " + found[-1]["type"]
        return found


def frame(chunk: Any) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(chunk)


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_a_stream_cut_anywhere(size: int) -> None:
    """Events are translated when they are complete, however their bytes arrive."""
    caller = Caller()
    data = b"".join(map(frame, [*CHUNKS, LAST]))
    writer = StreamWriter(caller.reply, SSE)
    for at in range(0, len(data), size):
        await writer.write(data[at : at + size])
    await writer.end(DONE)
    assert caller.headers["request-id"] == "req_1"
    assert caller.events[0]["message"]["id"] == "msg_7"
    assert "".join(event["delta"].get("text", "") for event in caller.events if "delta" in event) == "aé"
    assert caller.events[-1] == {"type": "message_stop"}
    assert caller.messages[-1]["more_body"] is False


async def test_comments_become_pings() -> None:
    """A caller that waits in the queue gets the position as a comment, and a ping, which clients know."""
    caller = Caller()
    await StreamWriter(caller.reply, SSE).comment(comment_frame(3))
    assert caller.body.startswith(b": queued position=3\n\nevent: ping\n")
    assert caller.events == [{"type": "ping"}]


async def test_a_stream_that_fails() -> None:
    """An error after the first event is an `error` event, and no `message_stop` follows it."""
    caller = Caller()
    writer = StreamWriter(caller.reply, SSE)
    await writer.write(frame(CHUNKS[0]))
    await writer.abort(BackendFailed("The server broke off.").info)
    assert caller.events[-1]["error"]["message"] == "The server broke off."
    assert "message_stop" not in [event["type"] for event in caller.events]


async def test_an_event_that_is_none() -> None:
    """What is not JSON ends the stream; it is never passed on."""
    caller = Caller()
    with pytest.raises(BackendFailed):
        await StreamWriter(caller.reply, SSE).write(b"data: {\n\n")


async def test_a_whole_answer() -> None:
    """An answer in pieces is translated as one, and its length is the new one."""
    caller = Caller()
    data = orjson.dumps({"model": "m", "choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]})
    head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(data))]
    await caller.reply.send_head(200, head)
    await caller.reply.send_chunk(data[:9])
    await caller.reply.send_end(data[9:])
    assert caller.headers["content-length"] == str(len(caller.body))
    assert json.loads(caller.body).items() >= {"id": "msg_7", "content": [{"type": "text", "text": "hi"}]}.items()


async def test_an_answer_that_is_no_object() -> None:
    caller = Caller()
    await caller.reply.send_response(200, "application/json", b"[]")
    assert (caller.status, json.loads(caller.body)["error"]["type"]) == (502, "api_error")


@pytest.mark.parametrize(
    ("info", "status", "kind"),
    [
        (InvalidRequest("no", param="model").info, 400, "invalid_request_error"),
        (AuthenticationFailed().info, 401, "authentication_error"),
        (PermissionDenied().info, 403, "permission_error"),
        (ModelNotFound().info, 404, "not_found_error"),
        (RequestTooLarge().info, 413, "request_too_large"),
        (RateLimited().info, 429, "rate_limit_error"),
        (QueueFull().info, 529, "overloaded_error"),
        (BackendFailed().info, 502, "api_error"),
        (Unavailable().info, 503, "api_error"),
        (DeadlineExceeded().info, 504, "timeout_error"),
    ],
)
async def test_errors(info: ErrorInfo, status: int, kind: str) -> None:
    """Every error has Anthropic's form, with Nexus's code and field as its details, and keeps its headers."""
    caller = Caller(translates=False)
    await caller.reply.send_error(info)
    body = json.loads(caller.body)
    assert (caller.status, body["type"], body["error"]["type"]) == (status, "error", kind)
    assert (body["error"]["message"], body["request_id"]) == (info.message, "req_1")
    assert body["error"].get("details", {}).get("error_code") == info.code
    assert info.headers().items() <= caller.headers.items()
    assert caller.headers["content-length"] == str(len(caller.body))


async def test_a_prompt_that_is_too_long() -> None:
    """Agents shorten the conversation when the message begins as Anthropic's."""
    caller = Caller()
    await caller.reply.send_error(InvalidRequest("The context is 512.", code="context_length_exceeded").info)
    assert json.loads(caller.body)["error"]["message"] == "prompt is too long: The context is 512."


async def test_other_answers_pass() -> None:
    """A job's 202, and what other routes answer, is not changed."""
    for translates, status in ((True, 202), (False, 200)):
        caller = Caller(translates=translates)
        await caller.reply.send_response(status, "application/json", b'{"id":"x"}')
        assert (caller.status, caller.body) == (status, b'{"id":"x"}')


async def test_rate_limits() -> None:
    """Limits are told under Anthropic's names beside Nexus's, with the time in place of the seconds."""
    limits = [(b"x-ratelimit-limit-requests", b"5"), (b"x-ratelimit-reset-tokens", b"90s")]
    caller = Caller(scope={RATE_HEADERS: lambda: limits})
    await caller.reply.send_error(RateLimited().info)
    assert caller.headers["x-ratelimit-limit-requests"] == caller.headers["anthropic-ratelimit-requests-limit"] == "5"
    named = dict(anthropic_rate_headers(limits, 1_767_225_600.0))
    assert named[b"anthropic-ratelimit-tokens-reset"] == b"2026-01-01T00:01:30Z"


def test_whose_requests_are_translated() -> None:
    """Requests to Anthropic's paths, and those with its header; nothing else."""

    def asked(path: str, *names: bytes) -> bool:
        return is_anthropic({"path": path, "headers": [(name, b"x") for name in names]})

    assert asked("/v1/messages")
    assert asked("/v1/messages/count_tokens")
    assert asked("/v1/models", b"anthropic-version")
    assert not asked("/v1/models", b"x-api-key")
    assert not asked("/v1/messages2")


def test_keys() -> None:
    """`x-api-key` is the key, unless there is a bearer."""
    assert with_bearer([(b"x-api-key", b"k")])[-1] == (b"authorization", b"Bearer k")
    both = [(b"x-api-key", b"k"), (b"authorization", b"Bearer b")]
    assert with_bearer(both) == both
    assert with_bearer([]) == []
