"""Define the table of inference endpoints: one row holds everything that distinguishes an endpoint from the others.

The gateway's routes, jobs and batches, the adapters, the console, the OpenAPI document and the tests read the table. None of
them lists endpoints. docs/how-to/add-an-endpoint.md says how to add a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel

from schemas.keys import Scope
from schemas.model_jobs import ModelJobRequest
from schemas.openai.chat import ChatRequest, TokenCount, TokenCountRequest
from schemas.openai.completions import CompletionRequest
from schemas.openai.embeddings import EmbeddingsRequest
from schemas.openai.images import ImageEditRequest, ImageGenerationRequest
from schemas.openai.moderations import Moderation, ModerationRequest
from schemas.openai.rerank import RerankRequest
from schemas.openai.score import ScoreRequest, Scores
from schemas.openai.speech import SPEECH_CONTENT_TYPES, SpeechRequest
from schemas.openai.transcriptions import TranscriptionRequest, TranslationRequest

SSE = b"text/event-stream; charset=utf-8"


class Capability(StrEnum):
    """What a model can do. It is the first token of a job's subject.

    A new one is additive: it gets queues of its own when it is first used, and a reader of presences skips those that it does
    not know. Permissions that were written for workers by capability must be written again.
    """

    CHAT = "chat"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"
    IMAGES = "images"
    SPEECH = "speech"
    TRANSCRIPTIONS = "transcriptions"
    RERANK = "rerank"
    MODERATIONS = "moderations"
    MODELS = "models"

    __hash__ = str.__hash__  # Enum's hash takes ten times as long, and a job's queue is looked up several times


class TimeLimits(StrEnum):
    """Which of the operator's time limits a job has."""

    TEXT = "text"
    """The backend gives tokens as it makes them: the limits on the first token and on silence hold."""
    MEDIA = "media"
    """The first sign of life may be the whole answer."""
    DOWNLOAD = "download"
    """As MEDIA, and the job may fetch many gigabytes."""


def stream_if_requested(request: Any) -> bytes | None:
    """Return the type of server-sent events for `stream: true`; None where the answer comes in one piece."""
    return SSE if request.stream else None


def never_stream(_request: Any) -> bytes | None:
    """Return None: the answer always comes in one piece."""
    return None


def stream_speech(request: SpeechRequest) -> bytes:
    """Return the type of the sound, which is always passed on as it is made."""
    return SSE if request.stream_format == "sse" else SPEECH_CONTENT_TYPES[request.response_format or "mp3"].encode()


def _never_by_url(_request: Any) -> bool:
    return False


def _pictures_by_url(request: ImageGenerationRequest | ImageEditRequest) -> bool:
    return request.response_format == "url"


@dataclass(frozen=True, slots=True)
class EndpointDescription:
    """What the OpenAPI document says of an endpoint whose answers are JSON."""

    operation_id: str
    """Generators make method names of it; it never changes."""
    summary: str
    """As a task: "Order documents by relevance"."""
    text: str
    answer: type[BaseModel]
    answer_text: str
    examples: Mapping[str, Mapping[str, Any]]
    """Requests by title."""


