"""The Piper adapter, on a real Piper server."""

from __future__ import annotations

import asyncio
import io
import json
import wave
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from schemas.jobs import Capability
from tests.backends.adapter_contract import AdapterContract, AdapterRig, eventually, outputs_of
from tests.backends.kit.test_speech import speech
from tests.backends.piper_server import VOICE, PiperProcess, PiperServer, running_piper, watched
from workers.backends.base import (
    BackendConfig,
    BackendError,
    BackendRefused,
    BackendUnavailable,
    Chunk,
    Finish,
)
from workers.backends.piper import PiperBackend

TEXT = "This is the first sentence. Here is another one. "


@pytest.fixture(scope="module")
def process() -> Iterator[PiperProcess]:
    with running_piper() as process:
        yield process


@pytest.fixture
async def server(process: PiperProcess) -> AsyncIterator[PiperServer]:
    async with watched(process) as server:
        yield server


def piper(server: PiperServer, **options: str) -> PiperBackend:
    return PiperBackend(BackendConfig(url=server.url, options=options))


def seconds(chunks: list[Chunk]) -> float:
    """How long a complete WAV lasts, by its own header."""
    with wave.open(io.BytesIO(b"".join(chunk.data for chunk in chunks))) as file:
        assert (file.getframerate(), file.getnchannels()) == (22_050, 1)
        return file.getnframes() / 22_050


def check(chunks: list[Chunk], finish: Finish) -> None:
    assert finish.content_type == "audio/wav"
    assert 0.3 < seconds(chunks) < 5


class TestContract(AdapterContract):
    """What every adapter must do."""

    @pytest.fixture
    async def rig(self, server: PiperServer) -> AsyncIterator[AdapterRig]:
        backend = piper(server)
        await backend.start()
        yield AdapterRig(
            backend=backend,
            capability=Capability.SPEECH,
            short=speech(input="Hello.", response_format="wav"),
            check=check,
            long=speech(input=TEXT * 200, response_format="wav"),
            bad=speech(voice="no-such-voice"),
            idle=server.idle,
            kill=server.kill,
            start=server.start,
        )
        await backend.close()


async def test_the_models_voices_are_told(server: PiperServer) -> None:
    backend = piper(server, model_name="speaker", voices=f"boss:{VOICE};me:{VOICE}")
    (offer,) = (await backend.discover()).models
    assert (offer.name, offer.voices) == ("speaker", (VOICE, "boss", "me"))
    await backend.close()


async def test_what_is_said_depends_on_names_speed_and_settings(server: PiperServer) -> None:
    """OpenAI's names and none stand for the default voice, an own name for its voice; speed is Piper's own."""
    backend = piper(server, voices=f"boss:{VOICE}")
    for voice in ("alloy", "", None, "boss", VOICE, {"id": VOICE}):
        await outputs_of(backend, speech(voice=voice))
    assert {json.loads(text)["voice"] for text in server.texts} == {VOICE}
    slow, _, _ = await outputs_of(backend, speech(input=TEXT, response_format="wav", speed=0.5))
    fast, _, _ = await outputs_of(backend, speech(input=TEXT, response_format="wav", speed=2))
    assert seconds(slow) > 2.5 * seconds(fast)
    await backend.close()


@pytest.mark.parametrize(
    ("fields", "param", "named"),
    [
        ({"voice": "en_GB-nobody-low"}, "voice", VOICE),
        ({"voice": f"{VOICE}/nobody"}, "voice", "no speaker 'nobody'"),
        ({"voice": "alloy"}, "voice", VOICE),
        ({"voice": VOICE, "instructions": "Whisper."}, "instructions", "no instructions"),
        ({"voice": VOICE, "input": "... - ?"}, "input", "no text to speak"),
    ],
)
async def test_what_piper_cannot_do_is_refused_unasked(
    server: PiperServer, fields: dict[str, Any], param: str, named: str
) -> None:
    backend = piper(server, strict_voices="true")
    with pytest.raises(BackendRefused, match=named) as caught:
        await outputs_of(backend, speech(**fields))
    assert caught.value.info.param == param
    assert server.texts == []
    await backend.close()


