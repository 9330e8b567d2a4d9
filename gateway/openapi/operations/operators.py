"""The descriptions of the operators' routes: health, metrics, workers, queues, aliases, services, keys and teams."""

from __future__ import annotations

from gateway.job_requests import TeamBulkRequest
from gateway.openapi.operation import JSON, JSON_TYPE, TEXT, Operation, SuccessResponse, json_response
from gateway.openapi.operations.common import MODEL, identifier
from gateway.openapi.operations.job_filters import EXPORTED, OPERATORS_EXPORT, OPERATORS_PAGE
from gateway.openapi.shapes.jobs import BulkResult
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
    RotatedKey,
    Service,
    ServiceDeleted,
    ServiceList,
    TeamDeleted,
    TeamJob,
    TeamJobList,
    TeamList,
    TeamObject,
    WorkerDraining,
    WorkerList,
)
from gateway.operator_requests import (
    AliasTargets,
    KeyUpdate,
    NewKey,
    NewTeam,
    Rotation,
    ServiceRegistration,
    TeamUpdate,
)
from schemas.names import DISPLAY_NAME

NAME: JSON = {"minLength": 1, "maxLength": 200, "pattern": DISPLAY_NAME}
ALIAS = {"alias": {"description": "The alias.", "schema": NAME, "example": "gpt-4o-mini"}}
NO_ALIAS = {404: "The alias does not exist (`alias_not_found`)."}
SERVICE = {"name": {"description": "The service's name.", "schema": NAME, "example": "pictures"}}
NO_SERVICE = {404: "The service does not exist (`service_not_found`)."}
KEY = {"key_id": identifier("key_", "The id of a key.", "^key_[0-9a-f]{32}$")}
NO_KEY = {404: "The key does not exist or is revoked."}
TEAM = {"team_id": {"description": "The team's id, the `owner` of its keys.", "schema": NAME, "example": "team-a"}}
OF_TEAM = {"description": "The team whose jobs these are.", "example": "team-a"}
TEAM_JOB = {"job_id": identifier("job_", "The id of a job.", "^job_[0-9a-f]{32}$"), "team": OF_TEAM}
NO_BATCH = {404: "The team has no such batch (`batch_not_found`)."}
NO_TEAM_JOB = {404: "The team has no such job (`job_not_found`)."}
NO_TEAM = {404: "The team does not exist (`team_not_found`)."}

