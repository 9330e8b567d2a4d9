"""Speech-to-text servers: OpenAI-compatible ones (speaches, faster-whisper servers) and whisper.cpp's.

The worker requests verbose_json, whatever format the caller wants, and converts the answer: servers differ in the formats that they have. A server
without verbose_json, as a probe proves, is asked for the caller's own format instead.

Most of these servers continue when their caller disconnects. So a cancelled request is read to its end, and its slot stays occupied until the server has
finished; a second cancellation disconnects.

Options:

- `api`: `openai` or `whispercpp` (`/inference`, any model name); by default the adapter detects it.
- `api_path`: where OpenAI's API lies (default `/v1`).
- `stream=yes`: the server streams `transcript.text.*` events while it transcribes, and stops when its caller disconnects. The server that `nexus up`
  starts does; then callers' streams arrive as they are made, and progress is known.
- `stops=yes`: the server stops when its caller disconnects (whisper.cpp since 1.7.6 does).
- `model_field`: the name of the form's field for the model (default `model`).
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

from schemas.descriptors import ModelDescriptor
from schemas.frames import Progress
from schemas.jobs import Capability
from schemas.parameters.audio import transcriptions, translations
from schemas.presence import Limitation, ModelOffer
from schemas.usage import MediaUsage
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
MISSING_STATUSES = frozenset({404, 405, 501})
BODY_LIMIT = 32 * 1024 * 1024
VERBOSE_JSON: TranscriptFormat = "verbose_json"
OTHER_FORMATS: tuple[TranscriptFormat, ...] = ("json", "text")
WHISPER_CPP_MODEL = "whisper"
"""The model's name for whisper.cpp where the operator gives none: its server reports no name."""
UNDECODABLE_AUDIO = re.compile(
    rb"invalid data found|failed to (?:read|decode|load|open|execute ffmpeg)|could not (?:read|decode|open)"
    rb"|(?:unsupported|unknown|invalid|unrecogni[sz]ed) (?:audio|file|format|media)|format not recogni[sz]ed"
    rb"|error (?:opening|decoding|reading)|no audio|not (?:a )?(?:valid )?audio|invaliddataerror",
    re.IGNORECASE,
)
"""Said in a 5xx by servers that could not decode the file."""
AUDIO_SIGNATURES = (
    b"RIFF",
    b"RF64",
    b"ID3",
    b"OggS",
    b"fLaC",
    b"FORM",
    b"\x1a\x45\xdf\xa3",
    b".snd",
    b"caff",
    b"#!AMR",
    b"MAC ",
)
"""How files of sound begin, but for MPEG's."""
SPEECH_TO_TEXT = ModelDescriptor(
    endpoints={"/v1/audio/transcriptions": transcriptions(), "/v1/audio/translations": translations()}
)
ENGLISH_TO_TEXT = ModelDescriptor(endpoints={"/v1/audio/transcriptions": transcriptions(language=False)})
ENGLISH_ONLY = re.compile(r"\.en\b", re.IGNORECASE)
UNSUPPORTED_FIELDS = ("include", "known_speaker_names", "known_speaker_references", "keywords", "languages")
"""Parameters of OpenAI's own models that change the answer, and that these servers do not have."""


