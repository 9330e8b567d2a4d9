"""Transcripts: the parsed request, servers' answers, and OpenAI's five formats. Pure.

`parse_transcript` reads a server's answer and `render_transcript` writes the requested format. An answer without times makes no
subtitles: the error then names the possible formats.
"""

from __future__ import annotations

import html
import math
import re
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import orjson

from workers.adapter_kit.request_fields import parse_json_object
from workers.backends.base import BackendError, BackendRefused, Task, UploadedFile

JSON = dict[str, Any]
TranscriptFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]
RecognitionMode = Literal["transcribe", "translate"]

FORMATS: tuple[TranscriptFormat, ...] = get_args(TranscriptFormat)
STREAMED_FORMATS: tuple[TranscriptFormat, ...] = ("json", "text")
RECOGNITION_MODES: dict[str, RecognitionMode] = {
    "/v1/audio/transcriptions": "transcribe",
    "/v1/audio/translations": "translate",
}
GRANULARITIES = frozenset({"word", "segment"})
TEXT_CONTENT_TYPE = "text/plain; charset=utf-8"
"""The content type of text, srt and vtt alike, as with OpenAI, whose SDKs return them as strings."""
READ_FIELDS = frozenset(
    {"model", "language", "prompt", "response_format", "temperature", "stream", "timestamp_granularities"}
)
NEXUS_ONLY_FIELDS = frozenset({"service_tier"})
"""Fields that Nexus itself reads, such as the lane; a server must not get them."""
TIMES = re.compile(r"((?:\d+:)?\d+:\d+[.,]\d+)\s+-->\s+((?:\d+:)?\d+:\d+[.,]\d+)")


# Transcripts


@dataclass(frozen=True, slots=True)
class SpeechWord:
    """One word with its times, in seconds from the beginning."""

    word: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class SpeechSegment:
    """A phrase with its times, in seconds from the beginning. The other fields are Whisper's figures, where known."""

    text: str
    start: float
    end: float
    seek: int = 0
    tokens: tuple[int, ...] = ()
    temperature: float = 0.0
    avg_logprob: float = 0.0
    compression_ratio: float = 0.0
    no_speech_prob: float = 0.0


@dataclass(frozen=True, slots=True)
class SpeechTranscript:
    """The text of audio. A field is None where the server did not give it."""

    text: str
    language: str | None = None
    duration: float | None = None
    """Seconds of audio."""
    segments: tuple[SpeechSegment, ...] | None = None
    words: tuple[SpeechWord, ...] | None = None
    usage: JSON | None = None
    """The server's own count, in OpenAI's form."""

    @property
    def seconds(self) -> float | None:
        """The length of the audio; where it is unknown, the end of the last segment."""
        if self.duration is None and self.segments:
            return max(segment.end for segment in self.segments)
        return self.duration


# Requests


@dataclass(frozen=True, slots=True)
class RecognitionRequest:
    """A caller's request for a transcription or a translation."""

    mode: RecognitionMode
    file: UploadedFile
    model: str
    stream: bool = False
    response_format: TranscriptFormat = "json"
    language: str | None = None
    prompt: str | None = None
    temperature: float | None = None
    granularities: frozenset[str] = frozenset({"segment"})
    extra: JSON = field(default_factory=dict)
    """Fields that OpenAI, or some servers, do not have."""

    @classmethod
    def from_task(cls, task: Task) -> RecognitionRequest:
        """Parse a task. Raises BackendRefused for another endpoint, a wrong field, or an impossible combination of fields."""
        mode = RECOGNITION_MODES.get(task.endpoint)
        if mode is None:
            raise BackendRefused(f"this backend does not serve {task.endpoint}")
        body = parse_json_object(task.body)
        file = next((file for file in task.files if file.field == "file"), None)
        if file is None:
            raise BackendRefused("the form contains no file; send the audio in the field 'file'", param="file")
        wanted = _parse_format(body.get("response_format"))
        if task.stream and wanted not in STREAMED_FORMATS:
            raise BackendRefused(
                f"a stream carries only text; response_format must be {_or_list(STREAMED_FORMATS)}",
                param="response_format",
            )
        return cls(
            mode=mode,
            file=file,
            model=task.model,
            stream=task.stream,
            response_format=wanted,
            language=_parse_text(body, "language"),
            prompt=_parse_text(body, "prompt"),
            temperature=_parse_number(body, "temperature"),
            granularities=_parse_granularities(body.get("timestamp_granularities"), wanted),
            extra={name: value for name, value in body.items() if name not in READ_FIELDS | NEXUS_ONLY_FIELDS},
        )

    @property
    def wants_word_times(self) -> bool:
        """Whether the caller wants the times of every word."""
        return "word" in self.granularities


