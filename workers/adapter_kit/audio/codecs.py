"""Conversion of audio: from a server's format into the requested one, and from uploads into samples.

Samples are 16-bit little-endian integers, channels interleaved. Encoding and decoding
need PyAV (the extra `audio`), except WAV and PCM in the server's own form.
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
"""The sample rate of OpenAI's `pcm`, which is mono."""
TRANSCRIPTION_RATE_HZ = 16_000
"""The sample rate that transcription models need; they take mono."""
SAMPLE_WIDTH = 2
UNKNOWN_SIZE = 0xFFFFFFFF
MIN_PLACEHOLDER_SIZE = 0x7FFF0000
"""From this size on, a WAV header's length is a placeholder: the server did not know it."""
HEADER_LIMIT = 64 * 1024
MAX_BUFFERED_BYTES = 4 * 1024 * 1024
"""Bytes of an unfinished complete answer that stay in memory; the rest goes to a temporary file."""
DECODED_LIMIT = 512 * 1024 * 1024
"""Bytes of decoded samples, about four and a half hours: a small upload may hold days of silence."""
BIT_RATE = 64_000
"""Bits per second of one channel: more than speech needs."""
MPEG_SAMPLE_RATES_HZ = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
SAMPLE_RATES_HZ = {
    "mp3": MPEG_SAMPLE_RATES_HZ,
    "aac": MPEG_SAMPLE_RATES_HZ,
    "opus": (8_000, 12_000, 16_000, 24_000, 48_000),
}
"""The sample rates of each codec; a rate between two is raised to the higher one."""
CONTAINERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "mp3": ("mp3", "libmp3lame", {"write_xing": "0", "id3v2_version": "0"}),
    "opus": ("ogg", "libopus", {"page_duration": "100000"}),
    "aac": ("adts", "aac", {}),
    "flac": ("flac", "flac", {}),
}
"""Container, codec, and options that release the first bytes at once."""
EXACT_LENGTH_FORMATS = frozenset({"wav", "flac"})
"""Formats that give their length in the header: a complete answer is written with the true one."""
READABLE_CONTAINERS = "aac,aiff,amr,au,caf,flac,matroska,webm,mov,mp4,m4a,mp3,mpeg,mpegts,ogg,w64,wav"
"""Containers that may be decoded. Playlists are excluded: they make their reader open files and URLs."""
MAX_DAMAGED_SHARE = 0.1
"""The share of damaged packets from which a file is refused: single damaged frames are accepted."""


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """The format of audio bytes."""

    codec: str = "pcm"
    """`pcm` for raw samples, else `wav`, `mp3`, `opus`, `aac`, `flac`, whose headers hold rate and channels."""
    rate: int = PCM_RATE_HZ
    channels: int = 1


@dataclass(frozen=True, slots=True)
class DecodedAudio:
    """Decoded audio."""

    samples: bytes
    rate: int
    channels: int
    seconds: float

    def wav(self) -> bytes:
        """Return a WAV file of it."""
        return wav_header(self.rate, self.channels, len(self.samples)) + self.samples


def has_pyav() -> bool:
    """Return whether PyAV is installed."""
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


def require_codec(codec: str, source: AudioFormat, speed: float) -> None:
    """Raise BackendRefused when `codec`, or a change of speed, needs PyAV and it is not installed."""
    if has_pyav():
        return
    possible = ["wav"] if source.codec in ("wav", "pcm") else [source.codec]
    if source.codec == "pcm" and _is_openai_pcm(source):
        possible.append("pcm")
    if codec in possible and speed == 1:
        return
    raise BackendRefused(
        f"this worker can return its backend's audio only as {' or '.join(possible)}, at speed 1; "
        f"its operator can add other formats and speeds with: {install_hint('audio')}",
        param="speed" if codec in possible else "response_format",
    )


