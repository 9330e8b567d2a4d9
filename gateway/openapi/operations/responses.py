"""The descriptions of the routes of the Responses API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, create_model

from gateway.openapi.operation import JSON_TYPE, Operation, SuccessResponse, json_response
from gateway.openapi.operations.common import MODEL, PAGE, STREAM, identifier
from gateway.openapi.shapes.responses import ResponseDeleted, ResponseItemList, ResponseObject
from schemas.openai.responses import UNSUPPORTED_FIELDS, ResponsesRequest

FIELDS: dict[str, Any] = {
    name: (None, Field(default=None, description=f"Rejected: {why}.")) for name, why in UNSUPPORTED_FIELDS.items()
}
FIELDS["truncation"] = (
    Literal["disabled"] | None,
    Field(default=None, description="`auto` is rejected: Nexus does not shorten conversations."),
)
DOCUMENTED_REQUEST = create_model(
    "ResponsesRequest", __base__=ResponsesRequest, __doc__="A request for a response.", **FIELDS
)
"""The request body, including the rules that the route checks in addition to the field types."""

ID = {"response_id": identifier("resp_", "The id of a stored response.", "^resp_[0-9a-f]{32}$")}
MISSING = {404: "The response does not exist, was not stored, or belongs to another owner."}

OPERATIONS = {
    "POST /v1/responses": Operation(
        id="createResponse",
        tag="responses",
        scope="inference",
        runs_inference=True,
        summary="Create a response",
        description="Generate a response to `input`, as OpenAI's Responses API does. With `stream: true`, the response arrives as events. "
        "With `background: true` (the key also needs the scope `jobs`), the route returns immediately and the response is generated in the background. "
        "The caller runs the functions that the model calls. Nexus removes tools that only OpenAI can run.",
        body=DOCUMENTED_REQUEST,
        examples={
            "A question": {"model": MODEL, "input": "Say hello in one sentence.", "max_output_tokens": 40},
            "In the background": {"model": MODEL, "input": "Say hello in one sentence.", "background": True},
        },
        responses={
            200: SuccessResponse(
                "The response; with `stream: true` its events.",
                {JSON_TYPE: ResponseObject} | STREAM,
                ("x-nexus-job-id", "x-nexus-adapted"),
            )
        },
        errors={404: "The model, the previous response or a referenced item does not exist."},
    ),
    "GET /v1/responses/{response_id}": Operation(
        id="getResponse",
        tag="responses",
        scope="inference",
        runs_inference=True,
        summary="Get a response",
        description="Return a stored response's current state. With `stream=true`, return its events: the stored events first, then new events.",
        responses={
            200: SuccessResponse("The response; with `stream=true` its events.", {JSON_TYPE: ResponseObject} | STREAM)
        },
        errors=MISSING,
        parameters=ID
        | {
            "stream": {"description": "Return the response's events."},
            "starting_after": {"description": "With `stream=true`: return the events after this `sequence_number`."},
        },
    ),
    "DELETE /v1/responses/{response_id}": Operation(
        id="deleteResponse",
        tag="responses",
        scope="inference",
        summary="Delete a response",
        description="Delete a stored response. A running response is cancelled.",
        responses=json_response(ResponseDeleted, "The response is deleted."),
        errors=MISSING,
        parameters=ID,
    ),
    "POST /v1/responses/{response_id}/cancel": Operation(
        id="cancelResponse",
        tag="responses",
        scope="inference",
        summary="Cancel a background response",
        description="End a background response. A response that has ended stays unchanged.",
        responses=json_response(ResponseObject, "The response's current state."),
        errors=MISSING | {400: "The response was not created with `background: true`."},
        parameters=ID,
    ),
    "GET /v1/responses/{response_id}/input_items": Operation(
        id="listResponseInputItems",
        tag="responses",
        scope="inference",
        summary="List a response's input items",
        description="Return the input items of a response.",
        responses=json_response(ResponseItemList, "A page of items."),
        errors=MISSING,
        parameters=ID | PAGE | {"order": {"description": "`desc`: newest first. `asc`: oldest first."}},
    ),
}