async def test_the_first_sentence_is_heard_before_the_second_is_asked_for(server: PiperServer) -> None:
    """And a caller who has had enough ends it there."""
    backend = piper(server)
    output = backend.run(speech(stream=True, input=TEXT, response_format="pcm"))
    async for piece in output:
        if isinstance(piece, Chunk) and piece.data:
            break
    assert len(server.texts) == 1
    await output.aclose()
    assert (len(server.texts), server.working) == (1, 0)
    await backend.close()


async def test_giving_up_keeps_the_slot_until_the_sentence_is_spoken(server: PiperServer) -> None:
    """Piper cannot be stopped."""
    backend = piper(server)
    long = asyncio.create_task(outputs_of(backend, speech(input="word " * 60, response_format="wav")))

    async def working() -> bool:
        return server.working == 1

    await eventually(working, 30)
    long.cancel()
    await asyncio.wait([long])
    assert long.cancelled()
    assert server.working == 0
    assert len(server.texts) == 1
    await backend.close()


async def test_all_sentences_are_said_with_the_silence_that_is_wanted(server: PiperServer) -> None:
    backend = piper(server)
    short, _, _ = await outputs_of(backend, speech(input=TEXT, response_format="wav"))
    await backend.close()
    backend = piper(server, sentence_silence="2")
    long, _, _ = await outputs_of(backend, speech(input=TEXT, response_format="wav"))
    await backend.close()
    assert seconds(long) - seconds(short) == pytest.approx(2, abs=0.7)
    assert [json.loads(text)["text"] for text in server.texts][:2] == [
        "This is the first sentence.",
        "Here is another one.",
    ]


async def test_options_that_make_no_sense_are_errors() -> None:
    for options in ({"voice": "x"}, {"voices": "alloy:"}, {"strict_voices": "maybe"}, {"sentence_silence": "long"}):
        with pytest.raises(ValueError, match=r"option|float"):
            PiperBackend(BackendConfig(url="http://127.0.0.1:1", options=options))


async def test_a_model_or_voice_that_was_configured_must_be_there(server: PiperServer) -> None:
    backend = PiperBackend(BackendConfig(url=server.url, models=("xtts",)))
    with pytest.raises(BackendError, match="lacks xtts; it has piper"):
        await backend.discover()
    backend = piper(server, voices="nova:en_GB-alba-medium")
    with pytest.raises(BackendError, match="lacks the voice en_GB-alba-medium"):
        await backend.discover()


class Double:
    """What a real Piper does only with voices that are not here, or when it is ill."""

    def __init__(self, answers: dict[bytes, tuple[int, bytes]]) -> None:
        self._answers = answers
        self.bodies: list[Any] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split(b" ")[1]
        if head.startswith(b"POST"):
            size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            self.bodies.append(json.loads(await reader.readexactly(size)))
        status, body = self._answers.get(path, (404, b"<html>Not Found</html>"))
        writer.write(b"HTTP/1.1 %d X\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))
        writer.close()


async def test_a_speaker_of_a_voice_is_asked_for_by_number_and_500_is_a_failure() -> None:
    """An older server without `/info` is one too."""
    config = {"audio": {"sample_rate": 16_000}, "inference": {"length_scale": 1.5}, "speaker_id_map": {"amy": 7}}
    double = Double({b"/voices": (200, json.dumps({"many": config}).encode()), b"/synthesize": (500, b"<html>")})
    async with await asyncio.start_server(double.serve, "127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        backend = PiperBackend(BackendConfig(url=url))
        await backend.health()
        with pytest.raises(BackendError, match="500") as caught:
            await outputs_of(backend, speech(voice="many/amy", speed=3, response_format="wav"))
        assert caught.value.transient
        assert double.bodies == [{"text": "Hello.", "voice": "many", "speaker_id": 7, "length_scale": 0.5}]
        await backend.close()


async def test_a_server_that_is_no_piper_is_an_error() -> None:
    for answers, error in (({}, BackendError), ({b"/voices": (503, b"")}, BackendUnavailable)):
        double = Double(answers)
        async with await asyncio.start_server(double.serve, "127.0.0.1", 0) as listener:
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            with pytest.raises(error):
                await PiperBackend(BackendConfig(url=url)).discover()