@dataclass(frozen=True, slots=True)
class Translation:
    """How requests to an endpoint of another API reach the workers: as requests to one that the workers know."""

    target: EndpointSpec
    request: Callable[[Any], dict[str, Any]]
    """Returns the body for `target`, for a request that the endpoint's own schema has checked. Raises InvalidRequest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSpec:
    """One endpoint whose requests become jobs."""

    path: str
    capability: Capability
    """What a model must be capable of. Endpoints may share one: `/v1/images/generations` and `/v1/images/edits`."""
    schema: type[BaseModel]
    """Checks the fields that Nexus reads; must have `model`, `stream` and `service_tier`. `model` may be None: then the
    default for the capability answers."""
    name: str = ""
    """The console's short name: `nexus submit chat`."""
    service_words: tuple[str, ...] = ()
    """What services that list no endpoints call what they do."""
    files: tuple[str, ...] = ()
    """The fields of a multipart form that hold files, the first of which is required; empty: the body is JSON."""
    stream_type: Callable[[Any], bytes | None] = stream_if_requested
    """The content type of an answer that is passed on as it is made; None: the answer comes in one piece."""
    by_url: Callable[[Any], bool] = _never_by_url
    """Whether results are fetched by URL: the answer then holds `data[].url`."""
    scope: Scope = Scope.INFERENCE
    """The scope that a key must have."""
    time_limits: TimeLimits = TimeLimits.MEDIA
    batchable: bool = True
    """A batch may be for it."""
    writes_text: bool = False
    """A stream of it is text that a person can read while it is written."""
    job: str
    """The component of the OpenAPI document that describes its jobs. Endpoints with one form of body share it."""
    relayed: bool = False
    """OpenAI-style servers have it in this form: their answer is passed on, but for the model's name. False: an adapter
    translates between forms."""
    model_types: tuple[str, ...] = ()
    """What servers that list their models call one that serves it (`type`, `task`, `capabilities`)."""
    model_names: str = ""
    """A pattern, in lower case, of the names of models that are known to serve it."""
    description: EndpointDescription | None = None
    """None: `gateway/openapi/operations/` describes it."""
    translation: Translation | None = None
    """None: requests travel as they come. No row of the table has one: an API that is translated lies in `gateway/dialects`."""

    @property
    def job_path(self) -> str:
        """Return the path whose form the jobs have."""
        return self.path if self.translation is None else self.translation.target.path

    @property
    def shown_path(self) -> str:
        """Return the path that records show in place of `job_path`; empty if it is the same."""
        return "" if self.translation is None else self.path


