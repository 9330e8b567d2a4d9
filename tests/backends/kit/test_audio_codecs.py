"""Conversion of audio, with the real codecs."""

from __future__ import annotations

import io
import math
import struct
import sys
import tracemalloc
import wave
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from schemas.installation import install_hint
from workers.adapter_kit.audio.codecs import (
    MAX_BUFFERED_BYTES,
    UNKNOWN_SIZE,
    AudioEncoder,
    AudioFormat,
    DecodedAudio,
    WavReader,
    decode_audio,
    has_pyav,
    require_codec,
    wav_header,
)
from workers.backends.base import BackendError, BackendRefused

av = pytest.importorskip("av")

RATE = 22_050
PIPER = AudioFormat("pcm", RATE, 1)
MAGIC = {
    "mp3": (b"\xff\xf3", b"\xff\xf2"),
    "opus": (b"OggS",),
    "aac": (b"\xff\xf1",),
    "flac": (b"fLaC",),
    "wav": (b"RIFF",),
}


def tone(seconds: float, rate: int = RATE, channels: int = 1, hertz: float = 440) -> bytes:
    """Return a sine wave, the same in every channel."""
    period = [int(8000 * math.sin(2 * math.pi * hertz * n / rate)) for n in range(int(seconds * rate))]
    return b"".join(struct.pack("<h", sample) * channels for sample in period)


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


def encoded(codec: str, data: bytes, source: AudioFormat = PIPER, size: int = 4001, **options: object) -> list[bytes]:
    """Encode a sound that is cut anywhere, even within a sample; return every piece in order."""
    encoder = AudioEncoder(codec, source, **options)  # type: ignore[arg-type]
    out = [encoder.encode(piece) for piece in pieces(data, size)]
    out += encoder.finish()
    encoder.close()
    return out


def crossings(samples: bytes) -> int:
    """Count how often the wave rises from well below zero to well above it: hertz times seconds."""
    loud = [value > 0 for value in struct.unpack(f"<{len(samples) // 2}h", samples) if abs(value) > 1000]
    return sum(b and not a for a, b in pairwise(loud))


@pytest.mark.parametrize("codec", ["mp3", "opus", "aac", "flac", "wav"])
async def test_each_format_is_what_it_says_and_lasts_as_long(codec: str) -> None:
    """Another decoder hears the same tone for the same time."""
    data = b"".join(encoded(codec, tone(2)))
    assert data.startswith(MAGIC[codec])
    heard = await decode_audio(data)
    assert heard.seconds == pytest.approx(2, abs=0.15)
    assert crossings(heard.samples) == pytest.approx(880, rel=0.03)


@pytest.mark.parametrize("codec", ["mp3", "opus", "aac", "flac", "wav", "pcm"])
def test_the_first_bytes_come_long_before_the_last_samples(codec: str) -> None:
    """After half a second of audio the first bytes are available."""
    encoder = AudioEncoder(codec, PIPER)
    early = b"".join(encoder.encode(piece) for piece in pieces(tone(0.5), 4410))
    assert len(early) > 1000
    encoder.close()


@pytest.mark.parametrize("codec", ["mp3", "opus", "aac", "flac"])
async def test_two_channels_stay_two(codec: str) -> None:
    data = b"".join(encoded(codec, tone(1, 44_100, 2), AudioFormat("pcm", 44_100, 2)))
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.audio[0].codec_context.channels == 2


@pytest.mark.parametrize("codec", ["mp3", "opus", "aac", "flac"])
@pytest.mark.parametrize("rate", [6_000, 20_000, 96_000])
async def test_a_rate_that_a_codec_lacks_is_raised_or_lowered(codec: str, rate: int) -> None:
    heard = await decode_audio(b"".join(encoded(codec, tone(1, rate), AudioFormat("pcm", rate, 1))))
    assert heard.seconds == pytest.approx(1, abs=0.2)
    assert crossings(heard.samples) == pytest.approx(440, rel=0.06)


def test_pcm_is_what_openai_sends_whatever_the_source() -> None:
    """The samples have 24 kHz, one channel and 16 bits."""
    data = b"".join(encoded("pcm", tone(1, 44_100, 2), AudioFormat("pcm", 44_100, 2)))
    assert len(data) / 2 == pytest.approx(24_000, rel=0.01)
    assert crossings(data) == pytest.approx(440, rel=0.02)


