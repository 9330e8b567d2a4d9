"""The descriptions of the routes for jobs and dead letters."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, create_model

from gateway.files import MAX_FILES
from gateway.job_requests import BulkRequest, GroupRequest
from gateway.openapi.operation import (
    BINARY,
    EVENT,
    JSON_TYPE,
    SSE_TYPE,
    TEXT,
    Operation,
    SuccessResponse,
    json_response,
)
from gateway.openapi.operations.common import JOB_ID, MODEL
from gateway.openapi.operations.inference import HELLO
from gateway.openapi.operations.job_filters import EXPORTED, OWN_EXPORT, OWN_PAGE
from gateway.openapi.operations.messages import DOCUMENTED_REQUEST as DOCUMENTED_MESSAGE
from gateway.openapi.shapes.jobs import (
    BulkResult,
    DeadLetterDeleted,
    DeadLetterGroupList,
    DeadLetterList,
    DeadLetterObject,
    DeadLetterResult,
    Job,
    JobInput,
    JobList,
)
from schemas.endpoints import ENDPOINTS, EndpointSpec
from schemas.openai.speech import SPEECH_CONTENT_TYPES
from schemas.submission import SubmitRequest

FileIds = str | Annotated[list[str], Field(min_length=1, max_length=MAX_FILES)]
"""The id of one uploaded file, or the ids of several."""


BODY_NAMES = {"ImageEditJob": "ImageEditBody", "TranscriptionJob": "TranscriptionBody"}
"""Components for bodies with ids of files: their names never change."""


def _body_of(spec: EndpointSpec) -> type[BaseModel]:
    """Return the model of a job's body: a form's files are ids of uploaded files."""
    if not spec.files:
        return spec.schema
    first, *others = spec.files
    fields: dict[str, Any] = {first: (FileIds, ...)} | dict.fromkeys(others, (FileIds | None, None))
    return create_model(
        BODY_NAMES.get(spec.job, f"{spec.job.removesuffix('Job')}Body"),
        __base__=spec.schema,
        __doc__=f"The form's fields, with {'ids of uploaded files instead of files' if others else 'the id of an uploaded file instead of the file'}.",
        **fields,
    )


def _submissions() -> Iterator[type[BaseModel]]:
    """Yield a model for each form of body, the plain ones first."""
    for job, specs in groupby(sorted(ENDPOINTS, key=lambda spec: bool(spec.files)), key=lambda spec: spec.job):
        first, *others = specs
        paths = (first.path, *(spec.path for spec in others))
        fields: dict[str, Any] = {"endpoint": (Literal[paths], ...), "body": (_body_of(first), ...)}
        yield create_model(job, __base__=SubmitRequest, __doc__=f"A job for `{'`, `'.join(paths)}`.", **fields)
    fields = {"endpoint": (Literal["/v1/messages"], ...), "body": (DOCUMENTED_MESSAGE, ...)}
    yield create_model("MessageJob", __base__=SubmitRequest, __doc__="A job for `/v1/messages`.", **fields)


SUBMISSIONS = tuple(_submissions())
"""`SubmitRequest` for each endpoint. `POST /v1/jobs` validates the envelope first and the body second."""

ID = {"job_id": JOB_ID}
MISSING = {404: "The job does not exist, has been deleted after its retention time, or belongs to another owner."}
CANCEL_EXAMPLE = {"By filter": {"filter": {"model": MODEL, "metadata[customer]": "42"}}}
RETRY_EXAMPLE = {"By filter": {"filter": {"error": "worker_lost"}, "limit": 200}}
GROUP_EXAMPLE = {"A group": {"error": "worker_lost", "model": MODEL}}
MISSING_BATCH = {404: "The batch does not exist (`batch_not_found`)."}
EVENTS = EVENT | {
    "description": "One server-sent event: `job.queued`, `job.started`, `job.restarted`, `job.chunk`, `job.adapted` or `job.progress`. "
    "The last event is `job.completed`, `job.failed`, `job.cancelled` or `job.expired`."
}
LETTER = {"job_id": JOB_ID}
NO_LETTER = {404: "The job has no dead letter."}

OPERATIONS = {
    "POST /v1/jobs": Operation(
        id="submitJob",
        tag="jobs",
        scope="jobs",
        summary="Submit a job",
        description="Store a request for any inference endpoint. A worker runs it later, even if no worker serves its model yet, and the job "
        "survives restarts of every process. The key also needs the endpoint's own scope.",
        body=SUBMISSIONS,
        examples={
            "A chat": {
                "endpoint": "/v1/chat/completions",
                "body": {"model": MODEL, "messages": [HELLO]},
                "metadata": {"customer": "42"},
            }
        },
        may_answer_other_4xx=True,
        responses={202: SuccessResponse("The job.", {JSON_TYPE: Job}, ("x-nexus-job-id", "Location"))},
        errors={
            404: "The model or a file does not exist.",
            429: "The model's queue is full, or the key has reached its limit of waiting jobs. `Retry-After` says when to retry.",
        },
    ),
    "GET /v1/jobs": Operation(
        id="listJobs",
        tag="jobs",
        scope="jobs",
        summary="List jobs",
        description="Return the caller's jobs that meet all filters, newest first. A page may be empty and have a next one: a search that looks at "
        "very many jobs pauses after two seconds.",
        responses=json_response(JobList, "A page of jobs."),
        errors=MISSING_BATCH,
        parameters=OWN_PAGE,
    ),
    "GET /v1/jobs/export": Operation(
        id="exportJobs",
        tag="jobs",
        scope="jobs",
        summary="Export jobs",
        description="Return the caller's jobs that meet all filters, as JSON lines or CSV. In CSV, text that a spreadsheet would take for a formula "
        "begins with an apostrophe. An export that cannot be completed breaks off.",
        responses=EXPORTED,
        errors=MISSING_BATCH,
        parameters=OWN_EXPORT,
    ),
    "POST /v1/jobs/bulk/cancel": Operation(
        id="cancelJobs",
        tag="jobs",
        scope="jobs",
        summary="Cancel many jobs",
        description="Cancel the jobs with these ids, or those that meet a filter: without `status` in it, all that wait or run. One call changes at "
        "most 200 jobs, each on its own; repeat it with `after` while `has_more` is true.",
        body=BulkRequest,
        examples=CANCEL_EXAMPLE,
        responses=json_response(BulkResult, "What was done."),
        errors=MISSING_BATCH,
    ),
    "POST /v1/jobs/bulk/retry": Operation(
        id="retryJobs",
        tag="jobs",
        scope="jobs",
        summary="Retry many failed jobs",
        description="Start new runs of the jobs with these ids, or of those that meet a filter: without `status` in it, all that failed. One call "
        "changes at most 200 jobs, each on its own; repeat it with `after` while `has_more` is true.",
        body=BulkRequest,
        examples=RETRY_EXAMPLE,
        responses=json_response(BulkResult, "What was done."),
        errors=MISSING_BATCH,
    ),
    "GET /v1/jobs/{job_id}": Operation(
        id="getJob",
        tag="jobs",
        scope="jobs",
        summary="Get a job",
        description="Return a job's current state. With `wait`, return when the job has ended, or after this number of seconds.",
        responses=json_response(Job, "The job."),
        errors=MISSING,
        parameters={
            "job_id": JOB_ID | {"in": "path", "required": True, "schema": {"type": "string", **JOB_ID["schema"]}},
            "wait": {
                "in": "query",
                "description": "The maximum number of seconds to wait for the job to end. Values above 300 count as 300.",
                "schema": {"type": "number", "minimum": 0, "default": 0},
            },
        },
    ),
    "GET /v1/jobs/{job_id}/input": Operation(
        id="getJobInput",
        tag="jobs",
        scope="jobs",
        summary="Get a job's request",
        description="Return the request that the job runs, as JSON. It is stored with the job's events, up to 64 KiB, and not for encrypted jobs and "
        "lines of batches. Files are not part of it.",
        responses=json_response(JobInput, "The request."),
        errors={404: "The job does not exist, or its request is not stored (`input_not_kept`)."},
        parameters=ID,
    ),
    "GET /v1/jobs/{job_id}/result": Operation(
        id="getJobResult",
        tag="jobs",
        scope="jobs",
        runs_inference=True,
        summary="Get a job's result",
        description="Return the response that the endpoint would have returned, with its content type. For a failed job, return its error with the error's status.",
        responses={
            200: SuccessResponse(
                "The endpoint's response.",
                {JSON_TYPE: {"type": "object", "additionalProperties": True}, SSE_TYPE: EVENT, "text/plain": TEXT}
                | dict.fromkeys([*SPEECH_CONTENT_TYPES.values(), "application/octet-stream"], BINARY),
                ("Content-Length",),
            )
        },
        errors={
            400: "The job was cancelled (`job_cancelled`), or failed because its request is invalid.",
            404: "The job does not exist, has not ended yet (`result_not_ready`), or its result has been deleted after its retention time (`result_expired`).",
        },
        parameters=ID,
    ),
    "GET /v1/jobs/{job_id}/events": Operation(
        id="streamJobEvents",
        tag="jobs",
        scope="jobs",
        summary="Follow a job",
        description="Return the job's events from the first one on, and new events until the job ends. Resume a broken stream with `Last-Event-ID`.",
        responses={
            200: SuccessResponse("The events.", {SSE_TYPE: EVENTS}),
            204: SuccessResponse("`Last-Event-ID` is the job's last event. There are no further events."),
        },
        errors=MISSING
        | {
            410: "The events have been deleted after their retention time. The result may still exist: `GET /v1/jobs/{job_id}/result`."
        },
        parameters=ID
        | {
            "Last-Event-ID": {
                "in": "header",
                "description": "The id of the last event received. The stream continues after it.",
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
        description="End a job. A waiting job never runs; for a running job, the inference server stops. A job that has ended stays unchanged.",
        responses=json_response(Job, "The job's current state."),
        errors=MISSING,
        parameters=ID,
    ),
    "POST /v1/jobs/{job_id}/retry": Operation(
        id="retryJob",
        tag="jobs",
        scope="jobs",
        summary="Retry a failed job",
        description="Start a new run of a failed job under the same id.",
        responses={202: SuccessResponse("The job, back in the queue.", {JSON_TYPE: Job})},
        errors=MISSING | {400: "The job has not failed (`job_not_failed`). Only failed jobs can be retried."},
        parameters=ID,
    ),
    "GET /v1/dlq": Operation(
        id="listDeadLetters",
        tag="operation",
        scope="admin:read",
        summary="List dead letters",
        description="Return the jobs of all owners that lost their worker too often or used up their retries, newest first.",
        responses=json_response(DeadLetterList, "A page of dead letters."),
        parameters={
            "limit": {"description": "The maximum number of dead letters in a page."},
            "before": {
                "description": "The `seq` of the last dead letter of the previous page. The page begins before it."
            },
        },
    ),
    "GET /v1/dead-letter-groups": Operation(
        id="listDeadLetterGroups",
        tag="operation",
        scope="admin:read",
        summary="Group dead letters",
        description="Return the dead letters in groups of one error and one model, the largest group first. At most the newest 5,000 are read.",
        responses=json_response(DeadLetterGroupList, "The groups."),
    ),
    "POST /v1/dlq/bulk/replay": Operation(
        id="replayDeadLetters",
        tag="operation",
        scope="admin:operate",
        summary="Replay many dead letters",
        description="Start new runs of the jobs with these ids, or of those of a group, and delete their dead letters. Repeat the call with `before` "
        "while `has_more` is true.",
        body=GroupRequest,
        examples=GROUP_EXAMPLE,
        responses=json_response(DeadLetterResult, "What was done."),
    ),
    "POST /v1/dlq/bulk/delete": Operation(
        id="deleteDeadLetters",
        tag="operation",
        scope="admin:operate",
        summary="Delete many dead letters",
        description="Delete the dead letters of these jobs, or those of a group. The jobs keep the status `failed`.",
        body=GroupRequest,
        examples=GROUP_EXAMPLE,
        responses=json_response(DeadLetterResult, "What was done."),
    ),
    "GET /v1/dlq/{job_id}": Operation(
        id="getDeadLetter",
        tag="operation",
        scope="admin:read",
        summary="Get a dead letter",
        description="Return one dead letter, with its request if that is JSON of at most 256 KiB.",
        responses=json_response(DeadLetterObject, "The dead letter."),
        errors=NO_LETTER,
        parameters=LETTER,
    ),
    "POST /v1/dlq/{job_id}/replay": Operation(
        id="replayDeadLetter",
        tag="operation",
        scope="admin:operate",
        summary="Replay a dead letter",
        description="Start a new run of the job and delete the dead letter.",
        responses={202: SuccessResponse("The job, back in the queue.", {JSON_TYPE: Job})},
        errors=NO_LETTER | {400: "The job has not failed (`job_not_failed`)."},
        parameters=LETTER,
    ),
    "DELETE /v1/dlq/{job_id}": Operation(
        id="deleteDeadLetter",
        tag="operation",
        scope="admin:operate",
        summary="Delete a dead letter",
        description="Delete a dead letter. The job keeps the status `failed`.",
        responses=json_response(DeadLetterDeleted, "The dead letter is deleted."),
        errors=NO_LETTER,
        parameters=LETTER,
    ),
}
