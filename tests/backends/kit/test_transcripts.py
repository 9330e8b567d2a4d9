"""Transcripts: requests, servers' answers, and the caller's formats."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from openai.types.audio import (
    Transcription,
    TranscriptionTextDeltaEvent,
    TranscriptionTextDoneEvent,
    TranscriptionVerbose,
    TranslationVerbose,
)

from schemas.jobs import Capability
from schemas.openai.transcriptions import TranscriptionRequest as TranscriptionForm
from schemas.openai.transcriptions import TranslationRequest as TranslationForm
from workers.adapter_kit.audio.transcripts import (
    RecognitionRequest,
    SpeechSegment,
    SpeechTranscript,
    SpeechWord,
    TranscriptFormat,
    delta_frame,
    done_frame,
    parse_transcript,
    render_transcript,
    text_deltas,
)
from workers.backends.base import BackendError, BackendRefused, Task, UploadedFile

SPOKEN = SpeechTranscript(
    "Fish & chips. That was <all> --> of it.",
    language="english",
    duration=3661.25,
    segments=(
        SpeechSegment(" Fish & chips.", 0.0, 1.5, tokens=(1, 2), avg_logprob=-0.2),
        SpeechSegment(" That was <all> --> of it.", 3659.0015, 3661.0, seek=300),
    ),
    words=(SpeechWord("Fish", 0.0, 0.4),),
)
SRT = """1
00:00:00,000 --> 00:00:01,500
Fish & chips.

2
01:00:59,002 --> 01:01:01,000
That was <all> -> of it.

"""
VTT = """WEBVTT

00:00:00.000 --> 00:00:01.500
Fish &amp; chips.

01:00:59.002 --> 01:01:01.000
That was &lt;all&gt; -&gt; of it.

"""


async def nothing() -> AsyncIterator[bytes]:
    yield b""


FILE = UploadedFile("file", "a.wav", "audio/wav", 0, nothing)


def asked(
    endpoint: str = "/v1/audio/transcriptions",
    files: tuple[UploadedFile, ...] = (FILE,),
    *,
    stream: bool = False,
    **fields: Any,
) -> Task:
    body = json.dumps({"model": "tiny"} | fields).encode()
    return Task("job_1", "req_1", Capability.TRANSCRIPTIONS, endpoint, "tiny", "tiny", stream, body, files)


def test_plain_formats() -> None:
    assert render_transcript(SPOKEN, "text") == (f"{SPOKEN.text}\n".encode(), "text/plain; charset=utf-8")
    assert render_transcript(SPOKEN, "srt")[0].decode() == SRT
    assert render_transcript(SPOKEN, "vtt")[0].decode() == VTT


def test_json_formats_hold_all_that_the_sdk_knows() -> None:
    """Validated strictly, against the SDK's own types."""
    short = json.loads(render_transcript(SPOKEN, "json")[0])
    Transcription.model_validate(short, strict=True)
    assert short == {"text": SPOKEN.text, "usage": {"type": "duration", "seconds": 3662}}
    both = json.loads(render_transcript(SPOKEN, "verbose_json", granularities=["word", "segment"])[0])
    verbose = TranscriptionVerbose.model_validate(both)
    assert verbose.words is not None
    assert verbose.segments is not None
    assert [word.word for word in verbose.words] == ["Fish"]
    assert [segment.id for segment in verbose.segments] == [0, 1]
    assert (both["task"], both["language"], both["duration"]) == ("transcribe", "english", 3661.25)
    assert all(segment["compression_ratio"] > 0 for segment in both["segments"])


def test_granularities_choose_what_is_timed() -> None:
    only = json.loads(render_transcript(SPOKEN, "verbose_json", granularities=["word"])[0])
    assert "segments" not in only
    assert only["words"] == [{"word": "Fish", "start": 0.0, "end": 0.4}]
    assert "words" not in json.loads(render_transcript(SPOKEN, "verbose_json")[0])


def test_a_translation_is_english() -> None:
    transcript = SpeechTranscript("hello", language="german", duration=1.0, segments=(SpeechSegment(" hello", 0, 1),))
    body = json.loads(render_transcript(transcript, "verbose_json", task="translate")[0])
    TranslationVerbose.model_validate(body)
    assert (body["task"], body["language"]) == ("translate", "english")


@pytest.mark.parametrize("response_format", ["srt", "vtt", "verbose_json"])
def test_times_that_nobody_gave_are_not_made_up(response_format: TranscriptFormat) -> None:
    with pytest.raises(BackendRefused, match="json or text") as caught:
        render_transcript(parse_transcript(b'{"text": "hello"}', "json"), response_format)
    assert caught.value.info.param == "response_format"


def test_words_without_times_are_refused() -> None:
    spoken = parse_transcript(render_transcript(SPOKEN, "verbose_json")[0], "verbose_json")
    with pytest.raises(BackendRefused, match="must be segment") as caught:
        render_transcript(spoken, "verbose_json", granularities=["word"])
    assert caught.value.info.param == "timestamp_granularities"


def test_silence_is_a_transcript() -> None:
    silence = parse_transcript(b'{"text": "", "language": "en", "duration": 2.0, "segments": []}', "verbose_json")
    assert render_transcript(silence, "text")[0] == b"\n"
    assert render_transcript(silence, "srt")[0] == b""
    assert render_transcript(silence, "vtt")[0] == b"WEBVTT\n\n"
    assert json.loads(render_transcript(silence, "verbose_json", granularities=["word"])[0])["words"] == []


