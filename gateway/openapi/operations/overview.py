"""The descriptions of the routes that show what happens now."""

from __future__ import annotations

from gateway.openapi.operation import EVENT, SSE_TYPE, Operation, SuccessResponse, json_response
from gateway.openapi.shapes.overview import Overview

OPERATIONS = {
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
