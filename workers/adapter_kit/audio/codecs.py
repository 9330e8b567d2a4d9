"""Sound from one form into another: what servers make into what callers ask for, and uploads into samples.

Samples are 16-bit little-endian integers, channels interleaved. Coding needs PyAV (the extra `audio`); WAV and
PCM as the server makes them do without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile
from typing import Any, TypeVar

from schemas.installation import install_hint
from workers.backends.base import BackendError, BackendRefused

T = TypeVar("T")

PCM_RATE_HZ = 24_000
"""Of OpenAI's `pcm`: mono."""
TRANSCRIPTION_RATE_HZ = 16_000
"""What transcription models listen to: mono."""
SAMPLE_WIDTH = 2
UNKNOWN_SIZE = 0xFFFFFFFF
NO_LENGTH = 0x7FFF0000
"""A WAV that claims so many bytes, or more, is one whose maker did not know."""
HEADER_LIMIT = 64 * 1024
MAX_BUFFERED_BYTES = 4 * 1024 * 1024
"""Bytes of an unfinished whole answer that stay in memory; the rest waits in a temporary file."""
DECODED_LIMIT = 512 * 1024 * 1024
"""Bytes of decoded samples, some four and a half hours: a small upload may hold days of silence."""
BIT_RATE = 64_000
"""Of one channel: more than speech needs."""
MPEG_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
RATES = {"mp3": MPEG_RATES, "aac": MPEG_RATES, "opus": (8_000, 12_000, 16_000, 24_000, 48_000)}
"""What a codec takes; a rate between is raised to the next."""
CONTAINERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "mp3": ("mp3", "libmp3lame", {"write_xing": "0", "id3v2_version": "0"}),
    "opus": ("ogg", "libopus", {"page_duration": "100000"}),
    "aac": ("adts", "aac", {}),
    "flac": ("flac", "flac", {}),
}
"""Format, codec and the options that let the first bytes out at once."""
EXACT = frozenset({"wav", "flac"})
"""Formats that tell their length at the beginning: a whole answer is written with it."""
READABLE = "aac,aiff,amr,au,caf,flac,matroska,webm,mov,mp4,m4a,mp3,mpeg,mpegts,ogg,w64,wav"
"""Containers that may be decoded. Playlists are not among them: they make their reader open files and URLs."""
BAD_SHARE = 0.1
"""Of a file's packets: one torn frame is no reason to refuse it."""


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """What bytes of sound are."""

    codec: str = "pcm"
    """`pcm` for bare samples, else `wav`, `mp3`, `opus`, `aac`, `flac`. All but `pcm` say the rest themselves."""
    rate: int = PCM_RATE_HZ
    channels: int = 1


@dataclass(frozen=True, slots=True)
class DecodedAudio:
    """Decoded sound."""

    samples: bytes
    rate: int
    channels: int
    seconds: float

    def wav(self) -> bytes:
        """As a WAV file."""
        return wav_header(self.rate, self.channels, len(self.samples)) + self.samples