def _parse_format(value: Any) -> TranscriptFormat:
    if value == "diarized_json":
        raise BackendRefused(
            f"this backend cannot distinguish speakers; response_format must be {_or_list(FORMATS)}",
            param="response_format",
        )
    if value is not None and value not in FORMATS:
        raise BackendRefused(f"response_format must be {_or_list(FORMATS)}", param="response_format")
    return value or "json"


def _parse_text(body: JSON, name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise BackendRefused(f"{name} must be a text", param=name)
    return value or None


def _parse_number(body: JSON, name: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BackendRefused(f"{name} must be a number", param=name)
    return float(value)


def _parse_granularities(value: Any, wanted: TranscriptFormat) -> frozenset[str]:
    if not value:
        return frozenset({"segment"})
    if not isinstance(value, list) or not GRANULARITIES.issuperset(str(one) for one in value):
        raise BackendRefused("timestamp_granularities must be word, segment or both", param="timestamp_granularities")
    if "word" in value and wanted != "verbose_json":
        raise BackendRefused(
            "only verbose_json holds the times of words; send response_format=verbose_json",
            param="timestamp_granularities",
        )
    return frozenset(value)


def _or_list(names: Collection[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


# Output formats


def render_transcript(
    transcript: SpeechTranscript,
    response_format: TranscriptFormat,
    *,
    task: RecognitionMode = "transcribe",
    granularities: Collection[str] = ("segment",),
) -> tuple[bytes, str]:
    """Return the body in this format, and its content type.

    Raises BackendRefused, naming the possible formats, when the server's answer lacks what the format needs.
    """
    if response_format == "json":
        return orjson.dumps({"text": transcript.text} | _usage_field(transcript)), "application/json"
    if response_format == "text":
        return f"{transcript.text}\n".encode(), TEXT_CONTENT_TYPE
    if response_format == "verbose_json":
        return orjson.dumps(verbose_json(transcript, task, granularities)), "application/json"
    write = _write_srt if response_format == "srt" else _write_vtt
    return write(_require_segments(transcript)).encode(), TEXT_CONTENT_TYPE


def verbose_json(
    transcript: SpeechTranscript, task: RecognitionMode, granularities: Collection[str] = ("segment",)
) -> JSON:
    """Return OpenAI's verbose_json. Raises BackendRefused when the server gave no times."""
    segments = _require_segments(transcript)
    body: JSON = {
        "task": task,
        "language": "english" if task == "translate" else transcript.language or "",
        "duration": transcript.seconds or 0.0,
        "text": transcript.text,
    }
    if "segment" in granularities:
        body["segments"] = [segment_json(number, segment) for number, segment in enumerate(segments)]
    if "word" in granularities:
        if transcript.words is None and segments:
            raise BackendRefused(
                "this backend does not report the times of words; timestamp_granularities must be segment",
                param="timestamp_granularities",
            )
        body["words"] = [{"word": one.word, "start": one.start, "end": one.end} for one in transcript.words or ()]
    return body | _usage_field(transcript)


def segment_json(number: int, segment: SpeechSegment) -> JSON:
    """Return a segment with all of OpenAI's fields."""
    return {
        "id": number,
        "seek": segment.seek,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio or compression_ratio(segment.text),
        "no_speech_prob": segment.no_speech_prob,
    }


def compression_ratio(text: str) -> float:
    """Return how much zlib shortens a text: Whisper's sign of a model that repeats itself."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0


def delta_frame(text: str) -> bytes:
    """Return an event of a stream that adds text."""
    return _event_frame({"type": "transcript.text.delta", "delta": text})


def done_frame(transcript: SpeechTranscript) -> bytes:
    """Return a stream's last event. Its usage counts tokens or is missing: OpenAI has no other kind there."""
    usage = transcript.usage or {}
    counted = {"usage": usage} if usage.get("type") == "tokens" else {}
    return _event_frame({"type": "transcript.text.done", "text": transcript.text} | counted)


def text_deltas(transcript: SpeechTranscript) -> Iterator[str]:
    """Yield the text of a finished transcript in pieces."""
    joined = "".join(segment.text for segment in transcript.segments or ())
    if joined.strip() != transcript.text or not transcript.segments:
        yield transcript.text
        return
    texts = [segment.text for segment in transcript.segments]
    texts[0] = texts[0].lstrip()
    texts[-1] = texts[-1].rstrip()
    yield from texts


def _event_frame(event: JSON) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(event)


def _usage_field(transcript: SpeechTranscript) -> JSON:
    if transcript.usage is not None:
        return {"usage": transcript.usage}
    if transcript.seconds is None:
        return {}
    return {"usage": {"type": "duration", "seconds": math.ceil(transcript.seconds)}}


def _require_segments(transcript: SpeechTranscript) -> tuple[SpeechSegment, ...]:
    if transcript.segments is None:
        raise BackendRefused(
            "this backend does not report times; response_format must be json or text",
            param="response_format",
        )
    return transcript.segments


def _write_srt(segments: tuple[SpeechSegment, ...]) -> str:
    cues = (
        f"{number}\n{_format_time(one.start, ',')} --> {_format_time(one.end, ',')}\n{_one_line(one.text)}\n\n"
        for number, one in enumerate(segments, 1)
    )
    return "".join(cues)


def _write_vtt(segments: tuple[SpeechSegment, ...]) -> str:
    cues = (
        f"{_format_time(one.start, '.')} --> {_format_time(one.end, '.')}\n{html.escape(_one_line(one.text), quote=False)}\n\n"
        for one in segments
    )
    return "".join(("WEBVTT\n\n", *cues))


def _one_line(text: str) -> str:
    """Return a text on one line, without an arrow that would begin another cue."""
    return " ".join(text.split()).replace("-->", "->")


def _format_time(seconds: float, point: str) -> str:
    rest = round(max(0.0, seconds) * 1000)
    hours, rest = divmod(rest, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    whole, thousandths = divmod(rest, 1000)
    return f"{hours:02}:{minutes:02}:{whole:02}{point}{thousandths:03}"


# Servers' answers


def parse_transcript(body: bytes, response_format: TranscriptFormat) -> SpeechTranscript:
    """Parse a server's answer in this format. Raises BackendError when it holds no transcript."""
    if response_format in ("json", "verbose_json"):
        return parse_transcript_json(_parse_object(body))
    text = body.decode("utf-8", "replace").replace("\r\n", "\n")
    if response_format == "text":
        return SpeechTranscript(" ".join(text.split("\n")).strip())
    segments = tuple(_parse_cues(text, escaped=response_format == "vtt"))
    if not segments and text.removeprefix("\ufeff").removeprefix("WEBVTT").strip():
        raise BackendError(f"the backend's answer is not {response_format}")
    return SpeechTranscript(" ".join(one.text.strip() for one in segments), segments=segments)


def parse_transcript_json(body: JSON) -> SpeechTranscript:
    """Parse json or verbose_json, whose fields may be missing. Raises BackendError when it has no text."""
    text = body.get("text")
    if not isinstance(text, str):
        raise BackendError("the backend's answer has no text")
    try:
        segments = body.get("segments")
        usage = body.get("usage")
        language = body.get("language")
        return SpeechTranscript(
            text=text.strip(),
            language=str(language) if language else None,
            duration=_parse_seconds(body.get("duration")),
            segments=tuple(_parse_segment(one) for one in segments) if isinstance(segments, list) else None,
            words=_parse_words(body),
            usage=usage if isinstance(usage, dict) and usage.get("type") else None,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BackendError(f"the backend's transcript is not in OpenAI's form: {error!r}") from error


def _parse_object(body: bytes) -> JSON:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BackendError("the backend's answer is not JSON") from error
    if not isinstance(value, dict):
        raise BackendError("the backend's answer is not a JSON object")
    return value


def _parse_segment(value: JSON) -> SpeechSegment:
    return SpeechSegment(
        text=str(value.get("text") or ""),
        start=float(value["start"]),
        end=float(value["end"]),
        seek=int(value.get("seek") or 0),
        tokens=tuple(int(token) for token in value.get("tokens") or ()),
        temperature=float(value.get("temperature") or 0.0),
        avg_logprob=float(value.get("avg_logprob") or 0.0),
        compression_ratio=float(value.get("compression_ratio") or 0.0),
        no_speech_prob=float(value.get("no_speech_prob") or 0.0),
    )


def _parse_words(body: JSON) -> tuple[SpeechWord, ...] | None:
    """Return the words, from the top of the answer (OpenAI) or from its segments (whisper.cpp, faster-whisper)."""
    words = body.get("words")
    if not words:
        lists = [one.get("words") for one in body.get("segments") or ()]
        if not any(lists):
            return () if isinstance(words, list) else None
        words = [word for one in lists for word in one or ()]
    return tuple(SpeechWord(str(one["word"]).strip(), float(one["start"]), float(one["end"])) for one in words)


def _parse_seconds(value: Any) -> float | None:
    """Return a number of seconds, which OpenAI's own server may send as a text."""
    return None if value is None else float(value)


def _parse_cues(text: str, *, escaped: bool) -> Iterator[SpeechSegment]:
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip().split("\n")
        for at, line in enumerate(lines):
            if times := TIMES.search(line):
                cue_text = " ".join(lines[at + 1 :]).strip()
                start, end = (_parse_time(one) for one in times.groups())
                yield SpeechSegment(html.unescape(cue_text) if escaped else cue_text, start, end)
                break


def _parse_time(text: str) -> float:
    seconds = 0.0
    for part in text.replace(",", ".").split(":"):
        seconds = 60 * seconds + float(part)
    return seconds
