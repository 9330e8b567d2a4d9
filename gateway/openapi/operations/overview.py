"""The descriptions of the routes that show what happens now."""

from __future__ import annotations

from gateway.openapi.operation import EVENT, SSE_TYPE, Operation, SuccessResponse, json_response
from gateway.openapi.shapes.logs import WorkerLogLines
from gateway.openapi.shapes.overview import HostList, Overview, PublicStatusObject

OPERATIONS = {
    "GET /status.json": Operation(
        id="getStatus",
        tag="operation",
        scope=None,
        summary="Read the public status",
        description="Return for each model that is served whether it is up, and about how long a job takes. It holds no figures and nothing of teams, and is five seconds "
        "old at most. It is served where `PUBLIC_ROUTES` contains `status`: the names of models are shown to anybody then.",
        responses=json_response(PublicStatusObject, "The status."),
    ),
    "GET /v1/hosts": Operation(
        id="listHosts",
        tag="operation",
        scope="admin:read",
        summary="List hosts",
        description="Return the workers by host, with those that vanished in the last 15 minutes.",
        responses=json_response(HostList, "The hosts."),
    ),
    "GET /v1/workers/{worker_id}/logs": Operation(
        id="tailWorkerLog",
        tag="operation",
        scope="admin:read",
        summary="Read the log of a worker",
        description="Return the newest log lines that a worker holds in memory (`LOG_RING_BYTES`), oldest first. What a worker says is text, and is not checked.",
        responses=json_response(WorkerLogLines, "The lines."),
        errors={
            404: "The worker does not exist (`worker_not_found`).",
            429: "This gateway makes four searches of logs already.",
            503: "The worker did not answer in time (`worker_silent`).",
        },
        parameters={
            "worker_id": {"description": "The worker's id, from `GET /v1/workers`.", "example": "gpu-1"},
            "limit": {"description": "The maximum number of lines. Older ones are left out."},
        },
    ),
    "GET /v1/overview": Operation(
        id="getOverview",
        tag="operation",
        scope="admin:read",
        summary="Read the overview",
        description="Return what happens now, over all gateways: a row for each model that is served or has jobs, and what needs attention, each "
        "with what to do. It is about one second old at most.",
        responses=json_response(Overview, "The overview."),
    ),
    "GET /v1/overview/events": Operation(
        id="followOverview",
        tag="operation",
        scope="admin:read",
        summary="Follow the overview",
        description="Return the overview as server-sent events, one each second. `overview` holds the whole, as `GET /v1/overview` does. `changes` "
        "holds what differs from the event before: rows to add or replace in `models`, names of rows to drop in `removed`, and all of "
        "`attention` if it has changed. A follower that reads too slowly gets the whole again. While NATS is away the stream goes on, and "
        "`stale_since` says so.",
        responses={
            200: SuccessResponse(
                "The events.",
                {SSE_TYPE: EVENT | {"description": "An event `overview` or `changes`, whose `data` is JSON."}},
            )
        },
    ),
}
