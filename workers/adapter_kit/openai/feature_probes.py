"""Probes: tiny requests of the worker's own that show whether an OpenAI-style server lacks a feature.

A probe is sent with the feature and, where the server refuses it, without: one word of text and at most one token, one embedding
of one letter, two letters of speech, half a second of a quiet tone. A probe holds no data of a caller, except for speech the name
of a voice where the server lists none. No probe makes images.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable
from functools import cache

import orjson

from workers.adapter_kit.multipart import FilePart, encode_multipart
from workers.adapter_kit.openai.client import ERROR_LIMIT, JSON, OpenAIClient, form_fields
from workers.backends.base import BackendError

STREAM, STREAM_OPTIONS, TOOL_STREAM = "stream", "stream_options", "stream with tools"
STREAM_USAGE = "usage in streams"
USAGE_FIELD = re.compile(rb'"usage"\s*:\s*\{')
REFUSED_STATUSES = frozenset({400, 415, 422})
FAILED_STATUSES = frozenset({500, 501})
"""Statuses of some servers for an unsupported feature; they count only where the answer names the feature."""
PROBE_TOOL = {
    "type": "function",
    "function": {"name": "noop", "description": "Do nothing.", "parameters": {"type": "object", "properties": {}}},
}
CHAT_PATH = "/chat/completions"
PARAMETER_VALUES: JSON = {
    "n": 2,
    "best_of": 2,
    "logit_bias": {"1": 0},
    "parallel_tool_calls": False,
    "tool_choice": {"type": "function", "function": {"name": "noop"}},
    "verbosity": "medium",
    "store": False,
}
TONE_DURATION_S, TONE_RATE_HZ = 0.5, 16_000


async def lacks_text_feature(api: OpenAIClient, path: str, model: str, feature: str) -> bool | None:
    """Request one token, with and without `STREAM`, `STREAM_OPTIONS` or `TOOL_STREAM`."""
    plain: JSON = {"model": model, "max_tokens": 1}
    plain |= {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT_PATH else {"prompt": "Hi"}
    if feature == TOOL_STREAM:
        plain["tools"] = [PROBE_TOOL]
    streamed = {"stream": True}
    with_feature = streamed | {"stream_options": {"include_usage": True}} if feature == STREAM_OPTIONS else streamed
    without = streamed if feature == STREAM_OPTIONS else {"stream": False}
    return await _refuses_only(
        _text_request(api, path, plain | with_feature), _text_request(api, path, plain | without)
    )


async def lacks_stream_usage(api: OpenAIClient, path: str, model: str) -> bool | None:
    """Request one token, streamed and in one piece; return whether only the second answer has usage."""
    plain: JSON = {"model": model, "max_tokens": 1}
    plain |= {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT_PATH else {"prompt": "Hi"}
    streamed = await _has_usage(api, path, plain | {"stream": True, "stream_options": {"include_usage": True}})
    if streamed is None:
        streamed = await _has_usage(api, path, plain | {"stream": True})
    if streamed is not False:
        return None if streamed is None else False
    return await _has_usage(api, path, plain | {"stream": False})


async def _has_usage(api: OpenAIClient, path: str, fields: JSON) -> bool | None:
    """Return whether the answer has usage; None where the request failed. Raises BackendError."""
    response = await api.send(api.base_path + path, fields)
    try:
        return USAGE_FIELD.search(await response.read_all(ERROR_LIMIT)) is not None if response.status == 200 else None
    finally:
        response.close()


async def lacks_parameter(api: OpenAIClient, path: str, model: str, name: str) -> bool | None:
    """Request one token with and without a parameter of text; for `n`, check whether two choices come."""
    plain: JSON = {"model": model, "max_tokens": 1}
    plain |= {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT_PATH else {"prompt": "Hi"}
    if name in ("tool_choice", "parallel_tool_calls"):
        plain["tools"] = [PROBE_TOOL]
    with_feature = _ProbeRequest(api, path, plain | {name: PARAMETER_VALUES[name]}, name)
    if name == "n":
        choices = await with_feature.choices()
        if choices is not None:
            return choices < 2
    return await _refuses_only(with_feature, _ProbeRequest(api, path, dict(plain)))


async def lacks_encoding_format(api: OpenAIClient, model: str) -> bool | None:
    """Embed one letter, with and without `encoding_format`."""
    plain = {"model": model, "input": "a"}
    return await _refuses_only(
        _ProbeRequest(api, "/embeddings", plain | {"encoding_format": "base64"}, "encoding_format"),
        _ProbeRequest(api, "/embeddings", plain),
    )


async def lacks_sound(api: OpenAIClient, model: str, voice: str, codec: str, others: Iterable[str]) -> bool | None:
    """Speak two letters in the format `codec` and, where that is refused, in one of the others."""
    plain = {"model": model, "input": "Hi", "voice": voice}
    return await _refuses_only(
        _ProbeRequest(api, "/audio/speech", plain | {"response_format": codec}, codec),
        *(
            _ProbeRequest(api, "/audio/speech", plain | {"response_format": other})
            for other in others
            if other != codec
        ),
    )


async def lacks_transcript(
    api: OpenAIClient, path: str, fields: JSON, form: str, others: Iterable[str], *, root: str | None = None
) -> bool | None:
    """Transcribe a quiet tone in the format `form` and, where that is refused, in one of the others. `fields` name the model."""
    return await _refuses_only(
        _ProbeRequest(api, path, fields | {"response_format": form}, form, root=root, sound=True),
        *(
            _ProbeRequest(api, path, fields | {"response_format": other}, root=root, sound=True)
            for other in others
            if other != form
        ),
    )


async def lacks_transcript_stream(api: OpenAIClient, path: str, model: str) -> bool | None:
    """Transcribe a quiet tone, streamed and in one piece."""
    plain = {"model": model, "response_format": "json"}
    return await _refuses_only(
        _ProbeRequest(api, path, plain | {"stream": True}, STREAM, sound=True),
        _ProbeRequest(api, path, plain, sound=True),
    )


async def reranks_like_tei(api: OpenAIClient, model: str) -> bool | None:
    """Return whether `/rerank` refuses Jina's fields and takes those of text-embeddings-inference."""
    usual = {"model": model, "query": "a", "documents": ["a"], "top_n": 1}
    return await _refuses_only(
        _ProbeRequest(api, "/rerank", usual, root=""),
        _ProbeRequest(api, "/rerank", {"query": "a", "texts": ["a"], "truncate": False}, root=""),
    )


