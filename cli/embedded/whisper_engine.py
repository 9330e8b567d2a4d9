"""Whisper as a library: one model, one transcription at a time."""

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

LOOK_S = 0.2
"""How often one that waits for its turn looks whether its caller is still there."""
RATE = 16_000
"""Samples a second that Whisper takes."""
BLOCK_S = 300
"""Seconds that are listened to at once: an hour in one piece takes gigabytes."""
QUIET_S = 5
"""The end of a block, of which the quietest moment is where it is cut."""
ENGLISH = frozenset({"en", "english"})
Look = Callable[[], None]
"""Raises where nobody waits for the work any more."""


class TranscriptionRejected(Exception):
    """The request is wrong: an HTTP status and OpenAI's error object."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


class CancellableModel:
    """ctranslate2's model; `look` is called before each of its steps, and may raise to end the work."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.look: Look = lambda: None

    def __getattr__(self, name: str) -> Any:
        self.look()
        return getattr(self._model, name)


class SpeechRecognizer:
    """The model, used by one thread at a time. Raises RuntimeError or ValueError when it cannot be loaded."""

    def __init__(self, model: Path, name: str, threads: int = 0) -> None:
        """`threads` 0: one per core, four at most."""
        from faster_whisper import WhisperModel

        self.name = name
        self.busy = 0
        """Requests that are worked on, or wait for it."""
        self._turn = threading.Lock()
        self._count = threading.Lock()
        threads = threads or min(4, os.cpu_count() or 2)
        self._model = WhisperModel(str(model), device="cpu", compute_type="int8", cpu_threads=threads)
        self._multilingual = bool(self._model.model.is_multilingual)
        self._steps = CancellableModel(self._model.model)
        self._model.model = self._steps

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Count a request."""
        with self._count:
            self.busy += 1
        try:
            yield
        finally:
            with self._count:
                self.busy -= 1

    def check(self, wanted: TranslationRequest, what: RecognitionMode) -> None:
        """Raises TranscriptionRejected when this model cannot do that."""
        if wanted.model != self.name:
            message = f"there is no model {wanted.model!r}; there is {self.name}"
            raise TranscriptionRejected(message, status=404, param="model", code="model_not_found")
        if wanted.response_format == "diarized_json":
            raise TranscriptionRejected("this model cannot tell speakers apart", param="response_format")
        if self._multilingual:
            return
        if what == "translate":
            raise TranscriptionRejected(f"{self.name} knows only English, and cannot translate", param="model")
        language = getattr(wanted, "language", None)
        if language and language.lower() not in ENGLISH:
            raise TranscriptionRejected(f"{self.name} knows only English", param="language")

    def hear(
        self, sound: bytes, wanted: TranslationRequest, what: RecognitionMode, look: Look
    ) -> Generator[SpeechTranscript]:
        """The transcript as it grows, first without any text. Raises TranscriptionRejected for bad sound, and what `look` raises."""
        samples = decoded(sound)
        while not self._turn.acquire(timeout=LOOK_S):
            look()
        self._steps.look = look
        try:
            told = SpeechTranscript(
                "", duration=len(samples) / RATE, segments=(), words=() if wants_word_times(wanted) else None
            )
            for start, block in blocks(samples):
                phrases, language = self._start(block, wanted, what, told.language)
                if told.language is None:
                    told = replace(told, language=language)
                    yield told
                for phrase in phrases:
                    told = longer(told, phrase, start, start + len(block) / RATE)
                    yield told
        finally:
            self._turn.release()

    def _start(
        self, block: Any, wanted: TranslationRequest, what: RecognitionMode, language: str | None
    ) -> tuple[Iterator[Any], str]:
        """What comes of a block, and its language: the one given, else the one found."""
        # OpenAI's 0 means what the default does: begin with 0, and more where that fails.
        chosen = {"temperature": wanted.temperature} if wanted.temperature else {}
        try:
            phrases, info = self._model.transcribe(
                block,
                task=what,
                language=language or getattr(wanted, "language", None),
                initial_prompt=wanted.prompt,
                word_timestamps=wants_word_times(wanted),
                **chosen,
            )
        except ValueError as error:  # a language that there is not
            raise TranscriptionRejected(str(error), param="language") from error
        return iter(phrases), str(info.language)


def wants_word_times(wanted: TranslationRequest) -> bool:
    """Whether the caller asked for every word's times."""
    return "word" in (getattr(wanted, "timestamp_granularities", None) or ())


def decoded(sound: bytes) -> Any:
    """The samples. Raises TranscriptionRejected when FFmpeg can make nothing of it."""
    from faster_whisper import decode_audio

    try:
        samples = decode_audio(io.BytesIO(sound), sampling_rate=RATE)
    except Exception as error:  # FFmpeg's are of many kinds, and all of them are about the file
        raise TranscriptionRejected(f"the file is no sound that can be decoded: {error}", param="file") from error
    if not len(samples):
        raise TranscriptionRejected("the file holds no sound", param="file")
    return samples


def blocks(samples: Any) -> Iterator[tuple[float, Any]]:
    """The sound in pieces, each with the seconds before it; cut where little is said."""
    begin = 0
    while len(samples) - begin > BLOCK_S * RATE:
        end = begin + BLOCK_S * RATE
        tenths = abs(samples[end - QUIET_S * RATE : end]).reshape(QUIET_S * 10, -1).sum(axis=1)
        end -= (QUIET_S * 10 - int(tenths.argmin())) * RATE // 10 - RATE // 20
        yield begin / RATE, samples[begin:end]
        begin = end
    yield begin / RATE, samples[begin:]


def longer(told: SpeechTranscript, phrase: Any, start: float, end: float) -> SpeechTranscript:
    """With one more of faster-whisper's segments, of a block that lasts from `start` to `end` seconds.

    Whisper fills the last part of a block up with silence, and may take some of it for the end of a phrase.
    """
    segment = SpeechSegment(
        text=phrase.text,
        start=start + float(phrase.start),  # with words, numbers of numpy
        end=min(end, start + float(phrase.end)),
        seek=phrase.seek + int(100 * start),
        tokens=tuple(phrase.tokens),
        temperature=phrase.temperature or 0.0,
        avg_logprob=phrase.avg_logprob,
        compression_ratio=phrase.compression_ratio,
        no_speech_prob=phrase.no_speech_prob,
    )
    segments = (*(told.segments or ()), segment)
    words = None
    if told.words is not None:
        said = ((one.word.strip(), start + float(one.start), start + float(one.end)) for one in phrase.words or ())
        words = (*told.words, *(SpeechWord(word, min(end, begun), min(end, ended)) for word, begun, ended in said))
    text = "".join(one.text for one in segments).strip()
    return replace(told, text=text, segments=segments, words=words)
