"""Transcripts: what a caller asks for, what servers answer, and OpenAI's five formats of it. Pure.

`parse_transcript` reads what a server gave and `render_transcript` writes what the caller wants. What was not given cannot be written: an
answer without times makes no subtitles, and the refusal says what is possible then.
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
STREAMED: tuple[TranscriptFormat, ...] = ("json", "text")
RECOGNITION_MODES: dict[str, RecognitionMode] = {
    "/v1/audio/transcriptions": "transcribe",
    "/v1/audio/translations": "translate",
}
GRANULARITIES = frozenset({"word", "segment"})
TEXT_CONTENT_TYPE = "text/plain; charset=utf-8"
"""Of text, srt and vtt alike, as with OpenAI: their SDKs hand these out as strings."""
OWN_FIELDS = frozenset(
    {"model", "language", "prompt", "response_format", "temperature", "stream", "timestamp_granularities"}
)
FOR_NEXUS = frozenset({"service_tier"})
"""Chose the lane; a server behind it must not take it for its own."""
TIMES = re.compile(r"((?:\d+:)?\d+:\d+[.,]\d+)\s+-->\s+((?:\d+:)?\d+:\d+[.,]\d+)")


# What is said


@dataclass(frozen=True, slots=True)
class SpeechWord:
    """One word, and when it was said: seconds from the beginning."""

    word: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class SpeechSegment:
    """A phrase, and when it was said: seconds from the beginning. The rest is Whisper's own figures, where known."""

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
    """What was said. None: the server did not tell."""

    text: str
    language: str | None = None
    duration: float | None = None
    """Seconds of sound."""
    segments: tuple[SpeechSegment, ...] | None = None
    words: tuple[SpeechWord, ...] | None = None
    usage: JSON | None = None
    """The server's own count, in OpenAI's form."""

    @property
    def seconds(self) -> float | None:
        """How long the sound is, or at least the part of it in which something was said."""
        if self.duration is None and self.segments:
            return max(segment.end for segment in self.segments)
        return self.duration


# What is asked for


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
    """Fields that are not OpenAI's, or not of every server's."""

    @classmethod
    def from_task(cls, task: Task) -> RecognitionRequest:
        """Raises BackendRefused when the task is none, or asks for what no transcript holds."""
        mode = RECOGNITION_MODES.get(task.endpoint)
        if mode is None:
            raise BackendRefused(f"this backend does not serve {task.endpoint}")
        body = parse_json_object(task.body)
        file = next((file for file in task.files if file.field == "file"), None)
        if file is None:
            raise BackendRefused("the form holds no file; send the sound in the field 'file'", param="file")
        wanted = _format(body.get("response_format"))
        if task.stream and wanted not in STREAMED:
            raise BackendRefused(
                f"a stream is of text alone; response_format may be {_either(STREAMED)}", param="response_format"
            )
        return cls(
            mode=mode,
            file=file,
            model=task.model,
            stream=task.stream,
            response_format=wanted,
            language=_text(body, "language"),
            prompt=_text(body, "prompt"),
            temperature=_number(body, "temperature"),
            granularities=_granularities(body.get("timestamp_granularities"), wanted),
            extra={name: value for name, value in body.items() if name not in OWN_FIELDS | FOR_NEXUS},
        )

    @property
    def wants_word_times(self) -> bool:
        """Whether every word is to have its times."""
        return "word" in self.granularities


def _format(value: Any) -> TranscriptFormat:
    if value == "diarized_json":
        raise BackendRefused(
            f"this backend cannot tell speakers apart; response_format may be {_either(FORMATS)}",
            param="response_format",
        )
    if value is not None and value not in FORMATS:
        raise BackendRefused(f"response_format may be {_either(FORMATS)}", param="response_format")
    return value or "json"


