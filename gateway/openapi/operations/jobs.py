"""Jobs, and dead letters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, create_model

from gateway.files import MAX_FILES
from gateway.openapi.operation import BINARY, EVENT, JSON_TYPE, SSE_TYPE, TEXT, Answer, Operation, answer
from gateway.openapi.operations.common import JOB_ID, MODEL, PAGE
from gateway.openapi.operations.inference import HELLO
from gateway.openapi.shapes.jobs import DeadLetter, DeadLetterDeleted, DeadLetterList, Job, JobList
from schemas.model_jobs import ModelJobRequest
from schemas.openai.chat import ChatRequest
from schemas.openai.completions import CompletionRequest
from schemas.openai.embeddings import EmbeddingsRequest
from schemas.openai.images import ImageEditRequest, ImageGenerationRequest
from schemas.openai.rerank import RerankRequest
from schemas.openai.speech import SPEECH_CONTENT_TYPES, SpeechRequest
from schemas.openai.transcriptions import TranscriptionRequest
from schemas.submission import SubmitRequest

FileIds = str | Annotated[list[str], Field(min_length=1, max_length=MAX_FILES)]
"""The id of an uploaded file, or several."""


class ImageEditBody(ImageEditRequest):
    """The fields of the form; in the place of files, ids of uploaded files."""

    image: FileIds
    mask: FileIds | None = None


class TranscriptionBody(TranscriptionRequest):
    """The fields of the form; in the place of the file, the id of an uploaded file."""

    file: FileIds


def _job_of(name: str, body: type[BaseModel], *endpoints: str) -> type[BaseModel]:
    fields: dict[str, Any] = {"endpoint": (Literal[endpoints], ...), "body": (body, ...)}
    return create_model(name, __base__=SubmitRequest, __doc__=f"A job for `{'`, `'.join(endpoints)}`.", **fields)


SUBMISSIONS = (
    _job_of("ChatCompletionJob", ChatRequest, "/v1/chat/completions"),
    _job_of("CompletionJob", CompletionRequest, "/v1/completions"),
    _job_of("EmbeddingJob", EmbeddingsRequest, "/v1/embeddings"),
    _job_of("ImageJob", ImageGenerationRequest, "/v1/images/generations"),
    _job_of("SpeechJob", SpeechRequest, "/v1/audio/speech"),
    _job_of("RerankJob", RerankRequest, "/v1/rerank"),
    _job_of("ModelJob", ModelJobRequest, "/v1/models/pull", "/v1/models/load", "/v1/models/unload"),
    _job_of("ImageEditJob", ImageEditBody, "/v1/images/edits"),
    _job_of("TranscriptionJob", TranscriptionBody, "/v1/audio/transcriptions", "/v1/audio/translations"),
)
"""`SubmitRequest`, endpoint by endpoint: what `POST /v1/jobs` checks in two steps."""

ID = {"job_id": JOB_ID}
MISSING = {404: "There is no such job, it is not kept any more, or it belongs to another owner."}
EVENTS = EVENT | {
    "description": "One server-sent event, called `job.queued`, `job.started`, `job.restarted`, `job.chunk`, "
    "`job.adapted`, `job.progress`, and last `job.completed`, `job.failed`, `job.cancelled` or `job.expired`."
}
LETTER = {"job_id": JOB_ID}
NO_LETTER = {404: "This job has no dead letter."}

OPERATIONS = {
    "POST /v1/jobs": Operation(
        id="submitJob",
        tag="jobs",
        scope="jobs",
        summary="Submit a job",
        description="Store a request for any inference endpoint. It is answered later, also when no worker serves its model now, and "
        "whatever dies meanwhile. The key needs the endpoint's own scope too.",
        body=SUBMISSIONS,
        examples={
            "A chat": {
                "endpoint": "/v1/chat/completions",
                "body": {"model": MODEL, "messages": [HELLO]},
                "metadata": {"customer": "42"},
            }
        },
        refuses=True,
        answers={202: Answer("The job.", {JSON_TYPE: Job}, ("x-nexus-job-id", "Location"))},
        errors={
            404: "There is no such model, or no such file.",
            429: "The queue of the model is full, or the key has as many jobs as it may have. `Retry-After` says when to retry.",
        },
    ),
    "GET /v1/jobs": Operation(
        id="listJobs",
        tag="jobs",
        scope="jobs",
        summary="List jobs",
        description="Return the caller's jobs, the newest first.",
        answers=answer(JobList, "A page of jobs."),
        parameters=PAGE
        | {
            "status": {"description": "Return jobs in this state alone."},
            "model": {"description": "Return jobs of this model alone."},
            "metadata": {
                "in": "query",
                "style": "deepObject",
                "explode": True,
                "description": "`metadata[NAME]=VALUE`: return jobs with this metadata alone.",
                "schema": {
                    "type": "object",
                    "propertyNames": {"minLength": 1, "maxLength": 64},
                    "additionalProperties": {"type": "string"},
                },
            },
        },
    ),
    "GET /v1/jobs/{job_id}": Operation(
        id="getJob",
        tag="jobs",
        scope="jobs",
        summary="Get a job",
        description="Return a job as it stands; with `wait` as soon as it has ended, or after so many seconds.",
        answers=answer(Job, "The job."),
        errors=MISSING,
        parameters={
            "job_id": JOB_ID | {"in": "path", "required": True, "schema": {"type": "string", **JOB_ID["schema"]}},
            "wait": {
                "in": "query",
                "description": "Seconds to wait for the job's end; more than 300 count as 300.",
                "schema": {"type": "number", "minimum": 0, "default": 0},
            },
        },
    ),
    "GET /v1/jobs/{job_id}/result": Operation(
        id="getJobResult",
        tag="jobs",
        scope="jobs",
        works=True,
        summary="Get a job's answer",
        description="Return the answer as the endpoint would have given it, with its content type; of a failed job its error, with its status.",
        answers={
            200: Answer(
                "The answer of the endpoint.",
                {JSON_TYPE: {"type": "object", "additionalProperties": True}, SSE_TYPE: EVENT, "text/plain": TEXT}
                | dict.fromkeys([*SPEECH_CONTENT_TYPES.values(), "application/octet-stream"], BINARY),
                ("Content-Length",),
            )
        },
        errors={
            400: "The job was cancelled (`job_cancelled`), or failed because the request was wrong.",
            404: "There is no such job, it has not ended yet (`result_not_ready`), or its answer is not kept any more.",
        },
        parameters=ID,
    ),
    "GET /v1/jobs/{job_id}/events": Operation(
        id="streamJobEvents",
        tag="jobs",
        scope="jobs",
        summary="Follow a job",
        description="Return the job's events from the first one, live until its end. A broken stream is resumed with `Last-Event-ID`.",
        answers={
            200: Answer("The events.", {SSE_TYPE: EVENTS}),
            204: Answer("`Last-Event-ID` is the job's last event: there are no more."),
        },
        errors=MISSING | {410: "The events are not kept any more; the answer may be."},
        parameters=ID
        | {
            "Last-Event-ID": {
                "in": "header",
                "description": "The id of the event behind which to go on.",
                "schema": {"type": "string", "pattern": "^([0-9]{1,9}-[0-9]{1,9}-[0-9]{1,9})?$"},
                "example": "1-1-42",
            }
        },
    ),
    "POST /v1/jobs/{job_id}/cancel": Operation(
        id="cancelJob",
        tag="jobs",
        scope="jobs",
        summary="Cancel a job",
        description="End a job. One that waits never runs; of one that runs the inference server is stopped. One that has ended stays as it is.",
        answers=answer(Job, "The job as it stands now."),
        errors=MISSING,
        parameters=ID,
    ),
    "POST /v1/jobs/{job_id}/retry": Operation(
        id="retryJob",
        tag="jobs",
        scope="jobs",
        summary="Run a failed job again",
        description="Begin a new run of a failed job, under its id.",
        answers={202: Answer("The job, queued again.", {JSON_TYPE: Job})},
        errors=MISSING | {400: "The job has not failed (`job_not_failed`), so that there is nothing to retry."},
        parameters=ID,
    ),
    "GET /v1/dlq": Operation(
        id="listDeadLetters",
        tag="operation",
        scope="admin",
        summary="List dead letters",
        description="Return jobs of all owners that killed their workers or used up their retries, the newest first.",
        answers=answer(DeadLetterList, "A page of dead letters."),
        parameters={
            "limit": {"description": "The most dead letters in a page."},
            "before": {
                "description": "The `seq` before which the page begins: that of the last one of the page before it."
            },
        },
    ),
    "GET /v1/dlq/{job_id}": Operation(
        id="getDeadLetter",
        tag="operation",
        scope="admin",
        summary="Get a dead letter",
        description="Return one dead letter, with its request where that is JSON and not too large.",
        answers=answer(DeadLetter, "The dead letter."),
        errors=NO_LETTER,
        parameters=LETTER,
    ),
    "POST /v1/dlq/{job_id}/replay": Operation(
        id="replayDeadLetter",
        tag="operation",
        scope="admin",
        summary="Run a dead letter's job again",
        description="Begin a new run of the job. The dead letter is deleted.",
        answers={202: Answer("The job, queued again.", {JSON_TYPE: Job})},
        errors=NO_LETTER | {400: "The job has not failed (`job_not_failed`)."},
        parameters=LETTER,
    ),
    "DELETE /v1/dlq/{job_id}": Operation(
        id="deleteDeadLetter",
        tag="operation",
        scope="admin",
        summary="Delete a dead letter",
        description="Delete a dead letter. Its job stays failed.",
        answers=answer(DeadLetterDeleted, "It is deleted."),
        errors=NO_LETTER,
        parameters=LETTER,
    ),
}