def has_pyav() -> bool:
    """Whether PyAV is installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def require_codec(codec: str, source: AudioFormat, speed: float) -> None:
    """Raises BackendRefused when `codec`, or a change of speed, takes PyAV and it is not installed."""
    if has_pyav():
        return
    possible = ["wav"] if source.codec in ("wav", "pcm") else [source.codec]
    if source.codec == "pcm" and _is_openai_pcm(source):
        possible.append("pcm")
    if codec in possible and speed == 1:
        return
    raise BackendRefused(
        f"this worker can only make {' or '.join(possible)} at speed 1 of what its backend gives; "
        f"its operator can add the rest with: {install_hint('audio')}",
        param="speed" if codec in possible else "response_format",
    )


def wav_header(rate: int, channels: int, size: int | None = None) -> bytes:
    """The 44 bytes before the samples; `size` is theirs in bytes, None where it is not known yet."""
    riff, data = (UNKNOWN_SIZE, UNKNOWN_SIZE) if size is None else (size + 36, size)
    block = channels * SAMPLE_WIDTH
    fields = (
        b"RIFF",
        riff,
        b"WAVE",
        b"fmt ",
        16,
        1,
        channels,
        rate,
        rate * block,
        block,
        SAMPLE_WIDTH * 8,
        b"data",
        data,
    )
    return struct.pack("<4sI4s4sIHHIIHH4sI", *fields)


class WavReader:
    """Takes a WAV file in pieces, gives its samples. `format` is known as soon as samples come."""

    def __init__(self) -> None:
        self.format: AudioFormat | None = None
        self._head = bytearray()
        self._begun = False
        self._left = 0

    def feed(self, data: bytes) -> bytes:
        """The samples in `data`. Raises BackendError where it is no WAV of 16-bit samples."""
        if self._begun:
            return self._take(data)
        self._head += data
        start = self._begin()
        if start is None:
            if len(self._head) > HEADER_LIMIT:
                raise BackendError("the backend's WAV has no samples")
            return b""
        self._begun = True
        rest = bytes(self._head[start:])
        self._head.clear()
        return self._take(rest)

    def _take(self, data: bytes) -> bytes:
        taken = data[: self._left]
        self._left -= len(taken)
        return taken

    def _begin(self) -> int | None:
        """Where the samples begin, once all before them is there."""
        head = self._head
        if head[:4] != b"RIFF"[: len(head)] or head[8:12] != b"WAVE"[: max(0, len(head) - 8)]:
            raise BackendError("the backend's sound is not the WAV that it should be")
        at = 12
        while len(head) >= at + 8:
            name, size = struct.unpack_from("<4sI", head, at)
            if name == b"data":
                if self.format is None:
                    raise BackendError("the backend's WAV does not say what its samples are")
                self._left = UNKNOWN_SIZE * SAMPLE_WIDTH if size >= NO_LENGTH or not size else size
                return at + 8
            if name == b"fmt " and len(head) >= at + 24:
                self.format = _wav_format(bytes(head[at + 8 : at + 24]))
            at += 8 + size + size % 2
        return None


def _wav_format(chunk: bytes) -> AudioFormat:
    kind, channels, rate, _, _, bits = struct.unpack("<HHIIHH", chunk)
    if kind not in (1, 0xFFFE) or bits != SAMPLE_WIDTH * 8 or channels not in (1, 2) or not rate:
        raise BackendError(f"the backend's WAV has samples of {bits} bits in {channels} channels; 16 bits are possible")
    return AudioFormat("pcm", rate, channels)


class AudioEncoder:
    """Takes samples in pieces, gives a format in pieces, the first as soon as the codec can.

    `whole`: the pieces make up one complete answer, so formats that tell their length at the beginning are given only at
    the end, with the true one. `speed` plays faster or slower at the same pitch. Not more than a few frames are in memory.
    Raises BackendRefused for a conversion that needs PyAV where it is absent.
    """

    def __init__(self, codec: str, source: AudioFormat, *, whole: bool = False, speed: float = 1.0) -> None:
        self._block = source.channels * SAMPLE_WIDTH
        self._rest = b""
        self.samples = 0
        """How many came, of each channel."""
        held = SpooledTemporaryFile(MAX_BUFFERED_BYTES) if whole and codec in EXACT else None  # noqa: SIM115 - closed by close()
        require_codec(codec, source, speed)
        self.plain = speed == 1 and (codec == "wav" or (codec == "pcm" and _is_openai_pcm(source)))
        """Costs next to nothing."""
        self._stage: _PcmEncoder | _ContainerEncoder
        if codec in CONTAINERS:
            self._stage = _ContainerEncoder(codec, source, speed, held)
        else:
            self._stage = _PcmEncoder(codec, source, speed, held)

    def encode(self, data: bytes) -> bytes:
        """The bytes that can be given after these samples; often none."""
        data = self._rest + data
        end = len(data) - len(data) % self._block
        self._rest = data[end:]
        if not end:
            return b""
        self.samples += end // self._block
        return self._stage.encode(data[:end])

    def finish(self) -> Iterator[bytes]:
        """What is left to give."""
        return self._stage.finish()

    def close(self) -> None:
        """Let go of everything, finished or not. No other call is under way."""
        self._stage.close()


class _FrameSource:
    """Samples as PyAV's frames, at the speed that is wanted."""

    def __init__(self, source: AudioFormat, speed: float) -> None:
        self._source = source
        self._layout = "mono" if source.channels == 1 else "stereo"
        self._at = 0
        self._graph = self._tempo(speed) if speed != 1 else None

    def _tempo(self, speed: float) -> Any:
        from av.filter import Graph

        graph = Graph()
        nodes = [graph.add_abuffer(format="s16", sample_rate=self._source.rate, layout=self._layout)]
        # One filter goes no lower than 0.5, and skips samples above 2 instead of blending them.
        steps = [speed**0.5] * 2 if not 0.5 <= speed <= 2 else [speed]
        nodes += [graph.add("atempo", f"{step:.6f}") for step in steps]
        nodes.append(graph.add("abuffersink"))
        graph.link_nodes(*nodes).configure()
        return graph

    def of(self, data: bytes) -> list[Any]:
        from av import AudioFrame

        count = len(data) // (self._source.channels * SAMPLE_WIDTH)
        frame = AudioFrame(format="s16", layout=self._layout, samples=count)
        frame.sample_rate = self._source.rate
        frame.planes[0].update(data)
        frame.pts = self._at
        self._at += count
        return [frame] if self._graph is None else self._through(frame)

    def last(self) -> list[Any]:
        return [] if self._graph is None else self._through(None)

    def _through(self, frame: Any) -> list[Any]:
        from av.error import BlockingIOError as NothingYet
        from av.error import EOFError as NothingMore

        assert self._graph is not None
        self._graph.push(frame)
        frames = []
        with contextlib.suppress(NothingYet, NothingMore):
            while True:
                frames.append(self._graph.pull())
        for done in frames:
            done.pts = None  # the coder counts for itself
        return frames


