"""The descriptions of the routes for images, audio and results by URL."""

from __future__ import annotations

from gateway.openapi.operation import BINARY, TEXT, Operation, Schema, SuccessResponse
from gateway.openapi.operations.common import ACCEPTED, PREFERENCES, STREAM, inference_responses
from gateway.openapi.shapes.media import ImageList, TranscriptObject
from schemas.openai.images import ImageEditRequest, ImageGenerationRequest
from schemas.openai.speech import SPEECH_CONTENT_TYPES, SpeechRequest
from schemas.openai.transcriptions import TranscriptionRequest, TranslationRequest

IMAGES = "The images: one JSON object, or with `stream: true` a stream of events, including previews."
TEXTS: dict[str, Schema] = {"text/plain": TEXT}
SPOKEN = "The text: JSON, or plain text for `response_format` `text`, `srt` and `vtt`. {more}"

OPERATIONS = {
    "POST /v1/images/generations": Operation(
        id="createImage",
        tag="inference",
        scope="inference",
        runs_inference=True,
        summary="Generate images",
        description="Generate `n` images from a prompt, as Base64 or by URL. `seed`, `negative_prompt`, `steps` and "
        "`guidance` work if the inference server supports them.",
        body=ImageGenerationRequest,
        examples={"An image": {"model": "sd-turbo", "prompt": "A lighthouse at dusk", "size": "512x512"}},
        responses=inference_responses(ImageList, IMAGES, STREAM),
        parameters=PREFERENCES,
    ),
    "POST /v1/images/edits": Operation(
        id="editImage",
        tag="inference",
        scope="inference",
        runs_inference=True,
        summary="Edit images",
        description="Change an image according to the prompt. With a mask, change only the areas where the mask is transparent.",
        body=ImageEditRequest,
        files={
            "image": "The image. For several images, repeat the field or name it `image[]`.",
            "mask": "The mask. Its transparent areas are edited.",
        },
        responses=inference_responses(ImageList, IMAGES, STREAM),
        parameters=PREFERENCES,
    ),
    "POST /v1/audio/speech": Operation(
        id="createSpeech",
        tag="inference",
        scope="inference",
        runs_inference=True,
        summary="Create speech",
        description="Convert a text to audio. The response streams while the audio is generated. `GET /v1/audio/voices` lists the voices.",
        body=SpeechRequest,
        examples={"A sentence": {"model": "en_US-joe-medium", "input": "Hello there."}},
        responses={
            200: SuccessResponse(
                "The audio in the format given by `response_format`; with `stream_format: sse` a stream of events.",
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
        runs_inference=True,
        summary="Create a transcription",
        description="Transcribe a recording in its own language.",
        body=TranscriptionRequest,
        files={"file": "The recording: wav, mp3, flac, ogg, m4a or webm."},
        responses=inference_responses(
            TranscriptObject, SPOKEN.format(more="With `stream: true` a stream of events."), TEXTS | STREAM
        ),
        parameters=PREFERENCES,
    ),
    "POST /v1/audio/translations": Operation(
        id="createTranslation",
        tag="inference",
        scope="inference",
        runs_inference=True,
        summary="Create a translation",
        description="Transcribe a recording and translate it to English.",
        body=TranslationRequest,
        files={"file": "The recording: wav, mp3, flac, ogg, m4a or webm."},
        responses=inference_responses(TranscriptObject, SPOKEN.format(more="").strip(), TEXTS),
        parameters=PREFERENCES,
    ),
    "GET /v1/results/{name}": Operation(
        id="getResultByUrl",
        tag="results",
        scope=None,
        summary="Get a result by its URL",
        description="Return an image or audio file that a request with `response_format: url` generated. The signed URL is the permission, so no key is needed. It expires.",
        responses={
            200: SuccessResponse(
                "The bytes of the file.",
                {"image/*": BINARY, "audio/*": BINARY, "application/octet-stream": BINARY},
                ("Content-Length",),
            )
        },
        errors={
            401: "Never returned: the URL is the permission.",
            404: "The result does not exist, or its URL has expired or was modified.",
        },
        parameters={
            "name": {"description": "Copied from the URL in the response."},
            "owner": {"description": "Copied from the URL in the response.", "required": True},
            "expires": {"description": "Copied from the URL in the response: Unix seconds.", "required": True},
            "signature": {"description": "Copied from the URL in the response.", "required": True},
            "key": {
                "description": "Copied from the URL in the response, if it is there: the API key with which the URL ends."
            },
        },
    ),
}
