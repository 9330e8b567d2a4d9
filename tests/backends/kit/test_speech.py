"""The speech request, and the answer from a server's audio."""

from __future__ import annotations

import base64
import io
import json
import wave
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from schemas.jobs import Capability
from tests.backends.kit.test_audio_codecs import encoded, tone
from workers.adapter_kit.audio.codecs import AudioFormat, decode_audio, wav_header
from workers.adapter_kit.audio.speech import SynthesisRequest, respond_with_speech
from workers.backends.base import BackendError, BackendRefused, Chunk, Finish, Output, Task

pytest.importorskip("av")

RATE = 22_050
PCM = AudioFormat("pcm", RATE, 1)


def speech(*, stream: bool = False, **fields: Any) -> Task:
    body = json.dumps({"model": "piper", "input": "Hello.", "voice": "alloy"} | fields).encode()
    return Task("job_1", "req_1", Capability.SPEECH, "/v1/audio/speech", "piper", "piper", stream, body)


class Server:
    """A server that makes audio in pieces, and knows how many were read."""

    def __init__(self, data: bytes, size: int = 4410) -> None:
        self._data, self._size = data, size
        self.made = 0
        self.closed = False

    async def sound(self) -> AsyncGenerator[bytes]:
        try:
            for start in range(0, len(self._data), self._size):
                self.made += 1
                yield self._data[start : start + self._size]
        finally:
            self.closed = True


async def answer(task: Task, data: bytes, source: AudioFormat = PCM, **options: Any) -> tuple[list[bytes], Finish]:
    """Return the pieces that are not empty, and the end."""
    server = Server(data)
    async with aclosing(
        respond_with_speech(task, SynthesisRequest.from_task(task), server.sound(), source, **options)
    ) as outputs:
        found: list[Output] = [output async for output in outputs]
    assert server.closed
    finish = found.pop()
    assert isinstance(finish, Finish)
    assert all(isinstance(output, Chunk) for output in found)
    return [output.data for output in found if isinstance(output, Chunk) and output.data], finish


# The request


def test_what_is_left_out_has_openais_defaults() -> None:
    request = SynthesisRequest.from_task(speech())
    assert (request.response_format, request.speed, request.sse, request.instructions) == ("mp3", 1.0, False, "")


def test_a_voice_is_a_name_or_an_object_with_an_id() -> None:
    assert SynthesisRequest.from_task(speech(voice={"id": "voice_12"})).voice == "voice_12"
    assert SynthesisRequest.from_task(speech(voice="joe")).voice == "joe"
    assert SynthesisRequest.from_task(speech(voice=None)).voice == ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", ""),
        ("input", " \n"),
        ("input", 5),
        ("input", "x" * 32_769),
        ("response_format", "ogg"),
        ("speed", 0.2),
        ("speed", 4.1),
        ("speed", "fast"),
        ("stream_format", "chunks"),
        ("voice", 7),
        ("instructions", ["kindly"]),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(BackendRefused) as caught:
        SynthesisRequest.from_task(speech(**{field: value}))
    assert (caught.value.info.status, caught.value.info.param) == (400, field)


def test_another_endpoint_is_refused() -> None:
    task = Task("j", "r", Capability.CHAT, "/v1/chat/completions", "m", "m", False, b"{}")
    with pytest.raises(BackendRefused, match="/v1/chat/completions"):
        SynthesisRequest.from_task(task)


# The answer


async def test_a_stream_is_the_sound_itself_as_it_is_made() -> None:
    """The first bytes come after a fraction of the audio was read."""
    server = Server(tone(3))
    task = speech(stream=True)
    outputs = respond_with_speech(task, SynthesisRequest.from_task(task), server.sound(), PCM)
    async for output in outputs:
        if isinstance(output, Chunk) and output.data:
            break
    assert server.made < 10
    await outputs.aclose()
    assert server.closed


