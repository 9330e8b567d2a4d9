"""What operators use: health, metrics, workers, queues, aliases, services, keys."""

from __future__ import annotations

from gateway.openapi.operation import JSON, JSON_TYPE, TEXT, Answer, Operation, answer
from gateway.openapi.operations.common import MODEL, identifier
from gateway.openapi.shapes.operators import (
    AliasDeleted,
    AliasList,
    CreatedKey,
    Health,
    Key,
    KeyDeleted,
    KeyList,
    ModelAlias,
    QueueList,
    ReadinessState,
    Service,
    ServiceDeleted,
    ServiceList,
    WorkerDraining,
    WorkerList,
)
from gateway.routes.aliases import Targets
from gateway.routes.keys import NewKey
from gateway.routes.services import Record
from schemas.names import DISPLAY_NAME

NAME: JSON = {"minLength": 1, "maxLength": 200, "pattern": DISPLAY_NAME}
ALIAS = {"alias": {"description": "The alias.", "schema": NAME, "example": "gpt-4o-mini"}}
NO_ALIAS = {404: "There is no such alias (`alias_not_found`)."}
SERVICE = {"name": {"description": "The service's name.", "schema": NAME, "example": "pictures"}}
NO_SERVICE = {404: "There is no such service (`service_not_found`)."}
KEY = {"key_id": identifier("key_", "The id of a key.", "^key_[0-9a-f]{32}$")}
NO_KEY = {404: "There is no such key, or it is revoked."}

OPERATIONS = {
    "GET /health": Operation(
        id="getHealth",
        tag="operation",
        scope=None,
        summary="Check that the process runs",
        description="Return 200 as long as the gateway's process runs. It asks no other part.",
        answers=answer(Health, "The process runs."),
    ),
    "GET /readyz": Operation(
        id="getReadiness",
        tag="operation",
        scope=None,
        summary="Check that requests should come here",
        description="Return whether this gateway can do its work, for load balancers. An admin key, and the observability port, also get "
        "the state of each part.",
        answers={
            200: Answer("Requests should come here: `ready` or `degraded`.", {JSON_TYPE: ReadinessState}),
            503: Answer("Requests should not come here: `unavailable` or `leaving`.", {JSON_TYPE: ReadinessState}),
        },
    ),
    "GET /metrics": Operation(
        id="getMetrics",
        tag="operation",
        scope=None,
        summary="Read the metrics",
        description="Return Prometheus's text format, at most a second old.",
        answers={200: Answer("The metrics, as `text/plain; version=1.0.0`.", {"text/plain": TEXT})},
    ),
    "GET /v1/workers": Operation(
        id="listWorkers",
        tag="operation",
        scope="admin",
        summary="List workers",
        description="Return every connected worker: its backend, models, state and load.",
        answers=answer(WorkerList, "The workers."),
    ),
    "POST /v1/workers/{worker_id}/drain": Operation(
        id="drainWorker",
        tag="operation",
        scope="admin",
        summary="Drain a worker",
        description="Tell a worker to finish its jobs, take no more, and stop.",
        answers={202: Answer("The worker was told.", {JSON_TYPE: WorkerDraining})},
        errors={404: "There is no such worker (`worker_not_found`)."},
        parameters={"worker_id": {"description": "The worker's id, from `GET /v1/workers`.", "example": "gpu-1"}},
    ),
    "GET /v1/queues": Operation(
        id="listQueues",
        tag="operation",
        scope="admin",
        summary="List queues",
        description="Return every queue that holds a job, with how many wait and run.",
        answers=answer(QueueList, "The queues."),
    ),
    "GET /v1/aliases": Operation(
        id="listAliases",
        tag="operation",
        scope="admin",
        summary="List aliases",
        description="Return every alias, also those of which no target is live.",
        answers=answer(AliasList, "The aliases."),
    ),
    "PUT /v1/aliases/{alias}": Operation(
        id="putAlias",
        tag="operation",
        scope="admin",
        summary="Set an alias",
        description="Create or replace a name that stands for the first of its targets that is live.",
        body=Targets,
        examples={"Two models": {"targets": [MODEL, "llama3.2:1b"]}},
        answers=answer(ModelAlias, "The alias."),
        errors={400: "The request is wrong, or the alias would be without effect. `param` names the field."},
        parameters=ALIAS,
    ),
    "DELETE /v1/aliases/{alias}": Operation(
        id="deleteAlias",
        tag="operation",
        scope="admin",
        summary="Delete an alias",
        description="Delete an alias. The models that it stands for are left alone.",
        answers=answer(AliasDeleted, "It is deleted."),
        errors=NO_ALIAS,
        parameters=ALIAS,
    ),
    "GET /v1/services": Operation(
        id="listServices",
        tag="operation",
        scope="admin",
        summary="List services",
        description="Return every registered HTTP service, with the state of the worker that serves it.",
        answers=answer(ServiceList, "The services."),
    ),
    "PUT /v1/services/{name}": Operation(
        id="putService",
        tag="operation",
        scope="admin",
        summary="Register a service",
        description="Register an HTTP service, or replace its record. A service that has moved is served at its new place.",
        body=Record,
        examples={"A service": {"base_url": "http://pictures.example.com:9000"}},
        answers=answer(Service, "The service."),
        parameters=SERVICE,
    ),
    "DELETE /v1/services/{name}": Operation(
        id="deleteService",
        tag="operation",
        scope="admin",
        summary="Remove a service",
        description="Delete a service's record. The service itself is left alone.",
        answers=answer(ServiceDeleted, "It is deleted."),
        errors=NO_SERVICE,
        parameters=SERVICE,
    ),
    "POST /v1/keys": Operation(
        id="createKey",
        tag="operation",
        scope="admin",
        summary="Create an API key",
        description="Make a key. `key` and `webhook_secret` are in this answer and in no other.",
        body=NewKey,
        examples={"A user": {"name": "alice", "owner": "team-a", "scopes": ["inference", "jobs"]}},
        answers={201: Answer("The key.", {JSON_TYPE: CreatedKey})},
    ),
    "GET /v1/keys": Operation(
        id="listKeys",
        tag="operation",
        scope="admin",
        summary="List API keys",
        description="Return every key that is not revoked, the newest first, without the keys themselves.",
        answers=answer(KeyList, "The keys."),
    ),
    "GET /v1/keys/{key_id}": Operation(
        id="getKey",
        tag="operation",
        scope="admin",
        summary="Get an API key",
        description="Return one key that is not revoked, without the key itself.",
        answers=answer(Key, "The key."),
        errors=NO_KEY,
        parameters=KEY,
    ),
    "DELETE /v1/keys/{key_id}": Operation(
        id="revokeKey",
        tag="operation",
        scope="admin",
        summary="Revoke an API key",
        description="End a key for good. Every gateway refuses it within milliseconds, at the worst within seconds.",
        answers=answer(KeyDeleted, "It is revoked."),
        errors=NO_KEY,
        parameters=KEY,
    ),
}
