"""The descriptions of the routes of the inspector."""

from __future__ import annotations

from gateway.openapi.operation import JSON, Operation, json_response
from gateway.openapi.operations.common import identifier
from gateway.openapi.shapes.inspector import (
    InspectedRequestList,
    InspectedRequestObject,
    InspectionList,
    InspectionState,
)
from gateway.operator_requests import InspectionStart
from schemas.names import DISPLAY_NAME

NAME: JSON = {"minLength": 1, "maxLength": 200, "pattern": DISPLAY_NAME}
TEAM = {"team_id": {"description": "The team's id, the `owner` of its keys.", "schema": NAME, "example": "team-a"}}
OF_TEAM = {"team": {"description": "The team whose requests these are.", "example": "team-a"}}
NO_TEAM = {404: "The team does not exist (`team_not_found`)."}

OPERATIONS = {
    "GET /v1/inspector": Operation(
        id="getOwnInspection",
        tag="operation",
        summary="See whether your requests are inspected",
        description="Return whether administrators keep the requests and answers of the caller's team, and until when. Answers to such requests have the header "
        "`x-nexus-inspected: true`.",
        responses=json_response(InspectionState, "The state."),
    ),
    "GET /v1/inspector/teams": Operation(
        id="listInspections",
        tag="operation",
        scope="admin:keys",
        summary="List inspected teams",
        description="Return the teams whose requests are kept now.",
        responses=json_response(InspectionList, "The teams."),
    ),
    "PUT /v1/inspector/teams/{team_id}": Operation(
        id="startInspection",
        tag="operation",
        scope="admin:keys",
        summary="Inspect a team's requests",
        description="Keep the newest requests and answers of a team from now on, for a limited time, redacted, to be read by administrators. The team sees that it is "
        "inspected. Not possible for a team with `retain: none`, nor for the bootstrap key.",
        body=InspectionStart,
        responses=json_response(InspectionState, "The state."),
        errors=NO_TEAM,
        parameters=TEAM,
    ),
    "DELETE /v1/inspector/teams/{team_id}": Operation(
        id="stopInspection",
        tag="operation",
        scope="admin:keys",
        summary="Stop to inspect a team",
        description="Stop, and delete the requests that were kept.",
        responses=json_response(InspectionState, "The state."),
        errors=NO_TEAM,
        parameters=TEAM,
    ),
    "GET /v1/inspector/requests": Operation(
        id="listInspectedRequests",
        tag="operation",
        scope="admin:keys",
        summary="List inspected requests",
        description="Return the kept requests of a team, newest first, without their bodies.",
        responses=json_response(InspectedRequestList, "The requests."),
        parameters=OF_TEAM,
    ),
    "GET /v1/inspector/requests/{request_id}": Operation(
        id="getInspectedRequest",
        tag="operation",
        scope="admin:keys",
        summary="Read an inspected request",
        description="Return a kept request and its answer, redacted and cut at 64 KiB each, with its times.",
        responses=json_response(InspectedRequestObject, "The request."),
        errors={404: "The request is not kept (`inspected_request_not_found`)."},
        parameters=OF_TEAM
        | {"request_id": identifier("job_", "The `id` in the list: that of the request's job.", "^job_[0-9a-f]{32}$")},
    ),
}