def _text(body: JSON, name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise BackendRefused(f"{name} must be a text", param=name)
    return value or None


def _number(body: JSON, name: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BackendRefused(f"{name} must be a number", param=name)
    return float(value)


def _granularities(value: Any, wanted: TranscriptFormat) -> frozenset[str]:
    if not value:
        return frozenset({"segment"})
    if not isinstance(value, list) or not GRANULARITIES.issuperset(str(one) for one in value):
        raise BackendRefused("timestamp_granularities may be word and segment", param="timestamp_granularities")
    if "word" in value and wanted != "verbose_json":
        raise BackendRefused(
            "words have their times only in verbose_json; ask for that response_format",
            param="timestamp_granularities",
        )
    return frozenset(value)


def _either(names: Collection[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


# What the caller gets


def render_transcript(
    transcript: SpeechTranscript,
    response_format: TranscriptFormat,
    *,
    task: RecognitionMode = "transcribe",
    granularities: Collection[str] = ("segment",),
) -> tuple[bytes, str]:
    """The body in this format, and its content type.

    Raises BackendRefused, naming what is possible, when the server did not tell what the format must hold.
    """
    if response_format == "json":
        return orjson.dumps({"text": transcript.text} | _usage(transcript)), "application/json"
    if response_format == "text":
        return f"{transcript.text}\n".encode(), TEXT_CONTENT_TYPE
    if response_format == "verbose_json":
        return orjson.dumps(verbose_json(transcript, task, granularities)), "application/json"
    write = _srt if response_format == "srt" else _vtt
    return write(_timed(transcript)).encode(), TEXT_CONTENT_TYPE


def verbose_json(
    transcript: SpeechTranscript, task: RecognitionMode, granularities: Collection[str] = ("segment",)
) -> JSON:
    """OpenAI's verbose_json. Raises BackendRefused when the server gave no times."""
    segments = _timed(transcript)
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
                "this backend does not time words; timestamp_granularities may be segment",
                param="timestamp_granularities",
            )
        body["words"] = [{"word": one.word, "start": one.start, "end": one.end} for one in transcript.words or ()]
    return body | _usage(transcript)


def segment_json(number: int, segment: SpeechSegment) -> JSON:
    """A segment with all of OpenAI's fields."""
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
    """How far zlib shortens a text: Whisper's sign of a model that repeats itself."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0


def delta_frame(text: str) -> bytes:
    """An event of a stream: more text."""
    return _frame({"type": "transcript.text.delta", "delta": text})


def done_frame(transcript: SpeechTranscript) -> bytes:
    """A stream's last event. Its usage counts tokens or is left out: OpenAI has no other kind there."""
    usage = transcript.usage or {}
    counted = {"usage": usage} if usage.get("type") == "tokens" else {}
    return _frame({"type": "transcript.text.done", "text": transcript.text} | counted)


def text_deltas(transcript: SpeechTranscript) -> Iterator[str]:
    """A finished transcript in pieces, which joined are its text."""
    joined = "".join(segment.text for segment in transcript.segments or ())
    if joined.strip() != transcript.text or not transcript.segments:
        yield transcript.text
        return
    texts = [segment.text for segment in transcript.segments]
    texts[0] = texts[0].lstrip()
    texts[-1] = texts[-1].rstrip()
    yield from texts


def _frame(event: JSON) -> bytes:
    return b"data: %b\n\n" % orjson.dumps(event)


def _usage(transcript: SpeechTranscript) -> JSON:
    if transcript.usage is not None:
        return {"usage": transcript.usage}
    if transcript.seconds is None:
        return {}
    return {"usage": {"type": "duration", "seconds": math.ceil(transcript.seconds)}}


def _timed(transcript: SpeechTranscript) -> tuple[SpeechSegment, ...]:
    if transcript.segments is None:
        raise BackendRefused(
            "this backend does not say when what was said; response_format may be json or text",
            param="response_format",
        )
    return transcript.segments


def _srt(segments: tuple[SpeechSegment, ...]) -> str:
    cues = (
        f"{number}\n{_clock(one.start, ',')} --> {_clock(one.end, ',')}\n{_line(one.text)}\n\n"
        for number, one in enumerate(segments, 1)
    )
    return "".join(cues)


def _vtt(segments: tuple[SpeechSegment, ...]) -> str:
    cues = (
        f"{_clock(one.start, '.')} --> {_clock(one.end, '.')}\n{html.escape(_line(one.text), quote=False)}\n\n"
        for one in segments
    )
    return "".join(("WEBVTT\n\n", *cues))


def _line(text: str) -> str:
    """On one line, and without what would begin another cue."""
    return " ".join(text.split()).replace("-->", "->")


def _clock(seconds: float, point: str) -> str:
    rest = round(max(0.0, seconds) * 1000)
    hours, rest = divmod(rest, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    whole, thousandths = divmod(rest, 1000)
    return f"{hours:02}:{minutes:02}:{whole:02}{point}{thousandths:03}"


# What servers answer


def parse_transcript(body: bytes, response_format: TranscriptFormat) -> SpeechTranscript:
    """The transcript in a server's answer of this format. Raises BackendError when it holds none."""
    if response_format in ("json", "verbose_json"):
        return parse_transcript_json(_object(body))
    text = body.decode("utf-8", "replace").replace("\r\n", "\n")
    if response_format == "text":
        return SpeechTranscript(" ".join(text.split("\n")).strip())
    segments = tuple(_cues(text, escaped=response_format == "vtt"))
    if not segments and text.removeprefix("\ufeff").removeprefix("WEBVTT").strip():
        raise BackendError(f"the backend's answer is no {response_format}")
    return SpeechTranscript(" ".join(one.text.strip() for one in segments), segments=segments)


def parse_transcript_json(body: JSON) -> SpeechTranscript:
    """From json or verbose_json, as far as the server fills it. Raises BackendError when it has no text."""
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
            duration=_seconds(body.get("duration")),
            segments=tuple(_segment(one) for one in segments) if isinstance(segments, list) else None,
            words=_words(body),
            usage=usage if isinstance(usage, dict) and usage.get("type") else None,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BackendError(f"the backend's transcript is not in OpenAI's form: {error!r}") from error


def _object(body: bytes) -> JSON:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BackendError("the backend's answer is not JSON") from error
    if not isinstance(value, dict):
        raise BackendError("the backend's answer is not a JSON object")
    return value


def _segment(value: JSON) -> SpeechSegment:
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


def _words(body: JSON) -> tuple[SpeechWord, ...] | None:
    """At the top, as OpenAI has them, or within the segments, as whisper.cpp and faster-whisper do."""
    words = body.get("words")
    if not words:
        lists = [one.get("words") for one in body.get("segments") or ()]
        if not any(lists):
            return () if isinstance(words, list) else None
        words = [word for one in lists for word in one or ()]
    return tuple(SpeechWord(str(one["word"]).strip(), float(one["start"]), float(one["end"])) for one in words)


def _seconds(value: Any) -> float | None:
    """OpenAI's own server has been seen to send this number as a text."""
    return None if value is None else float(value)


def _cues(text: str, *, escaped: bool) -> Iterator[SpeechSegment]:
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip().split("\n")
        for at, line in enumerate(lines):
            if times := TIMES.search(line):
                said = " ".join(lines[at + 1 :]).strip()
                start, end = (_from_clock(one) for one in times.groups())
                yield SpeechSegment(html.unescape(said) if escaped else said, start, end)
                break


def _from_clock(text: str) -> float:
    seconds = 0.0
    for part in text.replace(",", ".").split(":"):
        seconds = 60 * seconds + float(part)
    return seconds
