"""Speech-to-text servers: the OpenAI-like ones (speaches, faster-whisper servers) and whisper.cpp's.

The server is asked for verbose_json whatever the caller wants, and the answer is converted: servers differ in which
formats they speak. One that lacks verbose_json, as a probe of our own shows, is asked for the caller's own format instead.

Most of these servers work on when their caller hangs up. So a request is then read to its end, and its slot stays taken
until the server is done with it; cancelling twice gives it up.

Options:

- `api`: `openai` or `whispercpp` (`/inference`, any model name); without it the server is looked at.
- `api_path`: where OpenAI's API lies (default `/v1`).
- `stream=yes`: the server streams `transcript.text.*` events as it hears, and stops when its caller hangs up. The
  server that `nexus up` starts does; then callers' streams come as they are made, and progress is known.
- `stops=yes`: the server stops when its caller hangs up (whisper.cpp since 1.7.6 does).
- `model_field`: what the form's field for the model is called (default `model`).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson

from schemas.frames import Progress
from schemas.jobs import Capability
from schemas.presence import Limitation, ModelOffer
from workers.adapter_kit.audio.transcripts import (
    RecognitionRequest,
    SpeechTranscript,
    TranscriptFormat,
    delta_frame,
    done_frame,
    parse_transcript,
    parse_transcript_json,
    render_transcript,
    text_deltas,
)
from workers.adapter_kit.error_mapping import error_from_payload, error_from_response
from workers.adapter_kit.http_client import BackendResponse, HttpClient
from workers.adapter_kit.multipart import FilePart, encode_multipart
from workers.adapter_kit.openai.client import OpenAIClient
from workers.adapter_kit.openai.feature_probes import lacks_transcript
from workers.adapter_kit.sse import SseSplitter, is_json_content_type, payloads
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
    Discovery,
    Finish,
    ModelNotServed,
    Output,
    Task,
)

JSON = dict[str, Any]

APIS = frozenset({"openai", "whispercpp"})
YES = frozenset({"yes", "true", "1", "on"})
NO = frozenset({"no", "false", "0", "off"})
PATHS = {"transcribe": "/audio/transcriptions", "translate": "/audio/translations"}
MISSING = frozenset({404, 405, 501})
BODY_LIMIT = 32 * 1024 * 1024
RICH: TranscriptFormat = "verbose_json"
OTHERS: tuple[TranscriptFormat, ...] = ("json", "text")
WHISPER_CPP = "whisper"
"""What whisper.cpp's model is called when nobody says: its server does not."""
BAD_SOUND = re.compile(
    rb"invalid data found|failed to (?:read|decode|load|open|execute ffmpeg)|could not (?:read|decode|open)"
    rb"|(?:unsupported|unknown|invalid|unrecogni[sz]ed) (?:audio|file|format|media)|format not recogni[sz]ed"
    rb"|error (?:opening|decoding|reading)|no audio|not (?:a )?(?:valid )?audio|invaliddataerror",
    re.IGNORECASE,
)
"""Said in a 5xx by servers that could not decode the file."""
SOUND = (b"RIFF", b"RF64", b"ID3", b"OggS", b"fLaC", b"FORM", b"\x1a\x45\xdf\xa3", b".snd", b"caff", b"#!AMR", b"MAC ")
"""How files of sound begin, but for MPEG's."""
UNHEARD = ("include", "known_speaker_names", "known_speaker_references", "keywords", "languages")
"""Parameters of OpenAI's own models that change the answer, and that these servers do not have."""