class _PcmEncoder:
    """Samples, behind a header for WAV."""

    def __init__(self, codec: str, source: AudioFormat, speed: float, held: Any) -> None:
        self._rate, self._channels = (source.rate, source.channels) if codec == "wav" else (PCM_RATE_HZ, 1)
        self._header = codec == "wav"
        self._held = held
        same = (source.rate, source.channels) == (self._rate, self._channels)
        self._frames = None if same and speed == 1 else _FrameSource(source, speed)
        self._resampler: Any = None if self._frames is None else _resampler(self._rate, self._channels)

    def encode(self, data: bytes) -> bytes:
        if self._frames is not None:
            data = self._resampled(self._frames.of(data))
        return self._out(data)

    def finish(self) -> Iterator[bytes]:
        if self._frames is not None:
            yield self._out(self._resampled([*self._frames.last(), None]))
        if self._held is not None:
            yield wav_header(self._rate, self._channels, self._held.tell())
            yield from _read(self._held)

    def close(self) -> None:
        if self._held is not None:
            self._held.close()

    def _out(self, data: bytes) -> bytes:
        if self._held is not None:
            self._held.write(data)
            return b""
        if not self._header:
            return data
        self._header = False
        return wav_header(self._rate, self._channels) + data

    def _resampled(self, frames: list[Any]) -> bytes:
        return b"".join(_samples(done) for frame in frames for done in self._resampler.resample(frame))


