"""Piper's HTTP server: `python -m piper.http_server -m VOICE.onnx --port 5000`.

`POST /synthesize {"text", "voice"}` answers with one WAV, once the whole text is spoken. So the text is sent sentence by sentence: the first one
is sent to the caller while the others are made. Piper cannot be stopped; a cancelled request ends, and frees its slot, when the current sentence
has been spoken.

Piper speaks with its default voice when a request names an unknown one. Here such a voice is refused, except the names of OpenAI's own voices,
which clients send when their user chose none: these stand for the default voice. A voice with several speakers is named `VOICE/SPEAKER`.

Options: `model_name` (default: piper); `voices=alloy:en_US-joe-medium;nova:en_GB-alba-medium`, further names of voices; `strict_voices=true`, where no
other name stands for a voice; `sentence_silence`, seconds of silence between sentences, as Piper's own option of that name (default: 0).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson

from schemas.descriptors import ModelDescriptor
from schemas.jobs import Capability
from schemas.parameters.audio import speech
from schemas.presence import ModelOffer
from workers.adapter_kit.audio.codecs import SAMPLE_WIDTH, AudioFormat, WavReader, finish_before_cancel
from workers.adapter_kit.audio.sentence_splitter import split_sentences
from workers.adapter_kit.audio.speech import SynthesisRequest, choose_voice, parse_voices_option, respond_with_speech
from workers.adapter_kit.descriptors import DescriptorCache
from workers.adapter_kit.error_mapping import error_from_response
from workers.adapter_kit.http_client import HttpClient
from workers.adapter_kit.options import parse_flag
from workers.adapter_kit.request_fields import JSON
from workers.adapter_kit.requirements import AUDIO_CODECS
from workers.backends.base import (
    Backend,
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Discovery,
    ModelNotServed,
    Output,
    Requirement,
    Task,
)

VOICE_LIST_LIMIT = 64 * 1024 * 1024
"""Bytes of `GET /voices`, which holds the whole configuration of every voice."""
SENTENCE_LIMIT = 64 * 1024 * 1024
"""Bytes of one sentence's WAV: about 25 minutes."""


@dataclass(frozen=True, slots=True)
class _PiperVoice:
    name: str
    rate: int
    length_scale: float
    speakers: dict[str, int]