@pytest.mark.parametrize(
    ("name", "content_type"),
    [
        ("mp3", "audio/mpeg"),
        ("opus", "audio/ogg"),
        ("aac", "audio/aac"),
        ("flac", "audio/flac"),
        ("wav", "audio/wav"),
        ("pcm", "audio/pcm"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_every_format_from_samples(name: str, content_type: str, stream: bool) -> None:
    data, finish = await answer(speech(response_format=name, stream=stream), tone(1))
    assert finish.content_type == content_type
    whole = b"".join(data)
    heard = await decode_audio(wav_header(24_000, 1, len(whole)) + whole if name == "pcm" else whole)
    assert heard.seconds == pytest.approx(1, abs=0.15)


async def test_events_hold_the_same_sound() -> None:
    data, finish = await answer(speech(response_format="wav", stream=True, stream_format="sse"), tone(1))
    assert finish.content_type == "text/event-stream"
    assert all(frame.startswith(b"data: {") and frame.endswith(b"}\n\n") and frame.count(b"\n") == 2 for frame in data)
    *deltas, done = (json.loads(frame[6:]) for frame in data)
    assert {delta["type"] for delta in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(delta["audio"]) for delta in deltas) == wav_header(RATE, 1) + tone(1)
    assert done == {
        "type": "speech.audio.done",
        "usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
    }


async def test_a_whole_answer_is_the_sound_whatever_the_stream_would_be() -> None:
    """Its header has the true length, even where the server's WAV had none."""
    source = wav_header(RATE, 1) + tone(1)
    data, finish = await answer(speech(response_format="wav", stream_format="sse"), source, AudioFormat("wav"))
    assert finish.content_type == "audio/wav"
    with wave.open(io.BytesIO(b"".join(data))) as file:
        assert file.getnframes() == RATE


async def test_a_format_that_the_server_has_passes_untouched() -> None:
    mp3 = b"".join(encoded("mp3", tone(1)))
    data, _ = await answer(speech(stream=True), mp3, AudioFormat("mp3"))
    assert b"".join(data) == mp3


@pytest.mark.parametrize("source", ["mp3", "flac", "opus"])
async def test_coded_sound_is_coded_anew(source: str) -> None:
    made = b"".join(encoded(source, tone(1)))
    data, _ = await answer(speech(response_format="wav"), made, AudioFormat(source))
    assert (await decode_audio(b"".join(data))).seconds == pytest.approx(1, abs=0.15)


async def test_speed_that_the_server_lacks_is_made_here() -> None:
    for source, made in ((PCM, tone(2)), (AudioFormat("mp3"), b"".join(encoded("mp3", tone(2))))):
        data, _ = await answer(speech(speed=2, response_format="mp3"), made, source, speed=2.0)
        assert (await decode_audio(b"".join(data))).seconds == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("data", "source"),
    [
        (b"", PCM),
        (b"", AudioFormat("wav")),
        (wav_header(RATE, 1, 0), AudioFormat("wav")),
        (b"<html>Internal Server Error</html>", AudioFormat("wav")),
        (b"", AudioFormat("mp3")),
        (b"<html>Internal Server Error</html>", AudioFormat("opus")),
    ],
)
async def test_what_is_no_sound_is_the_servers_failure(data: bytes, source: AudioFormat) -> None:
    """The answer is a server error, neither an empty success nor the caller's error."""
    for name in ("mp3", "wav"):
        with pytest.raises(BackendError) as caught:
            await answer(speech(response_format=name), data, source)
        assert not isinstance(caught.value, BackendRefused)


async def test_without_codecs_nothing_is_asked_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes first, and names the possible formats."""
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    task = speech()
    server = Server(tone(1))
    with pytest.raises(BackendRefused, match="wav") as caught:
        await anext(respond_with_speech(task, SynthesisRequest.from_task(task), server.sound(), PCM))
    assert caught.value.info.param == "response_format"
    assert server.made == 0