OPERATIONS = {
    "GET /health": Operation(
        id="getHealth",
        tag="operation",
        scope=None,
        summary="Check liveness",
        description="Return 200 while the gateway's process runs. Does not check any other server.",
        responses=json_response(Health, "The process runs."),
    ),
    "GET /readyz": Operation(
        id="getReadiness",
        tag="operation",
        scope=None,
        summary="Check readiness",
        description="Return the readiness of this gateway, for load balancers. With an admin key, and on the observability port, also return "
        "the state of each server that the gateway depends on.",
        responses={
            200: SuccessResponse("The gateway accepts requests: `ready` or `degraded`.", {JSON_TYPE: ReadinessState}),
            503: SuccessResponse(
                "The gateway does not accept requests: `unavailable` or `leaving`.", {JSON_TYPE: ReadinessState}
            ),
        },
    ),
    "GET /metrics": Operation(
        id="getMetrics",
        tag="operation",
        scope=None,
        summary="Read the metrics",
        description="Return the metrics in Prometheus's text format. They are at most one second old.",
        responses={200: SuccessResponse("The metrics, as `text/plain; version=1.0.0`.", {"text/plain": TEXT})},
    ),
    "GET /v1/workers": Operation(
        id="listWorkers",
        tag="operation",
        scope="admin:read",
        summary="List workers",
        description="Return all connected workers with their backend, models, state and load.",
        responses=json_response(WorkerList, "The workers."),
    ),
    "POST /v1/workers/{worker_id}/drain": Operation(
        id="drainWorker",
        tag="operation",
        scope="admin:operate",
        summary="Drain a worker",
        description="Tell a worker to finish its jobs, accept no new jobs and stop.",
        responses={
            202: SuccessResponse("The worker has received the instruction to drain.", {JSON_TYPE: WorkerDraining})
        },
        errors={404: "The worker does not exist (`worker_not_found`)."},
        parameters={"worker_id": {"description": "The worker's id, from `GET /v1/workers`.", "example": "gpu-1"}},
    ),
    "GET /v1/queues": Operation(
        id="listQueues",
        tag="operation",
        scope="admin:read",
        summary="List queues",
        description="Return all queues that hold a job, with their numbers of waiting and running jobs.",
        responses=json_response(QueueList, "The queues."),
    ),
    "GET /v1/aliases": Operation(
        id="listAliases",
        tag="operation",
        scope="admin:read",
        summary="List aliases",
        description="Return all aliases, including aliases without a live target.",
        responses=json_response(AliasList, "The aliases."),
    ),
    "PUT /v1/aliases/{alias}": Operation(
        id="putAlias",
        tag="operation",
        scope="admin:operate",
        summary="Set an alias",
        description="Create or replace an alias. Requests for it go to the first live model among its targets.",
        body=AliasTargets,
        examples={"Two models": {"targets": [MODEL, "llama3.2:1b"]}},
        responses=json_response(ModelAlias, "The alias."),
        errors={400: "The request is invalid, or the alias would have no effect. `param` names the field."},
        parameters=ALIAS,
    ),
    "DELETE /v1/aliases/{alias}": Operation(
        id="deleteAlias",
        tag="operation",
        scope="admin:operate",
        summary="Delete an alias",
        description="Delete an alias. Its target models stay unchanged.",
        responses=json_response(AliasDeleted, "The alias is deleted."),
        errors=NO_ALIAS,
        parameters=ALIAS,
    ),
    "GET /v1/services": Operation(
        id="listServices",
        tag="operation",
        scope="admin:read",
        summary="List services",
        description="Return all registered HTTP services with the state of the workers that serve them.",
        responses=json_response(ServiceList, "The services."),
    ),
    "PUT /v1/services/{name}": Operation(
        id="putService",
        tag="operation",
        scope="admin:operate",
        summary="Register a service",
        description="Register an HTTP service, or replace its record, for example after the service has moved to another URL.",
        body=ServiceRegistration,
        examples={"A service": {"base_url": "http://pictures.example.com:9000"}},
        responses=json_response(Service, "The service."),
        parameters=SERVICE,
    ),
    "DELETE /v1/services/{name}": Operation(
        id="deleteService",
        tag="operation",
        scope="admin:operate",
        summary="Delete a service",
        description="Delete a service's record. The service itself keeps running.",
        responses=json_response(ServiceDeleted, "The service is deleted."),
        errors=NO_SERVICE,
        parameters=SERVICE,
    ),
    "POST /v1/keys": Operation(
        id="createKey",
        tag="operation",
        scope="admin:keys",
        summary="Create an API key",
        description="Create an API key. Only this response contains `key` and `webhook_secret`. Members who have signed in use the routes for "
        "keys too, for the keys of their own team with the scopes `inference` and `jobs`.",
        body=NewKey,
        examples={"A user": {"name": "alice", "owner": "team-a", "scopes": ["inference", "jobs"]}},
        responses={201: SuccessResponse("The key.", {JSON_TYPE: CreatedKey})},
    ),
    "GET /v1/keys": Operation(
        id="listKeys",
        tag="operation",
        scope="admin:keys",
        summary="List API keys",
        description="Return all keys that are not revoked, newest first, without the secret keys themselves.",
        responses=json_response(KeyList, "The keys."),
    ),
    "GET /v1/keys/{key_id}": Operation(
        id="getKey",
        tag="operation",
        scope="admin:keys",
        summary="Get an API key",
        description="Return one key that is not revoked, without the secret key itself, and what is left of its budgets.",
        responses=json_response(Key, "The key."),
        errors=NO_KEY,
        parameters=KEY,
    ),
    "PATCH /v1/keys/{key_id}": Operation(
        id="changeKey",
        tag="operation",
        scope="admin:keys",
        summary="Change an API key",
        description="Change a key's name, scopes, end or limits. Fields that are left out stay; null removes a limit. All gateways apply the "
        "change within milliseconds, in the worst case within seconds.",
        body=KeyUpdate,
        examples={"A limit": {"requests_per_minute": 60}},
        responses=json_response(Key, "The key."),
        errors=NO_KEY,
        parameters=KEY,
    ),
    "POST /v1/keys/{key_id}/rotate": Operation(
        id="rotateKey",
        tag="operation",
        scope="admin:keys",
        summary="Rotate an API key",
        description="Replace a key by a new one with the same id, limits and webhook secret. The replaced key stays valid for `overlap_s` "
        "seconds. Only this response contains the new `key`.",
        body=Rotation,
        examples={"An hour": {"overlap_s": 3600}},
        responses=json_response(RotatedKey, "The key."),
        errors=NO_KEY,
        parameters=KEY,
    ),
    "DELETE /v1/keys/{key_id}": Operation(
        id="revokeKey",
        tag="operation",
        scope="admin:keys",
        summary="Revoke an API key",
        description="Revoke a key permanently. All gateways reject it within milliseconds, in the worst case within seconds, end its open calls, "
        "and refuse the result URLs that it got. If the request fails after the key was revoked, its jobs are kept.",
        responses=json_response(KeyDeleted, "The key is revoked."),
        errors=NO_KEY,
        parameters=KEY
        | {
            "jobs": {
                "description": "`keep`: unfinished jobs and batches of the key go on. `cancel`: they are cancelled."
            }
        },
    ),
    "POST /v1/teams": Operation(
        id="createTeam",
        tag="operation",
        scope="admin:keys",
        summary="Create a team",
        description="Create a team with limits of its own. Its keys are those whose `owner` is its id.",
        body=NewTeam,
        examples={"A team": {"id": "team-a", "requests_per_minute": 600, "models": ["llama3*"]}},
        responses={201: SuccessResponse("The team.", {JSON_TYPE: TeamObject})},
    ),
    "GET /v1/teams": Operation(
        id="listTeams",
        tag="operation",
        scope="admin:keys",
        summary="List teams",
        description="Return all teams, sorted by id: those with limits of their own, and those that exist because a key or a person belongs to them.",
        responses=json_response(TeamList, "The teams."),
    ),
    "GET /v1/teams/{team_id}": Operation(
        id="getTeam",
        tag="operation",
        scope="admin:keys",
        summary="Get a team",
        description="Return one team, and what is left of its budgets.",
        responses=json_response(TeamObject, "The team."),
        errors=NO_TEAM,
        parameters=TEAM,
    ),
    "PATCH /v1/teams/{team_id}": Operation(
        id="changeTeam",
        tag="operation",
        scope="admin:keys",
        summary="Change a team",
        description="Change a team's end or limits. Fields that are left out stay; null restores the default of the settings. All gateways apply "
        "the change within milliseconds, in the worst case within seconds.",
        body=TeamUpdate,
        examples={"A limit": {"tokens_per_minute": 100_000}},
        responses=json_response(TeamObject, "The team."),
        errors=NO_TEAM,
        parameters=TEAM,
    ),
    "DELETE /v1/teams/{team_id}": Operation(
        id="deleteTeam",
        tag="operation",
        scope="admin:keys",
        summary="Delete a team",
        description="Delete a team that has neither keys nor people. Its jobs and files stay until their retention ends.",
        responses=json_response(TeamDeleted, "The team is deleted."),
        errors=NO_TEAM | {400: "The team has keys (`team_has_keys`) or people (`team_has_people`)."},
        parameters=TEAM,
    ),
    "GET /v1/admin/jobs": Operation(
        id="listTeamJobs",
        tag="operation",
        scope="admin:read",
        summary="List the jobs of all teams",
        description="Return the jobs of all teams that meet all filters, newest first, without what callers wrote: no metadata, webhooks, results or "
        "messages of errors.",
        responses=json_response(TeamJobList, "A page of jobs."),
        errors=NO_BATCH,
        parameters=OPERATORS_PAGE,
    ),
    "GET /v1/admin/jobs/export": Operation(
        id="exportTeamJobs",
        tag="operation",
        scope="admin:read",
        summary="Export the jobs of all teams",
        description="Return the jobs of all teams that meet all filters, as JSON lines or CSV, without what callers wrote. An export that cannot be "
        "completed breaks off.",
        responses=EXPORTED,
        errors=NO_BATCH,
        parameters=OPERATORS_EXPORT,
    ),
    "POST /v1/admin/jobs/bulk/cancel": Operation(
        id="cancelTeamJobs",
        tag="operation",
        scope="admin:operate",
        summary="Cancel many jobs of any team",
        description="Cancel the jobs of `team` with these ids, or those of all teams that meet a filter: without `status` in it, all that wait or run.",
        body=TeamBulkRequest,
        examples={"By filter": {"filter": {"team": "team-a", "model": MODEL}}},
        responses=json_response(BulkResult, "What was done."),
        errors=NO_BATCH,
    ),
    "POST /v1/admin/jobs/bulk/retry": Operation(
        id="retryTeamJobs",
        tag="operation",
        scope="admin:operate",
        summary="Retry many failed jobs of any team",
        description="Start new runs of the jobs of `team` with these ids, or of those of all teams that meet a filter: without `status` in it, all "
        "that failed.",
        body=TeamBulkRequest,
        examples={"By filter": {"filter": {"error": "worker_lost"}}},
        responses=json_response(BulkResult, "What was done."),
        errors=NO_BATCH,
    ),
    "GET /v1/admin/jobs/{job_id}": Operation(
        id="getTeamJob",
        tag="operation",
        scope="admin:read",
        summary="Get the state of a team's job",
        description="Return the state of one job, without what the caller wrote.",
        responses=json_response(TeamJob, "The job."),
        errors=NO_TEAM_JOB,
        parameters=TEAM_JOB,
    ),
    "POST /v1/admin/jobs/{job_id}/cancel": Operation(
        id="cancelTeamJob",
        tag="operation",
        scope="admin:operate",
        summary="Cancel a team's job",
        description="Cancel a job of any team. A queued job never runs, a running job is stopped, an ended job stays unchanged.",
        responses=json_response(TeamJob, "The job."),
        errors=NO_TEAM_JOB,
        parameters=TEAM_JOB,
    ),
}