def wav_header(rate: int, channels: int, size: int | None = None) -> bytes:
    """Return the 44 bytes before the samples; `size` is the samples' size in bytes, None where it is not known yet."""
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
    """Reads a WAV file in pieces, and returns its samples. `format` is set when the first samples are returned."""

    def __init__(self) -> None:
        self.format: AudioFormat | None = None
        self._head = bytearray()
        self._in_samples = False
        self._samples_left = 0

    def feed(self, data: bytes) -> bytes:
        """Return the samples in `data`. Raises BackendError where it is not a WAV of 16-bit samples."""
        if self._in_samples:
            return self._take(data)
        self._head += data
        start = self._parse_header()
        if start is None:
            if len(self._head) > HEADER_LIMIT:
                raise BackendError("the backend's WAV has no samples")
            return b""
        self._in_samples = True
        rest = bytes(self._head[start:])
        self._head.clear()
        return self._take(rest)

    def _take(self, data: bytes) -> bytes:
        taken = data[: self._samples_left]
        self._samples_left -= len(taken)
        return taken

    def _parse_header(self) -> int | None:
        """Return where the samples begin, once the whole header has arrived; None before that."""
        head = self._head
        if head[:4] != b"RIFF"[: len(head)] or head[8:12] != b"WAVE"[: max(0, len(head) - 8)]:
            raise BackendError("the backend's audio is not a WAV file")
        at = 12
        while len(head) >= at + 8:
            name, size = struct.unpack_from("<4sI", head, at)
            if name == b"data":
                if self.format is None:
                    raise BackendError("the backend's WAV does not give the format of its samples")
                self._samples_left = UNKNOWN_SIZE * SAMPLE_WIDTH if size >= MIN_PLACEHOLDER_SIZE or not size else size
                return at + 8
            if name == b"fmt " and len(head) >= at + 24:
                self.format = _wav_format(bytes(head[at + 8 : at + 24]))
            at += 8 + size + size % 2
        return None


def _wav_format(chunk: bytes) -> AudioFormat:
    kind, channels, rate, _, _, bits = struct.unpack("<HHIIHH", chunk)
    if kind not in (1, 0xFFFE) or bits != SAMPLE_WIDTH * 8 or channels not in (1, 2) or not rate:
        raise BackendError(
            f"the backend's WAV has samples of {bits} bits in {channels} channels; only 16 bits in one or two channels can be read"
        )
    return AudioFormat("pcm", rate, channels)


class AudioEncoder:
    """Encodes samples in pieces, and returns the first bytes as soon as the codec can.

    `whole`: the pieces make one complete answer, so formats that give their length in the header are returned only at the
    end, with the true one. `speed` plays faster or slower at the same pitch. At most a few frames are in memory.
    Raises BackendRefused for a conversion that needs PyAV where it is not installed.
    """

    def __init__(self, codec: str, source: AudioFormat, *, whole: bool = False, speed: float = 1.0) -> None:
        self._block = source.channels * SAMPLE_WIDTH
        self._rest = b""
        self.samples = 0
        """How many samples were encoded, of each channel."""
        buffer = SpooledTemporaryFile(MAX_BUFFERED_BYTES) if whole and codec in EXACT_LENGTH_FORMATS else None  # noqa: SIM115 - closed by close()
        require_codec(codec, source, speed)
        self.is_passthrough = speed == 1 and (codec == "wav" or (codec == "pcm" and _is_openai_pcm(source)))
        """The samples are passed on without encoding, which costs next to nothing."""
        self._codec: _PcmEncoder | _ContainerEncoder
        if codec in CONTAINERS:
            self._codec = _ContainerEncoder(codec, source, speed, buffer)
        else:
            self._codec = _PcmEncoder(codec, source, speed, buffer)

    def encode(self, data: bytes) -> bytes:
        """Encode samples; return the bytes that are ready, often none."""
        data = self._rest + data
        end = len(data) - len(data) % self._block
        self._rest = data[end:]
        if not end:
            return b""
        self.samples += end // self._block
        return self._codec.encode(data[:end])

    def finish(self) -> Iterator[bytes]:
        """Yield the remaining bytes."""
        return self._codec.finish()

    def close(self) -> None:
        """Release everything, finished or not. No other call may be running."""
        self._codec.close()