class PiperBackend(Backend):
    """Serve the voices of one Piper server. See the module's docstring."""

    name = "piper"
    option_names = frozenset({"model_name", "voices", "strict_voices", "sentence_silence"})
    default_slots = 2

    def __init__(self, config: BackendConfig) -> None:
        """Raise ValueError when the URL or an option is invalid."""
        super().__init__(config)
        options = config.options
        self._model = options.get("model_name") or "piper"
        self._named = parse_voices_option(options.get("voices", ""))
        self._strict = parse_flag(options, "strict_voices")
        self._silence_s = float(options.get("sentence_silence", "0"))
        self._client = HttpClient(config.url)
        self._voices: dict[str, _PiperVoice] | None = None
        self._default = ""
        self._descriptors = DescriptorCache()

    async def close(self) -> None:
        await self._client.close()

    # Discovery

    def requirements(self) -> tuple[Requirement, ...]:
        """Return PyAV, for all formats except WAV and PCM."""
        return (AUDIO_CODECS,)

    async def discover(self) -> Discovery:
        """Return one model with the server's voices, the default voice first."""
        if self.config.models and self._model not in self.config.models:
            raise BackendError(f"the backend lacks {', '.join(self.config.models)}; it has {self._model}")
        listed = await self._get("/voices")
        if not listed:
            raise BackendError(
                "the backend lists no voices; check that the worker's URL is that of Piper's HTTP server"
            )
        voices = {name: _parse_voice(name, config) for name, config in listed.items()}
        missing = [voice for voice in self._named.values() if voice.partition("/")[0] not in voices]
        if missing:
            raise BackendError(f"the backend lacks the voice {missing[0]}; it has {', '.join(voices)}")
        info = await self._get("/info")  # older servers have none
        default = info.get("voice", {}).get("name")
        self._default = default if default in voices else next(iter(voices))
        self._voices = voices
        names = dict.fromkeys((self._default, *voices, *self._named))
        offer = ModelOffer(name=self._model, capabilities=(Capability.SPEECH,), loaded=True, voices=tuple(names))
        return Discovery((offer,))

    def describe(self, _offer: ModelOffer) -> ModelDescriptor:
        """Return the voices, and what they can be told."""
        known = self._voices or {}
        speakers = (f"{voice.name}/{speaker}" for voice in known.values() for speaker in voice.speakers)
        voices = tuple(dict.fromkeys((self._default, *known, *self._named, *speakers)))
        build = partial(speech, voices, instructions=False, strict_voices=self._strict, enforced=True)
        return self._descriptors.get("", voices, lambda: {"/v1/audio/speech": build()})

    async def health(self) -> None:
        """Poll `/info`. Any answer shows that the server is up."""
        await self._get("/info")

    async def _get(self, path: str) -> JSON:
        """Return the JSON object that `path` answers; {} where the server lacks the path."""
        try:
            response = await self._client.request("GET", path)
            try:
                body = await response.read_all(VOICE_LIST_LIMIT)
            finally:
                response.close()
        except BackendError as error:
            raise BackendUnavailable(str(error)) from error
        if response.status >= 500:
            raise BackendUnavailable(f"the backend answered {response.status}")
        try:
            found = orjson.loads(body) if response.status == 200 else {}
        except orjson.JSONDecodeError:
            return {}
        return found if isinstance(found, dict) else {}

    # Work

    async def run(self, task: Task) -> AsyncGenerator[Output]:
        """Speak a text."""
        if self._voices is None:
            await self.discover()
        if task.model != self._model:
            raise ModelNotServed(f"the backend does not have the model {task.model!r}", param="model")
        request = SynthesisRequest.from_task(task)
        if request.instructions:
            raise BackendRefused(
                "Piper's voices take no instructions. Send the request without instructions, or choose another voice.",
                param="instructions",
            )
        voice, fields = self._choose_voice(request.voice)
        if request.speed != 1:
            fields["length_scale"] = voice.length_scale / request.speed
        texts = tuple(split_sentences(request.input))
        if not texts:
            raise BackendRefused("The input has no text to speak.", param="input")
        async with aclosing(
            respond_with_speech(task, request, self._speak_sentences(texts, fields), _audio_format(voice))
        ) as outputs:
            async for output in outputs:
                yield output

    def _choose_voice(self, name: str) -> tuple[_PiperVoice, JSON]:
        """Return the voice, and the fields that select it in Piper's request."""
        voices = self._voices or {}
        named = {voice: voice for voice in voices} | self._named
        if name not in self._named:
            wanted, slash, speaker = name.partition("/")
            name = choose_voice(wanted, named, self._default, strict=self._strict) + slash + speaker
        voice_name, slash, speaker = named.get(name, name).partition("/")
        voice = voices[voice_name]
        fields: JSON = {"voice": voice_name}
        if slash:
            if speaker not in voice.speakers:
                known = ", ".join(voice.speakers) or "none"
                raise BackendRefused(
                    f"the voice {voice_name} has no speaker {speaker!r}; it has {known}", param="voice"
                )
            fields["speaker_id"] = voice.speakers[speaker]
        return voice, fields

    async def _speak_sentences(self, texts: tuple[str, ...], fields: JSON) -> AsyncGenerator[bytes]:
        """Yield the samples of each sentence."""
        rate: int | None = None
        for text in texts:
            reader = WavReader()
            samples = reader.feed(await finish_before_cancel(self._synthesize({"text": text} | fields)))
            if reader.format is None:
                raise BackendError("Piper's answer for a sentence is not a WAV.", transient=True)
            if rate is not None:
                yield bytes(int(self._silence_s * rate) * reader.format.channels * SAMPLE_WIDTH)
            rate = reader.format.rate
            yield samples

    async def _synthesize(self, body: JSON) -> bytes:
        """Return Piper's answer, which is a WAV although its content type is HTML."""
        response = await self._client.request("POST", "/synthesize", orjson.dumps(body))
        try:
            data = await response.read_all(SENTENCE_LIMIT)
        finally:
            response.close()
        if response.status == 200:
            return data
        if response.status == 500:
            raise BackendError("Piper failed (500); its log says why", transient=True)
        raise error_from_response(response.status, response.headers, data)


def _audio_format(voice: _PiperVoice) -> AudioFormat:
    return AudioFormat("pcm", voice.rate, 1)


def _parse_voice(name: str, config: Any) -> _PiperVoice:
    try:
        return _PiperVoice(
            name,
            int(config["audio"]["sample_rate"]),
            float(config.get("inference", {}).get("length_scale", 1.0)),
            {str(key): int(number) for key, number in (config.get("speaker_id_map") or {}).items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BackendError(f"the backend's voice {name} has no configuration that can be read") from error
