"""Piper's HTTP server: `python -m piper.http_server -m VOICE.onnx --port 5000`.

`POST /synthesize {"text", "voice"}` answers a WAV in one piece, once all of the text is spoken. So the text is sent sentence
by sentence: the first one is heard while the others are still to be made. Piper cannot be stopped; giving a request up ends
it, and frees its slot, when the sentence in work has been spoken.

Piper speaks with its default voice when it is asked for one that it does not have. Here such a voice is refused, but for the
names of OpenAI's own voices, which clients send when nobody chose one: these stand for the default voice. A voice with
several speakers is asked for one as `VOICE/SPEAKER`.

Options: `model_name` (default: piper); `voices=alloy:en_US-joe-medium;nova:en_GB-alba-medium`, further names of voices;
`strict_voices=true`, where no other name stands for a voice; `sentence_silence`, seconds of silence between sentences, as
the option of that name of Piper (default: 0).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson

from schemas.jobs import Capability
from schemas.presence import ModelOffer
from workers.adapter_kit.audio.codecs import SAMPLE_WIDTH, AudioFormat, WavReader, finish_before_cancel
from workers.adapter_kit.audio.sentence_splitter import split_sentences
from workers.adapter_kit.audio.speech import SynthesisRequest, choose_voice, parse_voices_option, respond_with_speech
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

LISTED_LIMIT = 64 * 1024 * 1024
"""Bytes of `GET /voices`: it quotes the whole configuration of every voice."""
SPOKEN_LIMIT = 64 * 1024 * 1024
"""Bytes of one sentence's WAV: some 25 minutes."""


@dataclass(frozen=True, slots=True)
class _Voice:
    name: str
    rate: int
    length_scale: float
    speakers: dict[str, int]


class PiperBackend(Backend):
    """See the module's docstring."""

    name = "piper"
    option_names = frozenset({"model_name", "voices", "strict_voices", "sentence_silence"})
    default_slots = 2

    def __init__(self, config: BackendConfig) -> None:
        """Raises ValueError when the URL or an option makes no sense."""
        super().__init__(config)
        options = config.options
        self._model = options.get("model_name") or "piper"
        self._named = parse_voices_option(options.get("voices", ""))
        self._strict = parse_flag(options, "strict_voices")
        self._silence_s = float(options.get("sentence_silence", "0"))
        self._client = HttpClient(config.url)
        self._voices: dict[str, _Voice] | None = None
        self._default = ""

    async def close(self) -> None:
        await self._client.close()

    # What the server has

    def requirements(self) -> tuple[Requirement, ...]:
        """PyAV, for all formats but WAV and PCM."""
        return (AUDIO_CODECS,)

    async def discover(self) -> Discovery:
        """One model with the server's voices, the default one first."""
        if self.config.models and self._model not in self.config.models:
            raise BackendError(f"the backend lacks {', '.join(self.config.models)}; it has {self._model}")
        listed = await self._get("/voices")
        if not listed:
            raise BackendError("this server lists no voices; is it Piper's?")
        voices = {name: _voice(name, config) for name, config in listed.items()}
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

    async def health(self) -> None:
        """Any answer will do."""
        await self._get("/info")

    async def _get(self, path: str) -> JSON:
        """The JSON object that `path` answers, empty where there is no such path."""
        try:
            response = await self._client.request("GET", path)
            try:
                body = await response.read_all(LISTED_LIMIT)
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
        """Speech."""
        if self._voices is None:
            await self.discover()
        if task.model != self._model:
            raise ModelNotServed(f"the backend does not have the model {task.model!r}", param="model")
        request = SynthesisRequest.from_task(task)
        if request.instructions:
            raise BackendRefused("Piper's voices take no instructions; choose another voice", param="instructions")
        voice, fields = self._chosen(request.voice)
        if request.speed != 1:
            fields["length_scale"] = voice.length_scale / request.speed
        texts = tuple(split_sentences(request.input))
        if not texts:
            raise BackendRefused("input: there is nothing to say", param="input")
        async with aclosing(respond_with_speech(task, request, self._spoken(texts, fields), _format(voice))) as outputs:
            async for output in outputs:
                yield output

    def _chosen(self, name: str) -> tuple[_Voice, JSON]:
        """The voice, and what Piper must be told of it."""
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

    async def _spoken(self, texts: tuple[str, ...], fields: JSON) -> AsyncGenerator[bytes]:
        """The samples of one sentence after another."""
        rate: int | None = None
        for text in texts:
            reader = WavReader()
            samples = reader.feed(await finish_before_cancel(self._synthesized({"text": text} | fields)))
            if reader.format is None:
                raise BackendError("the backend made no sound of a sentence", transient=True)
            if rate is not None:
                yield bytes(int(self._silence_s * rate) * reader.format.channels * SAMPLE_WIDTH)
            rate = reader.format.rate
            yield samples

    async def _synthesized(self, body: JSON) -> bytes:
        """Piper's answer, whose content type says HTML although it is a WAV."""
        response = await self._client.request("POST", "/synthesize", orjson.dumps(body))
        try:
            data = await response.read_all(SPOKEN_LIMIT)
        finally:
            response.close()
        if response.status == 200:
            return data
        if response.status == 500:
            raise BackendError("Piper failed (500); its own log says why", transient=True)
        raise error_from_response(response.status, response.headers, data)


def _format(voice: _Voice) -> AudioFormat:
    return AudioFormat("pcm", voice.rate, 1)


def _voice(name: str, config: Any) -> _Voice:
    try:
        return _Voice(
            name,
            int(config["audio"]["sample_rate"]),
            float(config.get("inference", {}).get("length_scale", 1.0)),
            {str(key): int(number) for key, number in (config.get("speaker_id_map") or {}).items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BackendError(f"the backend's voice {name} has no configuration that can be read") from error