class _FrameSource:
    """Makes PyAV frames of samples, at the requested speed."""

    def __init__(self, source: AudioFormat, speed: float) -> None:
        self._source = source
        self._layout = "mono" if source.channels == 1 else "stereo"
        self._position = 0
        self._graph = self._tempo_graph(speed) if speed != 1 else None

    def _tempo_graph(self, speed: float) -> Any:
        from av.filter import Graph

        graph = Graph()
        nodes = [graph.add_abuffer(format="s16", sample_rate=self._source.rate, layout=self._layout)]
        # One filter goes no lower than 0.5, and skips samples above 2 instead of blending them.
        steps = [speed**0.5] * 2 if not 0.5 <= speed <= 2 else [speed]
        nodes += [graph.add("atempo", f"{step:.6f}") for step in steps]
        nodes.append(graph.add("abuffersink"))
        graph.link_nodes(*nodes).configure()
        return graph

    def make_frames(self, data: bytes) -> list[Any]:
        from av import AudioFrame

        count = len(data) // (self._source.channels * SAMPLE_WIDTH)
        frame = AudioFrame(format="s16", layout=self._layout, samples=count)
        frame.sample_rate = self._source.rate
        frame.planes[0].update(data)
        frame.pts = self._position
        self._position += count
        return [frame] if self._graph is None else self._filter(frame)

    def last_frames(self) -> list[Any]:
        return [] if self._graph is None else self._filter(None)

    def _filter(self, frame: Any) -> list[Any]:
        from av.error import BlockingIOError as NothingYet
        from av.error import EOFError as NothingMore

        assert self._graph is not None
        self._graph.push(frame)
        frames = []
        with contextlib.suppress(NothingYet, NothingMore):
            while True:
                frames.append(self._graph.pull())
        for done in frames:
            done.pts = None  # the encoder counts them itself
        return frames


class _PcmEncoder:
    """Writes raw samples, after a header for WAV."""

    def __init__(self, codec: str, source: AudioFormat, speed: float, buffer: Any) -> None:
        self._rate, self._channels = (source.rate, source.channels) if codec == "wav" else (PCM_RATE_HZ, 1)
        self._header = codec == "wav"
        self._buffer = buffer
        same = (source.rate, source.channels) == (self._rate, self._channels)
        self._frames = None if same and speed == 1 else _FrameSource(source, speed)
        self._resampler: Any = None if self._frames is None else _resampler(self._rate, self._channels)

    def encode(self, data: bytes) -> bytes:
        if self._frames is not None:
            data = self._resample(self._frames.make_frames(data))
        return self._write(data)

    def finish(self) -> Iterator[bytes]:
        if self._frames is not None:
            yield self._write(self._resample([*self._frames.last_frames(), None]))
        if self._buffer is not None:
            yield wav_header(self._rate, self._channels, self._buffer.tell())
            yield from _read_buffer(self._buffer)

    def close(self) -> None:
        if self._buffer is not None:
            self._buffer.close()

    def _write(self, data: bytes) -> bytes:
        if self._buffer is not None:
            self._buffer.write(data)
            return b""
        if not self._header:
            return data
        self._header = False
        return wav_header(self._rate, self._channels) + data

    def _resample(self, frames: list[Any]) -> bytes:
        return b"".join(_frame_samples(done) for frame in frames for done in self._resampler.resample(frame))


