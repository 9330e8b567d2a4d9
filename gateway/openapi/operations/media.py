"""Pictures, sound, results by URL."""

from __future__ import annotations

from gateway.openapi.operation import BINARY, TEXT, Answer, Operation, Schema
from gateway.openapi.operations.common import ACCEPTED, PREFERENCES, STREAM, inferred
from gateway.openapi.shapes.media import ImageList, Transcript
from schemas.openai.images import ImageEditRequest, ImageGenerationRequest
from schemas.openai.speech import SPEECH_CONTENT_TYPES, SpeechRequest
from schemas.openai.transcriptions import TranscriptionRequest, TranslationRequest

IMAGES = "The pictures: one JSON object, or with `stream: true` events, previews among them."
TEXTS: dict[str, Schema] = {"text/plain": TEXT}
SPOKEN = "The text: JSON, or plain text for `response_format` `text`, `srt` and `vtt`. {more}"

OPERATIONS = {
    "POST /v1/images/generations": Operation(
        id="createImage",
        tag="inference",
        scope="inference",
        works=True,
        summary="Make pictures from a text",
        description="Make `n` pictures of what the prompt describes, as Base64 or by URL. `seed`, `negative_prompt`, `steps` and "
        "`guidance` are understood where the server has them.",
        body=ImageGenerationRequest,
        examples={"A picture": {"model": "sd-turbo", "prompt": "A lighthouse at dusk", "size": "512x512"}},
        answers=inferred(ImageList, IMAGES, STREAM),
        parameters=PREFERENCES,
    ),
    "POST /v1/images/edits": Operation(
        id="editImage",
        tag="inference",
        scope="inference",
        works=True,
        summary="Make pictures from a picture",
        description="Change a picture as the prompt says; with a mask, only where the mask is transparent.",
        body=ImageEditRequest,
        files={
            "image": "The picture. Repeat the field (or name it `image[]`) for several.",
            "mask": "Where to change it.",
        },
        answers=inferred(ImageList, IMAGES, STREAM),
        parameters=PREFERENCES,
    ),
    "POST /v1/audio/speech": Operation(
        id="createSpeech",
        tag="inference",
        scope="inference",
        works=True,
        summary="Speak a text",
        description="Return the text as sound, while it is made. `GET /v1/audio/voices` lists the voices.",
        body=SpeechRequest,
        examples={"A sentence": {"model": "en_US-joe-medium", "input": "Hello there."}},
        answers={
            200: Answer(
                "The sound, in the format that `response_format` names; with `stream_format: sse` as events.",
                dict.fromkeys(SPEECH_CONTENT_TYPES.values(), BINARY) | STREAM,
                ("x-nexus-job-id",),
            ),
            202: ACCEPTED,
        },
        parameters=PREFERENCES,
    ),
    "POST /v1/audio/transcriptions": Operation(
        id="createTranscription",
        tag="inference",
        scope="inference",
        works=True,
        summary="Write down what a recording says",
        description="Return the words of a recording in its own language.",
        body=TranscriptionRequest,
        files={"file": "The recording: wav, mp3, flac, ogg, m4a or webm."},
        answers=inferred(Transcript, SPOKEN.format(more="With `stream: true` it comes as events."), TEXTS | STREAM),
        parameters=PREFERENCES,
    ),
    "POST /v1/audio/translations": Operation(
        id="createTranslation",
        tag="inference",
        scope="inference",
        works=True,
        summary="Write down a recording in English",
        description="Return the words of a recording, translated to English.",
        body=TranslationRequest,
        files={"file": "The recording: wav, mp3, flac, ogg, m4a or webm."},
        answers=inferred(Transcript, SPOKEN.format(more="").strip(), TEXTS),
        parameters=PREFERENCES,
    ),
    "GET /v1/results/{name}": Operation(
        id="getResultByUrl",
        tag="results",
        scope=None,
        summary="Fetch a picture or a sound by its URL",
        description="Return what a request asked for with `response_format: url`. No key is needed: the URL is signed, and ends.",
        answers={
            200: Answer(
                "The bytes.",
                {"image/*": BINARY, "audio/*": BINARY, "application/octet-stream": BINARY},
                ("Content-Length",),
            )
        },
        errors={
            401: "Not sent: the URL is the permission.",
            404: "There is no such result, or its URL has expired or was changed.",
        },
        parameters={
            "name": {"description": "From the URL in an answer."},
            "owner": {"description": "From the URL in an answer.", "required": True},
            "expires": {"description": "From the URL in an answer: Unix seconds.", "required": True},
            "signature": {"description": "From the URL in an answer.", "required": True},
        },
    ),
}