class _ContainerEncoder:
    """A codec in its container."""

    def __init__(self, codec: str, source: AudioFormat, speed: float, held: Any) -> None:
        import av

        container, name, options = CONTAINERS[codec]
        self._frames = _FrameSource(source, speed)
        self._held = held
        self._sink = _ByteSink()
        options = {"flush_packets": "1"} | options
        self._container: Any = av.open(held or self._sink, "w", format=container, options=options)
        rate = next((rate for rate in RATES.get(codec, (source.rate,)) if rate >= source.rate), 48_000)
        layout = "mono" if source.channels == 1 else "stereo"
        bit_rate = 0 if codec == "flac" else BIT_RATE * source.channels
        self._stream: Any = self._container.add_stream(name, rate=rate, layout=layout, bit_rate=bit_rate)
        self._closed = False

    def encode(self, data: bytes) -> bytes:
        return self._code(self._frames.of(data))

    def finish(self) -> Iterator[bytes]:
        yield self._code([*self._frames.last(), None])
        self._end()
        yield self._sink.take()
        if self._held is not None:
            yield from _read(self._held)

    def close(self) -> None:
        if not self._closed:
            from av.error import FFmpegError

            with contextlib.suppress(FFmpegError):
                self._end()
        if self._held is not None:
            self._held.close()

    def _code(self, frames: list[Any]) -> bytes:
        for frame in frames:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        return b"" if self._held is not None else self._sink.take()

    def _end(self) -> None:
        self._closed = True
        self._container.close()


class _ByteSink:
    """What PyAV writes into. It cannot seek: that is how a container learns that it is a stream."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data


async def finish_before_cancel(work: Awaitable[T], stop: Callable[[], None] | None = None) -> T:
    """What `work` returns. When this is cancelled, it ends only after `work` has, which `stop` may hasten."""
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        if stop is not None:
            stop()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # nobody asks any more
        raise


async def decode_audio(data: bytes, *, rate: int = TRANSCRIPTION_RATE_HZ) -> DecodedAudio:
    """Any audio file as mono samples at `rate`. Raises BackendRefused when it is none, is corrupt, or lasts too long."""
    if not has_pyav():
        raise BackendRefused(
            f"this worker cannot convert audio; its operator can add that with: {install_hint('audio')}", param="file"
        )
    stopped = threading.Event()
    return await finish_before_cancel(asyncio.to_thread(_decode, data, rate, stopped), stopped.set)


def _decode(data: bytes, rate: int, stopped: threading.Event) -> DecodedAudio:
    import av

    try:
        with av.open(io.BytesIO(data), options={"format_whitelist": READABLE}) as container:
            if not container.streams.audio:
                raise BackendRefused("the file holds no sound", param="file")
            samples = _decoded(container, rate, stopped)
    except av.error.FFmpegError as error:
        raise BackendRefused(f"the file is not audio that can be read: {error.strerror}", param="file") from error
    return DecodedAudio(samples, rate, 1, len(samples) / (rate * SAMPLE_WIDTH))


def _decoded(container: Any, rate: int, stopped: threading.Event) -> bytes:
    from av.error import InvalidDataError

    resampler = _resampler(rate, 1)
    out = bytearray()
    good = bad = 0
    for packet in container.demux(container.streams.audio[0]):
        try:
            frames = packet.decode()
            good += 1
        except InvalidDataError:
            bad += 1
            continue
        for frame in frames:
            for done in resampler.resample(frame):
                out += _samples(done)
        if len(out) > DECODED_LIMIT:
            hours = DECODED_LIMIT / (rate * SAMPLE_WIDTH * 3600)
            raise BackendRefused(f"the file lasts longer than the {hours:.1f} hours that are possible", param="file")
        if stopped.is_set():
            return b""
    for done in resampler.resample(None):
        out += _samples(done)
    if not out or bad > BAD_SHARE * good:
        raise BackendRefused("the file is corrupt: its sound cannot be decoded", param="file")
    return bytes(out)


def _resampler(rate: int, channels: int) -> Any:
    from av import AudioResampler

    return AudioResampler(format="s16", layout="mono" if channels == 1 else "stereo", rate=rate)


def _samples(frame: Any) -> bytes:
    """A frame's samples; its plane may be longer."""
    size: int = frame.samples * frame.layout.nb_channels * SAMPLE_WIDTH
    return bytes(frame.planes[0])[:size]


def _read(held: Any) -> Iterator[bytes]:
    held.seek(0)
    while data := held.read(256 * 1024):
        yield data


def _is_openai_pcm(source: AudioFormat) -> bool:
    return (source.rate, source.channels) == (PCM_RATE_HZ, 1)