@pytest.mark.parametrize("response_format", ["json", "text", "srt", "vtt", "verbose_json"])
def test_what_was_written_is_read_again(response_format: TranscriptFormat) -> None:
    spoken = SpeechTranscript(
        "Ay & bee. <See>", "en", 4.0, (SpeechSegment("Ay & bee.", 0, 1.5), SpeechSegment("<See>", 2, 4))
    )
    again = parse_transcript(render_transcript(spoken, response_format)[0], response_format)
    assert again.text == spoken.text
    if response_format in ("srt", "vtt", "verbose_json"):
        assert again.segments is not None
        assert [(one.text, one.start, one.end) for one in again.segments] == [("Ay & bee.", 0, 1.5), ("<See>", 2, 4)]
        assert again.seconds == 4.0


def test_words_within_segments_are_found() -> None:
    """As whisper.cpp gives them, with a text for the language and no figures."""
    body = {
        "task": "transcribe", "language": "english", "duration": 1.0, "text": " Yes. ",
        "segments": [{"id": 0, "text": " Yes.", "start": 0.0, "end": 1.0, "tokens": [3],
                      "words": [{"word": " Yes.", "start": 0.1, "end": 0.9, "t_dtw": -1, "probability": 0.9}]}],
    }  # fmt: skip
    spoken = parse_transcript(json.dumps(body).encode(), "verbose_json")
    assert spoken.words == (SpeechWord("Yes.", 0.1, 0.9),)
    assert spoken.text == "Yes."
    TranscriptionVerbose.model_validate_json(render_transcript(spoken, "verbose_json")[0])


@pytest.mark.parametrize(
    ("body", "response_format"),
    [(b"<html>", "json"), (b"[]", "json"), (b"{}", "verbose_json"), (b"no times", "srt"), (b"WEBVTT\n\nno", "vtt"),
     (b'{"text": "x", "segments": [{"text": "x"}]}', "verbose_json"), (b'{"text": "x", "segments": [1]}', "json")],
)  # fmt: skip
def test_nonsense_is_an_error(body: bytes, response_format: TranscriptFormat) -> None:
    with pytest.raises(BackendError) as caught:
        parse_transcript(body, response_format)
    assert caught.value.info.status == 502


def test_a_stream_is_of_the_sdks_events() -> None:
    """The joined deltas are the text; usage that counts tokens is passed on."""
    pieces = [json.loads(delta_frame(text).removeprefix(b"data: ")) for text in text_deltas(SPOKEN)]
    assert [TranscriptionTextDeltaEvent.model_validate(piece).type for piece in pieces] == ["transcript.text.delta"] * 2
    done = json.loads(done_frame(SPOKEN).removeprefix(b"data: "))
    assert TranscriptionTextDoneEvent.model_validate(done).usage is None
    assert "".join(piece["delta"] for piece in pieces) == done["text"] == SPOKEN.text
    usage = {"type": "tokens", "input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
    done = json.loads(done_frame(SpeechTranscript("a", usage=usage)).removeprefix(b"data: "))
    assert TranscriptionTextDoneEvent.model_validate(done).usage is not None
    assert list(text_deltas(SpeechTranscript("unlike its", segments=(SpeechSegment("segments", 0, 1),)))) == [
        "unlike its"
    ]


def test_a_request_is_read() -> None:
    fields: dict[str, Any] = {
        "language": "en", "prompt": "", "temperature": 0, "response_format": "verbose_json", "stream": False,
        "timestamp_granularities": ["word"], "service_tier": "flex", "hotwords": "Nexus",
    }  # fmt: skip
    wanted = RecognitionRequest.from_task(asked(**fields))
    assert (wanted.mode, wanted.model, wanted.language, wanted.prompt) == ("transcribe", "tiny", "en", None)
    assert (wanted.temperature, wanted.response_format) == (0.0, "verbose_json")
    assert wanted.wants_word_times
    assert wanted.extra == {"hotwords": "Nexus"}
    assert RecognitionRequest.from_task(asked("/v1/audio/translations")).mode == "translate"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "diarized_json"}, "response_format"),
        ({"response_format": "docx"}, "response_format"),
        ({"temperature": "warm"}, "temperature"),
        ({"language": 7}, "language"),
        ({"timestamp_granularities": ["phrase"]}, "timestamp_granularities"),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities"),
        ({"stream": True, "response_format": "srt"}, "response_format"),
        ({"files": ()}, "file"),
    ],
    ids=str,
)
def test_what_no_transcript_holds_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BackendRefused) as caught:
        RecognitionRequest.from_task(asked(**fields))
    assert caught.value.info.param == param


def test_another_endpoint_is_refused() -> None:
    with pytest.raises(BackendRefused, match="/v1/audio/speech"):
        RecognitionRequest.from_task(asked("/v1/audio/speech"))


def test_a_forms_strings_become_values() -> None:
    """A field may repeat; an empty one counts as missing."""
    form = TranscriptionForm.model_validate(
        {"model": "tiny", "temperature": "0.5", "stream": "true", "language": "", "timestamp_granularities": "word"}
    )
    assert (form.temperature, form.stream, form.language, form.timestamp_granularities) == (0.5, True, None, ["word"])
    form = TranscriptionForm.model_validate({"model": "tiny", "timestamp_granularities": ["word", "segment"], "x": "y"})
    assert form.model_dump(exclude_none=True)["x"] == "y"
    assert TranslationForm.model_validate({"model": "tiny", "response_format": "srt"}).response_format == "srt"
    for bad in ({"model": ""}, {"model": "tiny", "temperature": "2"}, {"model": "tiny", "response_format": "docx"}):
        with pytest.raises(ValueError, match="validation error"):
            TranscriptionForm.model_validate(bad)
