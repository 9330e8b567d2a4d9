"""The descriptions of the routes of one model's queue."""

from __future__ import annotations

from gateway.openapi.operation import Operation, json_response
from gateway.openapi.operations.common import MODEL
from gateway.openapi.operations.operators import NO_TEAM_JOB, TEAM_JOB
from gateway.openapi.shapes.operators import TeamJob
from gateway.openapi.shapes.overview import QueuedJobList, QueueHoldState
from gateway.operator_requests import HoldReason, LaneChoice

QUEUE_MODEL = {"model": {"description": "The model's name, not an alias.", "example": MODEL}}
NO_MODEL = {404: "The model does not exist (`model_not_found`)."}

OPERATIONS = {
    "GET /v1/queues/{model}/jobs": Operation(
        id="listQueuedJobs",
        tag="operation",
        scope="admin:read",
        summary="List the jobs of a queue",
        description="Return the jobs that wait for a model, in the order in which they will start by lanes and by the teams' shares, and those that run. "
        "Nothing of their content is shown. Jobs of one lane that take longer or shorter than before change the order; a worker that keeps a loaded model may, too.",
        responses=json_response(QueuedJobList, "A page of the queue."),
        errors=NO_MODEL | {400: "`after` is not a cursor of this queue, or `model` is an alias."},
        parameters=QUEUE_MODEL
        | {
            "after": {"description": "The cursor `next` of the page before."},
            "limit": {"description": "The number of waiting jobs on a page. Pages of very large jobs are shorter."},
        },
    ),
    "POST /v1/admin/jobs/{job_id}/lane": Operation(
        id="changeTeamJobLane",
        tag="operation",
        scope="admin:operate",
        summary="Change the lane of a job",
        description="Let a waiting job of a team wait in another lane, behind the team's jobs there. It runs once, whatever is killed meanwhile.",
        body=LaneChoice,
        examples={"First": {"lane": "priority"}},
        responses=json_response(TeamJob, "The job in its new lane."),
        errors=NO_TEAM_JOB | {409: "The job does not wait (`job_not_waiting`)."},
        parameters=TEAM_JOB,
    ),
    "POST /v1/queues/{model}/hold": Operation(
        id="holdQueue",
        tag="operation",
        scope="admin:operate",
        summary="Hold a queue",
        description="Hold the waiting jobs of a model: no worker starts one until they are released, through restarts of every part. Jobs that run go on, "
        "and a job that a worker gives back is held too. New jobs are accepted and wait; those that reach their queue limit meanwhile may wait for it again, "
        "while a `timeout` of their caller still ends them. Requests that do not become jobs get 503 `model_held`, those that wait as well.",
        body=HoldReason,
        examples={"Maintenance": {"reason": "The GPU host is being updated"}},
        responses=json_response(QueueHoldState, "The model's jobs are held."),
        errors=NO_MODEL | {400: "The request is invalid, or `model` is an alias."},
        parameters=QUEUE_MODEL,
    ),
    "POST /v1/queues/{model}/release": Operation(
        id="releaseQueue",
        tag="operation",
        scope="admin:operate",
        summary="Release a queue",
        description="Let workers start the held jobs of a model. A queue that is not held stays as it is.",
        responses=json_response(QueueHoldState, "The model's jobs are not held."),
        errors=NO_MODEL | {400: "`model` is an alias."},
        parameters=QUEUE_MODEL,
    ),
}