class _ContainerEncoder:
    """Encodes with a codec, into its container."""

    def __init__(self, codec: str, source: AudioFormat, speed: float, buffer: Any) -> None:
        import av

        container, name, options = CONTAINERS[codec]
        self._frames = _FrameSource(source, speed)
        self._buffer = buffer
        self._sink = _ByteSink()
        options = {"flush_packets": "1"} | options
        self._container: Any = av.open(buffer or self._sink, "w", format=container, options=options)
        rate = next((rate for rate in SAMPLE_RATES_HZ.get(codec, (source.rate,)) if rate >= source.rate), 48_000)
        layout = "mono" if source.channels == 1 else "stereo"
        bit_rate = 0 if codec == "flac" else BIT_RATE * source.channels
        self._stream: Any = self._container.add_stream(name, rate=rate, layout=layout, bit_rate=bit_rate)
        self._closed = False

    def encode(self, data: bytes) -> bytes:
        return self._encode_frames(self._frames.make_frames(data))

    def finish(self) -> Iterator[bytes]:
        yield self._encode_frames([*self._frames.last_frames(), None])
        self._close_container()
        yield self._sink.take()
        if self._buffer is not None:
            yield from _read_buffer(self._buffer)

    def close(self) -> None:
        if not self._closed:
            from av.error import FFmpegError

            with contextlib.suppress(FFmpegError):
                self._close_container()
        if self._buffer is not None:
            self._buffer.close()

    def _encode_frames(self, frames: list[Any]) -> bytes:
        for frame in frames:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        return b"" if self._buffer is not None else self._sink.take()

    def _close_container(self) -> None:
        self._closed = True
        self._container.close()


class _ByteSink:
    """Takes the bytes that PyAV writes. It cannot seek, which tells a container that it is written as a stream."""

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
    """Return the result of `work`. A cancelled call ends only after `work` has ended; `stop` may make that sooner."""
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        if stop is not None:
            stop()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # retrieved, so that asyncio does not log it
        raise


async def decode_audio(data: bytes, *, rate: int = TRANSCRIPTION_RATE_HZ) -> DecodedAudio:
    """Decode any audio file into mono samples at `rate`. Raises BackendRefused when it is not audio, is corrupt, or lasts too long."""
    if not has_pyav():
        raise BackendRefused(
            f"this worker cannot convert audio; its operator can add that with: {install_hint('audio')}", param="file"
        )
    stopped = threading.Event()
    return await finish_before_cancel(asyncio.to_thread(_decode, data, rate, stopped), stopped.set)


def _decode(data: bytes, rate: int, stopped: threading.Event) -> DecodedAudio:
    import av

    try:
        with av.open(io.BytesIO(data), options={"format_whitelist": READABLE_CONTAINERS}) as container:
            if not container.streams.audio:
                raise BackendRefused("the file contains no audio", param="file")
            samples = _decode_packets(container, rate, stopped)
    except av.error.FFmpegError as error:
        raise BackendRefused(f"the file is not audio that can be read: {error.strerror}", param="file") from error
    return DecodedAudio(samples, rate, 1, len(samples) / (rate * SAMPLE_WIDTH))


def _decode_packets(container: Any, rate: int, stopped: threading.Event) -> bytes:
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
                out += _frame_samples(done)
        if len(out) > DECODED_LIMIT:
            hours = DECODED_LIMIT / (rate * SAMPLE_WIDTH * 3600)
            raise BackendRefused(
                f"the file lasts longer than the limit of {hours:.1f} hours; send it in parts", param="file"
            )
        if stopped.is_set():
            return b""
    for done in resampler.resample(None):
        out += _frame_samples(done)
    if not out or bad > MAX_DAMAGED_SHARE * good:
        raise BackendRefused("the file is corrupt: its audio cannot be decoded", param="file")
    return bytes(out)


def _resampler(rate: int, channels: int) -> Any:
    from av import AudioResampler

    return AudioResampler(format="s16", layout="mono" if channels == 1 else "stereo", rate=rate)


def _frame_samples(frame: Any) -> bytes:
    """Return a frame's samples; its plane may be longer."""
    size: int = frame.samples * frame.layout.nb_channels * SAMPLE_WIDTH
    return bytes(frame.planes[0])[:size]


def _read_buffer(buffer: Any) -> Iterator[bytes]:
    buffer.seek(0)
    while data := buffer.read(256 * 1024):
        yield data


def _is_openai_pcm(source: AudioFormat) -> bool:
    return (source.rate, source.channels) == (PCM_RATE_HZ, 1)
