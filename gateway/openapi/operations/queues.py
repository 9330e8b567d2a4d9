"""The descriptions of the routes of one model's queue."""

from __future__ import annotations

from gateway.openapi.operation import Operation, json_response
from gateway.openapi.operations.common import MODEL
from gateway.openapi.shapes.overview import QueueHoldState
from gateway.operator_requests import HoldReason

QUEUE_MODEL = {"model": {"description": "The model's name, not an alias.", "example": MODEL}}
NO_MODEL = {404: "The model does not exist (`model_not_found`)."}

OPERATIONS = {
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
