"""Tiny requests of the worker's own, which show whether an OpenAI-style server lacks a feature.

Each is sent with the feature and, where the server refuses that, without it: one word of text and at most one token, one embedding
of one letter, two letters of speech, half a second of a quiet tone. Nothing of a caller is in them but, for speech, the name
of a voice where the server lists none. Pictures are never made for a probe.
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
USAGE = re.compile(rb'"usage"\s*:\s*\{')
REFUSED = frozenset({400, 415, 422})
FAILED = frozenset({500, 501})
"""Some servers answer so for what they do not support; only an answer that names the feature counts."""
TOOL = {
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
TONE_S, TONE_RATE = 0.5, 16_000


async def lacks_text_feature(api: OpenAIClient, path: str, model: str, feature: str) -> bool | None:
    """Ask for one token, with and without `STREAM`, `STREAM_OPTIONS` or `TOOL_STREAM`."""
    plain: JSON = {"model": model, "max_tokens": 1}
    plain |= {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT_PATH else {"prompt": "Hi"}
    if feature == TOOL_STREAM:
        plain["tools"] = [TOOL]
    streamed = {"stream": True}
    wanted = streamed | {"stream_options": {"include_usage": True}} if feature == STREAM_OPTIONS else streamed
    without = streamed if feature == STREAM_OPTIONS else {"stream": False}
    return await _differs(_text_sent(api, path, plain | wanted), _text_sent(api, path, plain | without))


async def lacks_stream_usage(api: OpenAIClient, path: str, model: str) -> bool | None:
    """Ask for one token, streamed and in one piece: whether only the second answer says how many there were."""
    plain: JSON = {"model": model, "max_tokens": 1}
    plain |= {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT_PATH else {"prompt": "Hi"}
    streamed = await _counts(api, path, plain | {"stream": True, "stream_options": {"include_usage": True}})
    if streamed is None:
        streamed = await _counts(api, path, plain | {"stream": True})
    if streamed is not False:
        return None if streamed is None else False
    return await _counts(api, path, plain | {"stream": False})


async def _counts(api: OpenAIClient, path: str, fields: JSON) -> bool | None:
    """Whether the answer holds usage; None where there is no answer. Raises BackendError."""
    response = await api.send(api.base_path + path, fields)
    try:
        return USAGE.search(await response.read_all(ERROR_LIMIT)) is not None if response.status == 200 else None
    finally:
        response.close()


async def lacks_parameter(api: OpenAIClient, path: str, model: str, name: str) -> bool | None:
    """Ask for one token with and without a parameter of text; with `n`, see whether two choices come."""
    plain: JSON = {"model": model, "max_tokens": 1}
    plain |= {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT_PATH else {"prompt": "Hi"}
    if name in ("tool_choice", "parallel_tool_calls"):
        plain["tools"] = [TOOL]
    wanted = _ProbeRequest(api, path, plain | {name: PARAMETER_VALUES[name]}, name)
    if name == "n":
        choices = await wanted.choices()
        if choices is not None:
            return choices < 2
    return await _differs(wanted, _ProbeRequest(api, path, dict(plain)))


async def lacks_encoding_format(api: OpenAIClient, model: str) -> bool | None:
    """Embed one letter, with and without `encoding_format`."""
    plain = {"model": model, "input": "a"}
    return await _differs(
        _ProbeRequest(api, "/embeddings", plain | {"encoding_format": "base64"}, "encoding_format"),
        _ProbeRequest(api, "/embeddings", plain),
    )


async def lacks_sound(api: OpenAIClient, model: str, voice: str, codec: str, others: Iterable[str]) -> bool | None:
    """Speak two letters in the format `codec` and, where that is refused, in one of the others."""
    plain = {"model": model, "input": "Hi", "voice": voice}
    return await _differs(
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
    return await _differs(
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
    return await _differs(
        _ProbeRequest(api, path, plain | {"stream": True}, STREAM, sound=True),
        _ProbeRequest(api, path, plain, sound=True),
    )


async def reranks_like_tei(api: OpenAIClient, model: str) -> bool | None:
    """Return whether `/rerank` refuses Jina's fields and takes those of text-embeddings-inference."""
    usual = {"model": model, "query": "a", "documents": ["a"], "top_n": 1}
    return await _differs(
        _ProbeRequest(api, "/rerank", usual, root=""),
        _ProbeRequest(api, "/rerank", {"query": "a", "texts": ["a"], "truncate": False}, root=""),
    )


@cache
def tone() -> bytes:
    """Return half a second of a quiet tone, as a WAV file."""
    count = int(TONE_S * TONE_RATE)
    samples = struct.pack(f"<{count}h", *(int(800 * math.sin(0.17 * at)) for at in range(count)))
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(samples), b"WAVE", b"fmt ", 16, 1, 1, TONE_RATE,
                       2 * TONE_RATE, 2, 16, b"data", len(samples))  # fmt: skip
    return head + samples


class _ProbeRequest:
    """One request of a probe."""

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
        """Whether the server takes it; None where its answer says neither. Raises BackendError."""
        status, error = await self._send()
        if status in REFUSED and b"max_completion_tokens" in error and "max_tokens" in self._fields:
            self._fields["max_completion_tokens"] = self._fields.pop("max_tokens")  # OpenAI's models that think
            status, error = await self._send()
        if status == 200:
            return True
        named = status in FAILED and self._feature and self._feature.split()[0].encode() in error.lower()
        return False if status in REFUSED or named else None

    async def choices(self) -> int | None:
        """How many choices the server's answer in one piece holds; None where there is no such answer. Raises BackendError."""
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
                form_fields(self._fields), [FilePart.from_bytes("file", "tone.wav", "audio/wav", tone())]
            )
            response = await self._api.send(self._path, form)
        else:
            response = await self._api.send(self._path, self._fields)
        try:
            # The head of an answer tells enough; closing a stream ends the server's work.
            return response.status, b"" if response.status == 200 else await response.read_all(ERROR_LIMIT)
        finally:
            response.close()


def _text_sent(api: OpenAIClient, path: str, fields: JSON) -> _ProbeRequest:
    return _ProbeRequest(api, path, fields, STREAM)


async def _differs(wanted: _ProbeRequest, *without: _ProbeRequest) -> bool | None:
    """Whether the server refuses `wanted` and accepts one of the others."""
    accepted = await wanted.accepted()
    if accepted is not False:
        return None if accepted is None else False
    for other in without:
        try:
            if await other.accepted():
                return True
        except BackendError:
            return None
    return None
