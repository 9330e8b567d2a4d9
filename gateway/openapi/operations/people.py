"""The descriptions of the routes for people and sessions."""

from __future__ import annotations

from gateway.openapi.operation import JSON_TYPE, Operation, SuccessResponse, json_response
from gateway.openapi.operations.common import identifier
from gateway.openapi.shapes.people import LoginLink, PersonList, PersonObject, SessionEnded, SessionObject
from gateway.operator_requests import PersonUpdate

PERSON = {"person_id": identifier("person_", "The id of a person.", "^person_[0-9a-f]{32}$")}
NO_PERSON = {404: "The person does not exist (`person_not_found`)."}
NO_SESSION = {401: "Nobody is signed in (`not_signed_in`), or the session has ended."}

OPERATIONS = {
    "GET /auth/session": Operation(
        id="getSession",
        tag="people",
        scope=None,
        summary="Get the session",
        description="Return who is signed in with the cookie of this request, and the token that unsafe requests must repeat.",
        responses=json_response(SessionObject, "The session."),
        errors=NO_SESSION | {503: "Redis is unavailable. `Retry-After` says when to retry."},
    ),
    "POST /auth/logout": Operation(
        id="endSession",
        tag="people",
        scope=None,
        summary="Sign out",
        description="End the session of this request's cookie.",
        responses=json_response(SessionEnded, "The session has ended."),
        errors=NO_SESSION
        | {
            403: "The header `x-csrf-token` is missing or wrong (`csrf_token_invalid`).",
            503: "Redis is unavailable. `Retry-After` says when to retry.",
        },
    ),
    "POST /v1/login-links": Operation(
        id="createLoginLink",
        tag="people",
        scope="admin:keys",
        summary="Make a sign-in link",
        description="Make a link that begins one session in a browser, with the rights of the API key of this request. It is valid for five "
        "minutes.",
        responses={201: SuccessResponse("The link.", {JSON_TYPE: LoginLink})},
    ),
    "GET /v1/people": Operation(
        id="listPeople",
        tag="people",
        scope="admin:keys",
        summary="List people",
        description="Return everybody who has signed in with the identity provider, the last sign-in first.",
        responses=json_response(PersonList, "The people."),
    ),
    "GET /v1/people/{person_id}": Operation(
        id="getPerson",
        tag="people",
        scope="admin:keys",
        summary="Get a person",
        description="Return one person.",
        responses=json_response(PersonObject, "The person."),
        errors=NO_PERSON,
        parameters=PERSON,
    ),
    "PATCH /v1/people/{person_id}": Operation(
        id="changePerson",
        tag="people",
        scope="admin:keys",
        summary="Change a person",
        description="Set a person's role or team in place of what the groups give, or disable the person. Fields that are left out stay; null "
        "restores what the groups gave at the last sign-in. All gateways apply the change within milliseconds, in the worst case within seconds, "
        "and end the person's open calls. Keys that the person has made stay valid, unless `keys` says otherwise.",
        body=PersonUpdate,
        examples={"A role": {"role": "operator"}, "Disable": {"disabled": True, "keys": "revoke"}},
        responses=json_response(PersonObject, "The person."),
        errors=NO_PERSON,
        parameters=PERSON,
    ),
    "DELETE /v1/people/{person_id}/sessions": Operation(
        id="endSessions",
        tag="people",
        scope="admin:keys",
        summary="End a person's sessions",
        description="End all sessions of a person, and the calls that are open in them.",
        responses=json_response(PersonObject, "The person."),
        errors=NO_PERSON,
        parameters=PERSON,
    ),
}