ENDPOINTS: tuple[EndpointSpec, ...] = (
    EndpointSpec(
        path="/v1/chat/completions",
        capability=Capability.CHAT,
        schema=ChatRequest,
        name="chat",
        service_words=("chat",),
        time_limits=TimeLimits.TEXT,
        writes_text=True,
        job="ChatCompletionJob",
    ),
    EndpointSpec(
        path="/v1/chat/completions/input_tokens",
        capability=Capability.CHAT,
        schema=TokenCountRequest,
        name="chat/completions/input_tokens",
        stream_type=never_stream,
        time_limits=TimeLimits.TEXT,
        job="TokenCountJob",
        description=EndpointDescription(
            operation_id="countChatTokens",
            summary="Count the tokens of a chat request",
            text="Return how many tokens the prompt of a chat request has, as the inference server counts them, without an answer. llama.cpp and vLLM "
            "count; a server that cannot is 400 `unsupported_endpoint`, as is a request with pictures or sound.",
            answer=TokenCount,
            answer_text="The number of tokens.",
            examples={
                "A question": {"model": "smollm2", "messages": [{"role": "user", "content": "What is gravity?"}]}
            },
        ),
    ),
    EndpointSpec(
        path="/v1/completions",
        capability=Capability.COMPLETIONS,
        schema=CompletionRequest,
        name="completions",
        service_words=("completions", "completion"),
        time_limits=TimeLimits.TEXT,
        writes_text=True,
        job="CompletionJob",
    ),
    EndpointSpec(
        path="/v1/embeddings",
        capability=Capability.EMBEDDINGS,
        schema=EmbeddingsRequest,
        name="embeddings",
        service_words=("embeddings", "embedding"),
        stream_type=never_stream,
        time_limits=TimeLimits.TEXT,
        job="EmbeddingJob",
        model_types=("embedding", "embeddings", "embed", "feature-extraction", "sentence-similarity", "text-embedding"),
    ),
    EndpointSpec(
        path="/v1/images/generations",
        capability=Capability.IMAGES,
        schema=ImageGenerationRequest,
        name="images",
        service_words=("images", "image"),
        by_url=_pictures_by_url,
        job="ImageJob",
        model_types=("image", "images", "text-to-image", "image-generation"),
    ),
    EndpointSpec(
        path="/v1/images/edits",
        capability=Capability.IMAGES,
        schema=ImageEditRequest,
        name="edits",
        files=("image", "mask"),
        by_url=_pictures_by_url,
        job="ImageEditJob",
    ),
    EndpointSpec(
        path="/v1/audio/speech",
        capability=Capability.SPEECH,
        schema=SpeechRequest,
        name="speech",
        service_words=("speech", "tts"),
        stream_type=stream_speech,
        job="SpeechJob",
        model_types=("text-to-speech", "tts", "speech"),
    ),
    EndpointSpec(
        path="/v1/audio/transcriptions",
        capability=Capability.TRANSCRIPTIONS,
        schema=TranscriptionRequest,
        name="transcriptions",
        service_words=("transcriptions", "transcription", "asr", "stt"),
        files=("file",),
        job="TranscriptionJob",
        model_types=(
            "automatic-speech-recognition",
            "speech-to-text",
            "asr",
            "stt",
            "transcript",
            "transcription",
            "transcriptions",
            "transcribe",
        ),
    ),
    EndpointSpec(
        path="/v1/audio/translations",
        capability=Capability.TRANSCRIPTIONS,
        schema=TranslationRequest,
        name="translations",
        files=("file",),
        stream_type=never_stream,
        job="TranscriptionJob",
    ),
    EndpointSpec(
        path="/v1/rerank",
        capability=Capability.RERANK,
        schema=RerankRequest,
        name="rerank",
        service_words=("rerank", "reranking"),
        stream_type=never_stream,
        time_limits=TimeLimits.TEXT,
        job="RerankJob",
        model_types=("rerank", "reranker", "reranking", "text-ranking"),
    ),
    EndpointSpec(
        path="/v1/score",
        capability=Capability.RERANK,
        schema=ScoreRequest,
        name="score",
        service_words=("score",),
        stream_type=never_stream,
        time_limits=TimeLimits.TEXT,
        job="ScoreJob",
        relayed=True,
        description=EndpointDescription(
            operation_id="createScore",
            summary="Score pairs of texts",
            text="Score how well the texts of each pair belong together, by a cross-encoder. `text_1` is one text, or as many as `text_2` "
            "has. Request and response follow vLLM's API.",
            answer=Scores,
            answer_text="The scores, in the order of the pairs.",
            examples={
                "One question, two answers": {
                    "model": "bge-reranker-v2-m3",
                    "text_1": "What do cats eat?",
                    "text_2": ["Cats eat mice.", "Dogs bark."],
                }
            },
        ),
    ),
    EndpointSpec(
        path="/v1/moderations",
        capability=Capability.MODERATIONS,
        schema=ModerationRequest,
        name="moderations",
        service_words=("moderations", "moderation"),
        stream_type=never_stream,
        time_limits=TimeLimits.TEXT,
        job="ModerationJob",
        relayed=True,
        model_types=("moderation", "moderations", "content-moderation"),
        model_names="moderation",
        description=EndpointDescription(
            operation_id="createModeration",
            summary="Classify content",
            text="Return which categories of harmful content the input belongs to. The input is a text, several texts, or the "
            "text and pictures of one content. Without `model`, the alias `default-moderations` answers, or the only model that can.",
            answer=Moderation,
            answer_text="The classifications.",
            examples={"A text": {"model": "omni-moderation-latest", "input": "I will find you."}},
        ),
    ),
    *(
        EndpointSpec(
            path=f"/v1/models/{verb}",
            capability=Capability.MODELS,
            schema=ModelJobRequest,
            scope=Scope.ADMIN_OPERATE,
            time_limits=TimeLimits.DOWNLOAD,
            batchable=False,
            job="ModelJob",
        )
        for verb in ("pull", "load", "unload")
    ),
)
"""Every endpoint whose requests become jobs."""

BY_PATH: Mapping[str, EndpointSpec] = {spec.path: spec for spec in ENDPOINTS}
CHAT = BY_PATH["/v1/chat/completions"]
"""What responses travel as."""
INPUT_TOKENS = BY_PATH["/v1/chat/completions/input_tokens"]
SERVED: tuple[EndpointSpec, ...] = tuple(spec for spec in ENDPOINTS if spec.scope is Scope.INFERENCE)
"""The endpoints that a model answers. The others are jobs about models."""
CAPABILITIES: tuple[Capability, ...] = tuple(dict.fromkeys(spec.capability for spec in SERVED))
"""What a model may be capable of, in the table's order."""
TIME_LIMITS: Mapping[Capability, TimeLimits] = {spec.capability: spec.time_limits for spec in ENDPOINTS}
