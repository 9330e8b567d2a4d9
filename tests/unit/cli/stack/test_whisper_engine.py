"""The parts of the speech recognition server around its model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cli.embedded.whisper_engine import BLOCK_S, SAMPLE_RATE, TranscriptionRejected, append_phrase, split_blocks
from cli.embedded.whisper_server import read_fields, read_form
from workers.adapter_kit.audio.transcripts import SpeechTranscript, SpeechWord

numpy = pytest.importorskip("numpy")


def phrase(text: str, start: float, end: float) -> Any:
    figures = {"seek": 0, "tokens": [1], "temperature": 0.0, "avg_logprob": -0.1, "compression_ratio": 1.0}
    words = [SimpleNamespace(word=text, start=start, end=end)]
    return SimpleNamespace(text=text, start=start, end=end, no_speech_prob=0.0, words=words, **figures)


def test_long_audio_is_cut_at_quiet_moments() -> None:
    """No sample is lost or repeated, and no block is too long."""
    samples = numpy.ones(int(2.5 * BLOCK_S * SAMPLE_RATE), dtype="float32")
    quiet = slice((BLOCK_S - 2) * SAMPLE_RATE, (BLOCK_S - 2) * SAMPLE_RATE + SAMPLE_RATE // 5)
    samples[quiet] = 0
    pieces = list(split_blocks(samples))
    assert [len(piece) <= BLOCK_S * SAMPLE_RATE for _, piece in pieces] == [True] * 3
    assert sum(len(piece) for _, piece in pieces) == len(samples)
    assert quiet.start < len(pieces[0][1]) < quiet.stop
    starts = [start for start, _ in pieces]
    assert starts == [0.0, *(sum(len(piece) for _, piece in pieces[:n]) / SAMPLE_RATE for n in (1, 2))]
    short = numpy.ones(SAMPLE_RATE, dtype="float32")
    assert [(start, len(piece)) for start, piece in split_blocks(short)] == [(0.0, SAMPLE_RATE)]


def test_times_count_from_the_start_of_the_audio() -> None:
    """And end with it."""
    transcript = append_phrase(SpeechTranscript("", "en", 700.0, (), ()), phrase(" One", 1.0, 2.0), 0.0, 600.0)
    transcript = append_phrase(transcript, phrase(" two.", 1.0, 20.0), 600.0, 602.0)
    assert transcript.text == "One two."
    assert transcript.segments is not None
    assert [(one.start, one.end, one.seek) for one in transcript.segments] == [(1.0, 2.0, 0), (601.0, 602.0, 60_000)]
    assert transcript.words == (SpeechWord("One", 1.0, 2.0), SpeechWord("two.", 601.0, 602.0))


def test_a_form_is_read() -> None:
    """The file byte for byte, whatever it holds; fields that repeat are lists."""
    sound = b"\r\n--not the boundary\r\n\x00\xff\r\n"
    parts = [
        b'Content-Disposition: form-data; name="model"\r\n\r\ntiny',
        b'content-disposition: form-data; name="timestamp_granularities[]"\r\n\r\nword',
        b'content-disposition: form-data; name="timestamp_granularities[]"\r\n\r\nsegment',
        b'content-disposition: form-data; name="file"; filename="a b.wav"\r\ncontent-type: audio/wav\r\n\r\n' + sound,
    ]
    body = b"--b\r\n" + b"\r\n--b\r\n".join(parts) + b"\r\n--b--\r\n"
    fields, file = read_form('multipart/form-data; boundary="b"', body)
    assert file == sound
    assert fields == {"model": "tiny", "timestamp_granularities": ["word", "segment"]}


@pytest.mark.parametrize(
    ("content_type", "body"),
    [("application/json", b"{}"), ("multipart/form-data; boundary=b", b"--b--\r\n"), ("", b"")],
)
def test_a_body_that_is_no_form_is_rejected(content_type: str, body: bytes) -> None:
    with pytest.raises(TranscriptionRejected) as caught:
        read_form(content_type, body)
    assert caught.value.status == 400


def test_a_wrong_field_is_named() -> None:
    with pytest.raises(TranscriptionRejected) as caught:
        read_fields({"model": "tiny", "temperature": "hot"}, "transcribe")
    assert caught.value.body["error"]["param"] == "temperature"