@cache
def make_tone() -> bytes:
    """Return half a second of a quiet tone, as a WAV file."""
    count = int(TONE_DURATION_S * TONE_RATE_HZ)
    samples = struct.pack(f"<{count}h", *(int(800 * math.sin(0.17 * at)) for at in range(count)))
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16, 1, 1, TONE_RATE_HZ,
                       2 * TONE_RATE_HZ, 2, 16, b"data", len(samples))  # fmt: skip
    return head + samples


class _ProbeRequest:
    """Sends one request of a probe."""

    def __init__(
        self,
        api: OpenAIClient,
        path: str,
        fields: JSON,
        feature: str = "",
        *,
        root: str | None = None,
        sound: bool = False,
    ) -> None:
        self._sound = sound
        self._api = api
        self._path = (api.base_path if root is None else root) + path
        self._fields = fields
        self._feature = feature

    async def accepted(self) -> bool | None:
        """Return whether the server accepts the request; None where its answer does not show that. Raises BackendError."""
        status, error = await self._send()
        if status in REFUSED_STATUSES and b"max_completion_tokens" in error and "max_tokens" in self._fields:
            self._fields["max_completion_tokens"] = self._fields.pop("max_tokens")  # OpenAI's reasoning models
            status, error = await self._send()
        if status == 200:
            return True
        named = status in FAILED_STATUSES and self._feature and self._feature.split()[0].encode() in error.lower()
        return False if status in REFUSED_STATUSES or named else None

    async def choices(self) -> int | None:
        """Return the number of choices in the server's answer; None where there is no such answer. Raises BackendError."""
        response = await self._api.send(self._path, self._fields)
        try:
            answer = orjson.loads(await response.read_all(ERROR_LIMIT)) if response.status == 200 else None
        except orjson.JSONDecodeError:
            return None
        finally:
            response.close()
        found = answer.get("choices") if isinstance(answer, dict) else None
        return len(found) if isinstance(found, list) and found else None

    async def _send(self) -> tuple[int, bytes]:
        if self._sound:
            form = encode_multipart(
                form_fields(self._fields), [FilePart.from_bytes("file", "tone.wav", "audio/wav", make_tone())]
            )
            response = await self._api.send(self._path, form)
        else:
            response = await self._api.send(self._path, self._fields)
        try:
            # The status is enough; closing a stream ends the server's work.
            return response.status, b"" if response.status == 200 else await response.read_all(ERROR_LIMIT)
        finally:
            response.close()


def _text_request(api: OpenAIClient, path: str, fields: JSON) -> _ProbeRequest:
    return _ProbeRequest(api, path, fields, STREAM)


async def _refuses_only(with_feature: _ProbeRequest, *without: _ProbeRequest) -> bool | None:
    """Return whether the server refuses the request with the feature and accepts one without it."""
    accepted = await with_feature.accepted()
    if accepted is not False:
        return None if accepted is None else False
    for other in without:
        try:
            if await other.accepted():
                return True
        except BackendError:
            return None
    return None