def test_a_wav_of_unknown_length_says_so_and_a_whole_one_is_exact() -> None:
    data = tone(1)
    streamed = b"".join(encoded("wav", data))
    assert streamed == wav_header(RATE, 1) + data
    assert struct.unpack_from("<I", streamed, 4) == struct.unpack_from("<I", streamed, 40) == (UNKNOWN_SIZE,)
    whole = b"".join(encoded("wav", data, whole=True))
    with wave.open(io.BytesIO(whole)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (RATE, 1, RATE)
        assert file.readframes(RATE) == data


def test_a_whole_flac_says_how_long_it_is() -> None:
    data = b"".join(encoded("flac", tone(1), whole=True))
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.audio[0].duration == RATE


@pytest.mark.parametrize("speed", [0.25, 0.5, 1.5, 4.0])
@pytest.mark.parametrize("codec", ["wav", "mp3", "pcm"])
async def test_another_speed_changes_the_time_but_not_the_pitch(codec: str, speed: float) -> None:
    data = b"".join(encoded(codec, tone(2), speed=speed))
    heard = DecodedAudio(data, 24_000, 1, len(data) / 48_000) if codec == "pcm" else await decode_audio(data)
    assert heard.seconds == pytest.approx(2 / speed, rel=0.12, abs=0.1)
    assert crossings(heard.samples) == pytest.approx(440 * 2 / speed, rel=0.06)


@pytest.mark.parametrize("codec", ["wav", "mp3", "opus"])
def test_a_long_sound_is_never_whole_in_memory(codec: str) -> None:
    """Ten minutes are returned as they are made; a complete WAV waits on disk."""
    second = tone(1)
    encoder = AudioEncoder(codec, PIPER, whole=codec == "wav")
    tracemalloc.start()
    for _ in range(600):
        encoder.encode(second)
    size = sum(len(piece) for piece in encoder.finish())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    encoder.close()
    assert size == 44 + 600 * len(second) or codec != "wav"
    assert peak < MAX_BUFFERED_BYTES + 2 * 1024 * 1024


def test_an_encoder_given_up_midway_lets_go() -> None:
    for codec in ("mp3", "flac", "wav"):
        encoder = AudioEncoder(codec, PIPER, whole=True, speed=2)
        encoder.encode(tone(0.2))
        encoder.close()


def test_a_wav_in_pieces_gives_its_samples() -> None:
    """Other chunks around the samples, any cuts, and a missing length make no difference."""
    samples = tone(0.05)
    head = wav_header(16_000, 2, len(samples))
    extra = head[:36] + b"LIST" + struct.pack("<I", 3) + b"abc\0" + head[36:]
    for data in (head + samples, wav_header(16_000, 2) + samples, extra + samples + b"id3 trailing"):
        for size in (1, 7, len(data)):
            reader = WavReader()
            assert b"".join(reader.feed(piece) for piece in pieces(data, size)) == samples
            assert reader.format == AudioFormat("pcm", 16_000, 2)


@pytest.mark.parametrize(
    "data", [b"<html>no sound</html>", b"RIFFxxxxAVI LIST", wav_header(8000, 1)[:34] + b"\x08\0data\x08\0\0\0"]
)
def test_what_is_no_16_bit_wav_is_an_error(data: bytes) -> None:
    with pytest.raises(BackendError, match="WAV"):
        WavReader().feed(data)


async def test_uploads_become_mono_samples_at_16_khz() -> None:
    """Two channels at another rate become a WAV that other programs can read."""
    data = wav_header(44_100, 2, 4 * 44_100) + tone(1, 44_100, 2)
    sound = await decode_audio(data)
    assert (sound.rate, sound.channels) == (16_000, 1)
    assert sound.seconds == pytest.approx(1, abs=0.01)
    with wave.open(io.BytesIO(sound.wav())) as file:
        assert (file.getframerate(), file.getnchannels()) == (16_000, 1)
        assert file.getnframes() == len(sound.samples) // 2


async def test_one_torn_frame_does_not_spoil_a_file() -> None:
    data = bytearray(b"".join(encoded("mp3", tone(5))))
    data[20_000:20_060] = b"\0" * 60
    assert (await decode_audio(bytes(data))).seconds == pytest.approx(5, abs=0.5)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no sound at all, but words and words and words",
        b"RIFF\xff\xff\xff\xffWAVE",
        b"OggS" + b"\xa5" * 5000,
        b"fLaC" + b"\0" * 5000,
    ],
)
async def test_what_is_no_sound_is_refused(data: bytes) -> None:
    with pytest.raises(BackendRefused) as caught:
        await decode_audio(data)
    assert caught.value.info.status == 400
    assert caught.value.info.param == "file"


async def test_a_playlist_cannot_open_files_of_the_worker(tmp_path: Path) -> None:
    """FFmpeg would open the files that a playlist names."""
    target = tmp_path / "secret.wav"
    target.write_bytes(wav_header(16_000, 1, 32_000) + tone(1, 16_000))
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n"
    concat = f"ffconcat version 1.0\nfile '{target}'\n"
    for playlist in (hls, concat):
        with pytest.raises(BackendRefused):
            await decode_audio(playlist.encode())


async def test_an_upload_that_lasts_for_days_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence costs nothing to send; its samples would fill the memory."""
    monkeypatch.setattr("workers.adapter_kit.audio.codecs.DECODED_LIMIT", 64_000)
    with pytest.raises(BackendRefused, match="lasts longer"):
        await decode_audio(b"".join(encoded("flac", bytes(RATE * 2 * 10))))


async def test_without_the_codecs_the_possible_formats_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert not has_pyav()
    assert b"".join(encoded("wav", tone(0.1))) == wav_header(RATE, 1) + tone(0.1)
    for codec, speed, source, named in (
        ("mp3", 1.0, PIPER, "only as wav, at speed 1"),
        ("wav", 2.0, PIPER, "speed"),
        ("mp3", 1.0, AudioFormat(), "wav or pcm"),
        ("wav", 1.0, AudioFormat("opus"), "only as opus"),
    ):
        with pytest.raises(BackendRefused, match=named) as caught:
            require_codec(codec, source, speed)
        assert install_hint("audio") in str(caught.value)
    for codec, source in (("pcm", AudioFormat()), ("wav", AudioFormat("wav")), ("mp3", AudioFormat("mp3"))):
        require_codec(codec, source, 1.0)
    with pytest.raises(BackendRefused, match="extra audio"):
        await decode_audio(b"")