@dataclass(slots=True)
class _TranscriptionCall:
    """One request, as it goes to the server."""

    request: RecognitionRequest
    path: str
    fields: list[tuple[str, str]] = field(default_factory=list)
    requested_format: TranscriptFormat = VERBOSE_JSON
    sent: bool = False
    """Whether the server has received the whole form."""

    async def pieces(self, form: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        """Yield the form, and note its end."""
        async for piece in form:
            yield piece
        self.sent = True


class WhisperBackend(Backend):
    """Serve one speech-to-text server. See the module's docstring."""

    name = "whisper"
    option_names = frozenset({"api", "api_path", "stream", "stops", "model_field"})
    default_slots = 1

    def __init__(self, config: BackendConfig) -> None:
        """Raise ValueError when the URL or an option is invalid."""
        super().__init__(config)
        options = config.options
        if options.get("api", "openai") not in APIS:
            raise ValueError(f"the whisper adapter's api must be one of {', '.join(sorted(APIS))}")
        self._api = options.get("api", "")
        url = config.url.rstrip("/")
        self._root = options.get("api_path", "/v1").rstrip("/")
        self._streams = _parse_switch(options, "stream")
        self._stops = self._streams or _parse_switch(options, "stops")
        self._model_field = options.get("model_field", "model")
        headers = {"authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        self._client = HttpClient(url.removesuffix(self._root), headers=headers)
        self._served: frozenset[str] | None = None
        """Names of the served models; None before the first `discover`."""
        self._server = OpenAIClient(self._client, self._root, self._make_error)

    async def close(self) -> None:
        await self._server.limitations.close()
        await self._client.close()

    def limitations(self) -> tuple[Limitation, ...]:
        """Return the models without verbose_json, as probes found."""
        return self._server.limitations.confirmed_limitations()

    # Discovery

    async def discover(self) -> Discovery:
        """Return the models that the server lists for speech, or those of `config.models`.

        Raises BackendError when a configured model is missing, or when neither the server nor the configuration names a model.
        """
        listed = None if self._api == "whispercpp" else await self._list_models()
        if not self._api and listed is None and await self._is_whisper_cpp():
            self._api = "whispercpp"
        names = self._select_models(listed)
        self._served = frozenset(names)
        return Discovery(tuple(ModelOffer(name=name, capabilities=(Capability.TRANSCRIPTIONS,)) for name in names))

    def describe(self, offer: ModelOffer) -> ModelDescriptor:
        """Return what a model can be told. Whisper's English models (`….en`) do not translate."""
        return ENGLISH_TO_TEXT if ENGLISH_ONLY.search(offer.name) else SPEECH_TO_TEXT

    async def health(self) -> None:
        """Poll `/health`, or the list of models or the front page on a server without it."""
        status, body = await self._get("/health")
        if status in MISSING_STATUSES:
            status, body = await self._get("/" if self._api == "whispercpp" else f"{self._root}/models")
        if status in (401, 403, 429) or status >= 500:
            raise BackendUnavailable(error_from_response(status, {}, body).info.message)

    async def _list_models(self) -> tuple[str, ...] | None:
        """Return the speech models of the server's list; None when the server has no list."""
        status, body = await self._get(f"{self._root}/models")
        if status in MISSING_STATUSES:
            return None
        if status != 200:
            raise self._make_error(status, {}, body)
        try:
            return tuple(str(model["id"]) for model in orjson.loads(body)["data"] if _is_speech_model(model))
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise BackendError(
                "the backend's answer to GET /v1/models is not a list of models; check the worker's URL"
            ) from error

    async def _is_whisper_cpp(self) -> bool:
        status, body = await self._get("/")
        return status == 200 and b"whisper.cpp" in body.lower()

    def _select_models(self, listed: tuple[str, ...] | None) -> tuple[str, ...]:
        request = self.config.models
        if self._api == "whispercpp":
            return request or (WHISPER_CPP_MODEL,)
        if listed is None:
            if not request:
                raise BackendError("the backend does not list its models; name them with --model")
            return request
        missing = [name for name in request if name not in listed]
        if missing:
            raise BackendError(f"the backend lacks {', '.join(missing)}; it has {', '.join(listed) or 'no models'}")
        return request or listed

    async def _get(self, path: str) -> tuple[int, bytes]:
        try:
            return await _read_and_close(await self._client.request("GET", path))
        except BackendError as error:
            raise BackendUnavailable(str(error)) from error

    # Work

    async def run(self, task: Task) -> AsyncIterator[Output]:
        """Transcribe or translate audio."""
        if self._served is None:
            await self.discover()
        if task.model not in (self._served or ()):
            raise ModelNotServed(f"the backend does not have the model {task.model!r}", param="model")
        call = self._make_call(task)
        if self._streams:
            async with contextlib.aclosing(self._stream_transcript(call)) as outputs:
                async for output in outputs:
                    yield output
            return
        for output in _outputs(call.request, await self._transcript(call)):
            yield output

    def _make_call(self, task: Task) -> _TranscriptionCall:
        request = RecognitionRequest.from_task(task)
        for name in UNSUPPORTED_FIELDS:
            if request.extra.get(name):
                raise BackendRefused(f"this backend does not have {name}; leave it out", param=name)
        requested_format: TranscriptFormat = VERBOSE_JSON
        if self._server.limitations.lacks(task.model, VERBOSE_JSON):
            requested_format = request.response_format if request.response_format in ("srt", "vtt") else "json"
        fields = self._whisper_cpp_fields(request) if self._api == "whispercpp" else self._openai_fields(request)
        for name, value in request.extra.items():
            fields += _form_fields(name, value)
        path = "/inference" if self._api == "whispercpp" else self._root + PATHS[request.mode]
        return _TranscriptionCall(request, path, [*fields, ("response_format", requested_format)], requested_format)

    def _openai_fields(self, request: RecognitionRequest) -> list[tuple[str, str]]:
        fields = [(self._model_field, request.model), *_common_fields(request)]
        if request.language:
            fields.append(("language", request.language))
        if request.wants_word_times:
            fields += [("timestamp_granularities[]", one) for one in ("word", "segment")]
        return [*fields, ("stream", "true")] if self._streams else fields

    def _whisper_cpp_fields(self, request: RecognitionRequest) -> list[tuple[str, str]]:
        """Return whisper.cpp's fields. Its language is English unless the request asks it to detect one."""
        fields = [*_common_fields(request), ("language", request.language or "auto")]
        return [*fields, ("translate", "true")] if request.mode == "translate" else fields

    # Servers that answer in one piece

    async def _transcript(self, call: _TranscriptionCall) -> SpeechTranscript:
        """Return the server's transcript. A cancellation waits until the server has finished, unless it stops by itself."""
        work = asyncio.create_task(self._request(call))
        try:
            status, headers, body = await asyncio.shield(work)
        finally:
            if not work.done():
                if self._stops or not call.sent:
                    work.cancel()
                with contextlib.suppress(BackendError):
                    await work
        if status == 200:
            return parse_transcript(body, call.requested_format)
        if (
            call.requested_format == VERBOSE_JSON
            and _rejects_format(status, body)
            and await self._lacks_verbose_json(call)
        ):
            return await self._transcript(self._without_verbose_json(call))
        raise await self._error_of_answer(call, status, headers, body)

    async def _lacks_verbose_json(self, call: _TranscriptionCall) -> bool:
        """Return whether a probe proves that the model lacks verbose_json. The file or a field of the call may be the fault instead."""
        model = call.request.model
        fields: JSON = {} if self._api == "whispercpp" else {self._model_field: model}
        probe = partial(lacks_transcript, self._server, call.path, fields, VERBOSE_JSON, OTHER_FORMATS, root="")
        return await self._server.limitations.confirm(model, VERBOSE_JSON, probe)

    async def _request(self, call: _TranscriptionCall) -> tuple[int, dict[str, str], bytes]:
        response = await self._send(call)
        status, body = await _read_and_close(response)
        return status, response.headers, body

    async def _send(self, call: _TranscriptionCall) -> BackendResponse:
        form = encode_multipart(call.fields, [FilePart.from_file(call.request.file)])
        return await self._client.request(
            "POST", call.path, content_type=form.content_type, pieces=call.pieces(form.pieces()), length=form.length
        )

    def _without_verbose_json(self, call: _TranscriptionCall) -> _TranscriptionCall:
        requested_format: TranscriptFormat = (
            call.request.response_format if call.request.response_format in ("srt", "vtt") else "json"
        )
        fields = [one for one in call.fields if one[0] not in ("response_format", "timestamp_granularities[]")]
        return _TranscriptionCall(
            call.request, call.path, [*fields, ("response_format", requested_format)], requested_format
        )

    # Servers that stream

    async def _stream_transcript(self, call: _TranscriptionCall) -> AsyncGenerator[Output]:
        response = await self._send(call)
        try:
            if response.status != 200 or is_json_content_type(response.headers.get("content-type", "")):
                status, body = await _read_and_close(response)
                if status != 200:
                    raise await self._error_of_answer(call, status, response.headers, body)
                for output in _outputs(call.request, parse_transcript(body, call.requested_format)):
                    yield output
                return
            async for event in _events(response):
                if event.get("type") == "transcript.text.delta":
                    yield _delta_chunk(event, call.request)
                    if (progress := _progress(event)) is not None:
                        yield progress
                elif event.get("type") == "transcript.text.done":
                    for output in _final_outputs(call.request, parse_transcript_json(event)):
                        yield output
                    response.release()
                    return
            raise BackendError("the backend's answer broke off before its end", transient=True)
        finally:
            response.close()  # stops a server that has not ended

    # Errors

    async def _error_of_answer(
        self, call: _TranscriptionCall, status: int, headers: dict[str, str], body: bytes
    ) -> BackendError:
        """Return the error of an answer. Servers report a file that is not audio as their own failure."""
        error = self._make_error(status, headers, body)
        if isinstance(error, ModelNotServed | BackendUnavailable) or status in (401, 403, 408):
            return error
        if UNDECODABLE_AUDIO.search(body) or (status == 500 and not await _looks_like_audio(call.request)):
            message = error.info.message if isinstance(error, BackendRefused) else ""
            return BackendRefused(message or "the file is no sound that the backend can decode", param="file")
        return error

    def _make_error(self, status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
        if self.config.api_key:
            body = body.replace(self.config.api_key.encode(), b"***")
        return error_from_response(status, headers, body)


def _parse_switch(options: dict[str, str], name: str) -> bool:
    value = options.get(name, "no").lower()
    if value not in YES | NO:
        raise ValueError(f"the whisper adapter's option {name} must be yes or no")
    return value in YES


def _is_speech_model(model: JSON) -> bool:
    """Return whether a listed model transcribes. Servers with other models report the task of each."""
    task = model.get("task")
    return not isinstance(task, str) or task in ("automatic-speech-recognition", "transcription", "transcribe")


def _common_fields(request: RecognitionRequest) -> list[tuple[str, str]]:
    given = {"prompt": request.prompt, "temperature": request.temperature}
    return [(name, str(value)) for name, value in given.items() if value is not None]


def _form_fields(name: str, value: Any) -> list[tuple[str, str]]:
    """Return a parameter as the fields of a form."""
    if isinstance(value, list):
        return [one for part in value for one in _form_fields(f"{name}[]", part)]
    if value is None:
        return []
    return [(name, value if isinstance(value, str) else orjson.dumps(value).decode())]


def _rejects_format(status: int, body: bytes) -> bool:
    return status in (400, 415, 422) and (b"response_format" in body or b"verbose_json" in body)


async def _read_and_close(response: BackendResponse) -> tuple[int, bytes]:
    try:
        return response.status, await response.read_all(BODY_LIMIT)
    finally:
        response.close()


async def _looks_like_audio(request: RecognitionRequest) -> bool:
    """Return whether a file begins as an audio file does."""
    async with contextlib.aclosing(_first_bytes(request)) as pieces:
        head = b"".join([piece async for piece in pieces])
    is_mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    return is_mpeg or head[4:8] == b"ftyp" or head.startswith(AUDIO_SIGNATURES)


async def _first_bytes(request: RecognitionRequest) -> AsyncGenerator[bytes]:
    size = 0
    async for piece in request.file.pieces():
        yield piece[:16]
        size += len(piece)
        if size >= 16:
            return


# Outputs


def _outputs(request: RecognitionRequest, transcript: SpeechTranscript) -> list[Output]:
    """Return the outputs of a whole transcript."""
    deltas_sent = [Chunk(delta_frame(text)) for text in text_deltas(transcript)] if request.stream else []
    return [*deltas_sent, *_final_outputs(request, transcript)]


def _final_outputs(request: RecognitionRequest, transcript: SpeechTranscript) -> list[Output]:
    media = MediaUsage(audio_s=transcript.seconds or 0.0)
    if request.stream:
        return [Chunk(done_frame(transcript), 0), Finish(None, "text/event-stream", media)]
    body, kind = render_transcript(
        transcript, request.response_format, task=request.mode, granularities=request.granularities
    )
    return [Chunk(body), Finish(None, kind, media)]


def _delta_chunk(event: JSON, request: RecognitionRequest) -> Chunk:
    """Return the chunk of a text delta; without data for a caller who does not stream."""
    return Chunk(delta_frame(str(event.get("delta") or "")) if request.stream else b"")


def _progress(event: JSON) -> Progress | None:
    """Return the share of the audio that is transcribed; None where the server does not report it."""
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
