"""Speech recognition with faster-whisper: one model, one transcription at a time."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from schemas.openai.transcriptions import TranslationRequest
from workers.adapter_kit.audio.transcripts import RecognitionMode, SpeechSegment, SpeechTranscript, SpeechWord

CLIENT_CHECK_INTERVAL_S = 0.2
"""How often a waiting request checks that its client is still connected."""
SAMPLE_RATE = 16_000
"""Samples per second that Whisper takes."""
BLOCK_S = 300
"""Seconds of audio to transcribe at once: an hour in one piece takes gigabytes."""
CUT_WINDOW_S = 5
"""A block is cut at the quietest moment of its last seconds."""
ENGLISH = frozenset({"en", "english"})
ClientCheck = Callable[[], None]
"""Raises if the client has disconnected."""


class TranscriptionRejected(Exception):
    """The request is invalid. `status` is for HTTP, `body` is OpenAI's error object."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


class CancellableModel:
    """ctranslate2's model. It calls `check_client` before each step, which raises to cancel the work."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.check_client: ClientCheck = lambda: None

    def __getattr__(self, name: str) -> Any:
        self.check_client()
        return getattr(self._model, name)


class SpeechRecognizer:
    """Transcribes with one model, in one thread at a time. Raises RuntimeError or ValueError if the model cannot be loaded."""

    def __init__(self, model: Path, name: str, threads: int = 0) -> None:
        """Load the model. `threads` 0 uses one for each core, at most four."""
        from faster_whisper import WhisperModel

        self.name = name
        self.busy = 0
        """Requests that run or wait."""
        self._lock = threading.Lock()
        self._busy_lock = threading.Lock()
        threads = threads or min(4, os.cpu_count() or 2)
        self._model = WhisperModel(str(model), device="cpu", compute_type="int8", cpu_threads=threads)
        self._multilingual = bool(self._model.model.is_multilingual)
        self._cancellable = CancellableModel(self._model.model)
        self._model.model = self._cancellable

    @contextmanager
    def count_request(self) -> Iterator[None]:
        """Count a request in `busy` while the block runs."""
        with self._busy_lock:
            self.busy += 1
        try:
            yield
        finally:
            with self._busy_lock:
                self.busy -= 1

    def check(self, request: TranslationRequest, mode: RecognitionMode) -> None:
        """Raise TranscriptionRejected if this model cannot serve the request."""
        if request.model != self.name:
            message = f"The model {request.model!r} does not exist. This server has {self.name}."
            raise TranscriptionRejected(message, status=404, param="model", code="model_not_found")
        if request.response_format == "diarized_json":
            raise TranscriptionRejected(
                "This model cannot tell speakers apart. Choose another response_format.", param="response_format"
            )
        if self._multilingual:
            return
        if mode == "translate":
            raise TranscriptionRejected(f"{self.name} knows only English and cannot translate.", param="model")
        language = getattr(request, "language", None)
        if language and language.lower() not in ENGLISH:
            raise TranscriptionRejected(f"{self.name} knows only English.", param="language")

    def transcribe(
        self, audio: bytes, request: TranslationRequest, mode: RecognitionMode, check_client: ClientCheck
    ) -> Generator[SpeechTranscript]:
        """Yield the growing transcript, first without text.

        Raises TranscriptionRejected for audio that cannot be decoded, and the exceptions of `check_client`.
        """
        samples = decode(audio)
        while not self._lock.acquire(timeout=CLIENT_CHECK_INTERVAL_S):
            check_client()
        self._cancellable.check_client = check_client
        try:
            transcript = SpeechTranscript(
                "", duration=len(samples) / SAMPLE_RATE, segments=(), words=() if wants_word_times(request) else None
            )
            for start, block in split_blocks(samples):
                phrases, language = self._transcribe_block(block, request, mode, transcript.language)
                if transcript.language is None:
                    transcript = replace(transcript, language=language)
                    yield transcript
                for phrase in phrases:
                    transcript = append_phrase(transcript, phrase, start, start + len(block) / SAMPLE_RATE)
                    yield transcript
        finally:
            self._lock.release()

    def _transcribe_block(
        self, block: Any, request: TranslationRequest, mode: RecognitionMode, language: str | None
    ) -> tuple[Iterator[Any], str]:
        """Return the phrases of a block, and its language: the given or the detected one."""
        # OpenAI's temperature 0 is the default here: start with 0, and raise it if decoding fails.
        options = {"temperature": request.temperature} if request.temperature else {}
        try:
            phrases, info = self._model.transcribe(
                block,
                task=mode,
                language=language or getattr(request, "language", None),
                initial_prompt=request.prompt,
                word_timestamps=wants_word_times(request),
                **options,
            )
        except ValueError as error:  # an unknown language
            raise TranscriptionRejected(str(error), param="language") from error
        return iter(phrases), str(info.language)


def wants_word_times(request: TranslationRequest) -> bool:
    """Return whether the request asks for the times of each word."""
    return "word" in (getattr(request, "timestamp_granularities", None) or ())


def decode(audio: bytes) -> Any:
    """Return the samples of a file. Raises TranscriptionRejected if FFmpeg cannot decode it."""
    from faster_whisper import decode_audio

    try:
        samples = decode_audio(io.BytesIO(audio), sampling_rate=SAMPLE_RATE)
    except Exception as error:  # FFmpeg raises many classes, all of them for a bad file
        raise TranscriptionRejected(f"The file cannot be decoded as audio: {error}", param="file") from error
    if not len(samples):
        raise TranscriptionRejected("The file contains no audio.", param="file")
    return samples


def split_blocks(samples: Any) -> Iterator[tuple[float, Any]]:
    """Yield blocks of the audio, each with its start in seconds, cut at quiet moments."""
    start = 0
    while len(samples) - start > BLOCK_S * SAMPLE_RATE:
        end = start + BLOCK_S * SAMPLE_RATE
        tenths = abs(samples[end - CUT_WINDOW_S * SAMPLE_RATE : end]).reshape(CUT_WINDOW_S * 10, -1).sum(axis=1)
        end -= (CUT_WINDOW_S * 10 - int(tenths.argmin())) * SAMPLE_RATE // 10 - SAMPLE_RATE // 20
        yield start / SAMPLE_RATE, samples[start:end]
        start = end
    yield start / SAMPLE_RATE, samples[start:]


def append_phrase(transcript: SpeechTranscript, phrase: Any, start: float, end: float) -> SpeechTranscript:
    """Return the transcript with one more phrase, of a block that lasts from `start` to `end` seconds.

    Whisper pads a block with silence, and may count some of it to the last phrase: times are cut at `end`.
    """
    segment = SpeechSegment(
        text=phrase.text,
        start=start + float(phrase.start),  # a numpy number if the request asks for word times
        end=min(end, start + float(phrase.end)),
        seek=phrase.seek + int(100 * start),
        tokens=tuple(phrase.tokens),
        temperature=phrase.temperature or 0.0,
        avg_logprob=phrase.avg_logprob,
        compression_ratio=phrase.compression_ratio,
        no_speech_prob=phrase.no_speech_prob,
    )
    segments = (*(transcript.segments or ()), segment)
    words = None
    if transcript.words is not None:
        times = ((one.word.strip(), start + float(one.start), start + float(one.end)) for one in phrase.words or ())
        words = (
            *transcript.words,
            *(SpeechWord(word, min(end, begun), min(end, ended)) for word, begun, ended in times),
        )
    text = "".join(one.text for one in segments).strip()
    return replace(transcript, text=text, segments=segments, words=words)