@dataclass(slots=True)
class _Call:
    """One request to the server."""

    wanted: RecognitionRequest
    path: str
    fields: list[tuple[str, str]] = field(default_factory=list)
    asked: TranscriptFormat = RICH
    sent: bool = False
    """The whole form is with the server."""

    async def pieces(self, form: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        """The form; notes its end."""
        async for piece in form:
            yield piece
        self.sent = True


class WhisperBackend(Backend):
    """See the module's docstring."""

    name = "whisper"
    option_names = frozenset({"api", "api_path", "stream", "stops", "model_field"})
    default_slots = 1

    def __init__(self, config: BackendConfig) -> None:
        """Raises ValueError when the URL or an option makes no sense."""
        super().__init__(config)
        options = config.options
        if options.get("api", "openai") not in APIS:
            raise ValueError(f"the whisper adapter's api is one of {', '.join(sorted(APIS))}")
        self._api = options.get("api", "")
        url = config.url.rstrip("/")
        self._root = options.get("api_path", "/v1").rstrip("/")
        self._streams = _switch(options, "stream")
        self._stops = self._streams or _switch(options, "stops")
        self._model_field = options.get("model_field", "model")
        headers = {"authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        self._client = HttpClient(url.removesuffix(self._root), headers=headers)
        self._served: frozenset[str] | None = None
        """Names of the models; None before the first `discover`."""
        self._server = OpenAIClient(self._client, self._root, self._refusal)

    async def close(self) -> None:
        await self._server.limitations.close()
        await self._client.close()

    def limitations(self) -> tuple[Limitation, ...]:
        """The models that do not speak verbose_json, as probes have shown."""
        return self._server.limitations.confirmed_limitations()

    # What the server has

    async def discover(self) -> Discovery:
        """The models that the server lists for speech, or those of `config.models`.

        Raises BackendError when a configured model is not there, or when nothing says which models there are.
        """
        listed = None if self._api == "whispercpp" else await self._listed()
        if not self._api and listed is None and await self._is_whisper_cpp():
            self._api = "whispercpp"
        names = self._names(listed)
        self._served = frozenset(names)
        return Discovery(tuple(ModelOffer(name=name, capabilities=(Capability.TRANSCRIPTIONS,)) for name in names))

    async def health(self) -> None:
        """`GET /health` where there is one, else the list of models or the front page."""
        status, body = await self._get("/health")
        if status in MISSING:
            status, body = await self._get("/" if self._api == "whispercpp" else f"{self._root}/models")
        if status in (401, 403, 429) or status >= 500:
            raise BackendUnavailable(error_from_response(status, {}, body).info.message)

    async def _listed(self) -> tuple[str, ...] | None:
        """The models for speech in the server's list; None when it has no list."""
        status, body = await self._get(f"{self._root}/models")
        if status in MISSING:
            return None
        if status != 200:
            raise self._refusal(status, {}, body)
        try:
            return tuple(str(model["id"]) for model in orjson.loads(body)["data"] if _hears(model))
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise BackendError("the backend's list of models is none") from error

    async def _is_whisper_cpp(self) -> bool:
        status, body = await self._get("/")
        return status == 200 and b"whisper.cpp" in body.lower()

    def _names(self, listed: tuple[str, ...] | None) -> tuple[str, ...]:
        wanted = self.config.models
        if self._api == "whispercpp":
            return wanted or (WHISPER_CPP,)
        if listed is None:
            if not wanted:
                raise BackendError("the backend does not list its models; name them with --model")
            return wanted
        missing = [name for name in wanted if name not in listed]
        if missing:
            raise BackendError(f"the backend lacks {', '.join(missing)}; it has {', '.join(listed) or 'no models'}")
        return wanted or listed

    async def _get(self, path: str) -> tuple[int, bytes]:
        try:
            return await _whole(await self._client.request("GET", path))
        except BackendError as error:
            raise BackendUnavailable(str(error)) from error

    # Work

    async def run(self, task: Task) -> AsyncIterator[Output]:
        """Transcriptions and translations."""
        if self._served is None:
            await self.discover()
        if task.model not in (self._served or ()):
            raise ModelNotServed(f"the backend does not have the model {task.model!r}", param="model")
        call = self._call(task)
        if self._streams:
            async with contextlib.aclosing(self._as_heard(call)) as outputs:
                async for output in outputs:
                    yield output
            return
        for output in _outputs(call.wanted, await self._transcript(call)):
            yield output

    def _call(self, task: Task) -> _Call:
        wanted = RecognitionRequest.from_task(task)
        for name in UNHEARD:
            if wanted.extra.get(name):
                raise BackendRefused(f"this backend does not have {name}; leave it out", param=name)
        asked: TranscriptFormat = RICH
        if self._server.limitations.lacks(task.model, RICH):
            asked = wanted.response_format if wanted.response_format in ("srt", "vtt") else "json"
        fields = self._whisper_cpp(wanted) if self._api == "whispercpp" else self._openai(wanted)
        for name, value in wanted.extra.items():
            fields += _fields(name, value)
        path = "/inference" if self._api == "whispercpp" else self._root + PATHS[wanted.mode]
        return _Call(wanted, path, [*fields, ("response_format", asked)], asked)

    def _openai(self, wanted: RecognitionRequest) -> list[tuple[str, str]]:
        fields = [(self._model_field, wanted.model), *_common(wanted)]
        if wanted.language:
            fields.append(("language", wanted.language))
        if wanted.wants_word_times:
            fields += [("timestamp_granularities[]", one) for one in ("word", "segment")]
        return [*fields, ("stream", "true")] if self._streams else fields

    def _whisper_cpp(self, wanted: RecognitionRequest) -> list[tuple[str, str]]:
        """Its language is English unless it is told to listen for it."""
        fields = [*_common(wanted), ("language", wanted.language or "auto")]
        return [*fields, ("translate", "true")] if wanted.mode == "translate" else fields

    # A server that answers in one piece

    async def _transcript(self, call: _Call) -> SpeechTranscript:
        """The server's answer. Cancelled, it waits for the server to be done, unless that stops by itself."""
        work = asyncio.create_task(self._ask(call))
        try:
            status, headers, body = await asyncio.shield(work)
        finally:
            if not work.done():
                if self._stops or not call.sent:
                    work.cancel()
                with contextlib.suppress(BackendError):
                    await work
        if status == 200:
            return parse_transcript(body, call.asked)
        if call.asked == RICH and _is_about_the_format(status, body) and await self._lacks_rich(call):
            return await self._transcript(self._again(call))
        raise await self._failure(call, status, headers, body)

    async def _lacks_rich(self, call: _Call) -> bool:
        """Whether the model does not speak verbose_json: the file or the fields of this call may be what is wrong."""
        model = call.wanted.model
        fields: JSON = {} if self._api == "whispercpp" else {self._model_field: model}
        probe = partial(lacks_transcript, self._server, call.path, fields, RICH, OTHERS, root="")
        return await self._server.limitations.confirm(model, RICH, probe)

    async def _ask(self, call: _Call) -> tuple[int, dict[str, str], bytes]:
        response = await self._send(call)
        status, body = await _whole(response)
        return status, response.headers, body

    async def _send(self, call: _Call) -> BackendResponse:
        form = encode_multipart(call.fields, [FilePart.from_file(call.wanted.file)])
        return await self._client.request(
            "POST", call.path, content_type=form.content_type, pieces=call.pieces(form.pieces()), length=form.length
        )

    def _again(self, call: _Call) -> _Call:
        asked: TranscriptFormat = (
            call.wanted.response_format if call.wanted.response_format in ("srt", "vtt") else "json"
        )
        fields = [one for one in call.fields if one[0] not in ("response_format", "timestamp_granularities[]")]
        return _Call(call.wanted, call.path, [*fields, ("response_format", asked)], asked)

    # A server that streams

    async def _as_heard(self, call: _Call) -> AsyncGenerator[Output]:
        response = await self._send(call)
        try:
            if response.status != 200 or is_json_content_type(response.headers.get("content-type", "")):
                status, body = await _whole(response)
                if status != 200:
                    raise await self._failure(call, status, response.headers, body)
                for output in _outputs(call.wanted, parse_transcript(body, call.asked)):
                    yield output
                return
            async for event in _events(response):
                if event.get("type") == "transcript.text.delta":
                    yield _heard(event, call.wanted)
                    if (progress := _progress(event)) is not None:
                        yield progress
                elif event.get("type") == "transcript.text.done":
                    for output in _end(call.wanted, parse_transcript_json(event)):
                        yield output
                    response.release()
                    return
            raise BackendError("the backend's answer broke off before its end", transient=True)
        finally:
            response.close()  # where it has not ended: that stops the server

    # What went wrong

    async def _failure(self, call: _Call, status: int, headers: dict[str, str], body: bytes) -> BackendError:
        """Servers call it their own failure that a file is no sound."""
        error = self._refusal(status, headers, body)
        if isinstance(error, ModelNotServed | BackendUnavailable) or status in (401, 403, 408):
            return error
        if BAD_SOUND.search(body) or (status == 500 and not await _looks_like_sound(call.wanted)):
            message = error.info.message if isinstance(error, BackendRefused) else ""
            return BackendRefused(message or "the file is no sound that the backend can decode", param="file")
        return error

    def _refusal(self, status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
        if self.config.api_key:
            body = body.replace(self.config.api_key.encode(), b"***")
        return error_from_response(status, headers, body)


def _switch(options: dict[str, str], name: str) -> bool:
    value = options.get(name, "no").lower()
    if value not in YES | NO:
        raise ValueError(f"the whisper adapter's option {name} is yes or no")
    return value in YES


def _hears(model: JSON) -> bool:
    """Servers for speech in both directions say what each model is for."""
    task = model.get("task")
    return not isinstance(task, str) or task in ("automatic-speech-recognition", "transcription", "transcribe")


def _common(wanted: RecognitionRequest) -> list[tuple[str, str]]:
    given = {"prompt": wanted.prompt, "temperature": wanted.temperature}
    return [(name, str(value)) for name, value in given.items() if value is not None]


def _fields(name: str, value: Any) -> list[tuple[str, str]]:
    """A parameter as a form's fields."""
    if isinstance(value, list):
        return [one for part in value for one in _fields(f"{name}[]", part)]
    if value is None:
        return []
    return [(name, value if isinstance(value, str) else orjson.dumps(value).decode())]


def _is_about_the_format(status: int, body: bytes) -> bool:
    return status in (400, 415, 422) and (b"response_format" in body or b"verbose_json" in body)


async def _whole(response: BackendResponse) -> tuple[int, bytes]:
    try:
        return response.status, await response.read_all(BODY_LIMIT)
    finally:
        response.close()


async def _looks_like_sound(wanted: RecognitionRequest) -> bool:
    """By its first bytes."""
    async with contextlib.aclosing(_first(wanted)) as pieces:
        head = b"".join([piece async for piece in pieces])
    is_mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    return is_mpeg or head[4:8] == b"ftyp" or head.startswith(SOUND)


async def _first(wanted: RecognitionRequest) -> AsyncGenerator[bytes]:
    size = 0
    async for piece in wanted.file.pieces():
        yield piece[:16]
        size += len(piece)
        if size >= 16:
            return


# What the caller gets


def _outputs(wanted: RecognitionRequest, told: SpeechTranscript) -> list[Output]:
    """A whole transcript."""
    heard = [Chunk(delta_frame(text)) for text in text_deltas(told)] if wanted.stream else []
    return [*heard, *_end(wanted, told)]


def _end(wanted: RecognitionRequest, told: SpeechTranscript) -> list[Output]:
    if wanted.stream:
        return [Chunk(done_frame(told), 0), Finish(None, "text/event-stream")]
    body, kind = render_transcript(told, wanted.response_format, task=wanted.mode, granularities=wanted.granularities)
    return [Chunk(body), Finish(None, kind)]


def _heard(event: JSON, wanted: RecognitionRequest) -> Chunk:
    """More text; for a caller who does not stream, a sign of life."""
    return Chunk(delta_frame(str(event.get("delta") or "")) if wanted.stream else b"")


def _progress(event: JSON) -> Progress | None:
    """How much of the sound has been heard, where the server says."""
    duration, segment = event.get("duration"), event.get("segment")
    if not isinstance(duration, int | float) or not isinstance(segment, dict) or duration <= 0:
        return None
    return Progress(fraction=min(1.0, max(0.0, float(segment.get("end") or 0.0) / duration)))


async def _events(response: BackendResponse) -> AsyncIterator[JSON]:
    splitter = SseSplitter()
    while data := await response.read():
        for payload in payloads(splitter.feed(data)):
            if payload == b"[DONE]":
                continue
            try:
                event = orjson.loads(payload)
            except orjson.JSONDecodeError as error:
                raise BackendError("the backend sent an event that is not JSON") from error
            if isinstance(event, dict) and event.get("error"):
                raise error_from_payload(event)
            if isinstance(event, dict):
                yield event
