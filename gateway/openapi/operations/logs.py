"""The descriptions of the routes of logs."""

from __future__ import annotations

from gateway.openapi.operation import Operation, json_response
from gateway.openapi.shapes.logs import LogLineList

OPERATIONS = {
    "GET /v1/logs": Operation(
        id="searchLogs",
        tag="operation",
        scope="admin:read",
        summary="Search logs by an id",
        description="Return the log lines of all gateways and workers that hold the id of a request or another object, oldest first; for a request, also those of its "
        "jobs. Each process answers from its newest lines in memory (`LOG_RING_BYTES`); `processes` says how far back these reach, and which processes did not "
        "answer.",
        responses=json_response(LogLineList, "The lines that were found."),
        errors={429: "This gateway makes four searches already."},
        parameters={
            "id": {
                "description": "The id of a request (`x-request-id`), a job, a batch, a response or a file.",
                "example": "req_4e21e77669a53404c97fbbb7",
            },
            "limit": {"description": "The maximum number of lines. Older ones are left out."},
        },
    ),
}
