"""The Responses API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, create_model

from gateway.openapi.operation import JSON_TYPE, Answer, Operation, answer
from gateway.openapi.operations.common import MODEL, PAGE, STREAM, identifier
from gateway.openapi.shapes.responses import Response, ResponseDeleted, ResponseItemList
from schemas.openai.responses import UNSUPPORTED_FIELDS, ResponsesRequest

FIELDS: dict[str, Any] = {
    name: (None, Field(default=None, description=f"Refused: {why}.")) for name, why in UNSUPPORTED_FIELDS.items()
}
FIELDS["truncation"] = (
    Literal["disabled"] | None,
    Field(default=None, description="`auto` is refused: a conversation is not shortened here."),
)
DOCUMENTED_REQUEST = create_model(
    "ResponsesRequest", __base__=ResponsesRequest, __doc__="A request for a response.", **FIELDS
)
"""With what its route checks beyond the fields' types."""

ID = {"response_id": identifier("resp_", "The id of a stored response.", "^resp_[0-9a-f]{32}$")}
MISSING = {404: "There is no such response, it was not stored, or it belongs to another owner."}

OPERATIONS = {
    "POST /v1/responses": Operation(
        id="createResponse",
        tag="responses",
        scope="inference",
        works=True,
        summary="Create a response",
        description="Answer `input` with a model, as OpenAI's Responses API does. With `stream: true` the answer comes as events, "
        "with `background: true` (scope `jobs` too) the response is returned at once and goes on. Functions are called by the caller; "
        "tools that run at OpenAI are left out.",
        body=DOCUMENTED_REQUEST,
        examples={
            "A question": {"model": MODEL, "input": "Say hello in one sentence.", "max_output_tokens": 40},
            "In the background": {"model": MODEL, "input": "Say hello in one sentence.", "background": True},
        },
        answers={
            200: Answer(
                "The response; with `stream: true` its events.",
                {JSON_TYPE: Response} | STREAM,
                ("x-nexus-job-id", "x-nexus-adapted"),
            )
        },
        errors={404: "There is no such model, or no such earlier response or item."},
    ),
    "GET /v1/responses/{response_id}": Operation(
        id="getResponse",
        tag="responses",
        scope="inference",
        works=True,
        summary="Get a response",
        description="Return a stored response as it stands, or with `stream=true` its events: those so far, and those to come.",
        answers={200: Answer("The response; with `stream=true` its events.", {JSON_TYPE: Response} | STREAM)},
        errors=MISSING,
        parameters=ID
        | {
            "stream": {"description": "Return events."},
            "starting_after": {
                "description": "With `stream=true`: the `sequence_number` behind which the events begin."
            },
        },
    ),
    "DELETE /v1/responses/{response_id}": Operation(
        id="deleteResponse",
        tag="responses",
        scope="inference",
        summary="Delete a response",
        description="Delete a stored response. One that still runs is ended.",
        answers=answer(ResponseDeleted, "It is deleted."),
        errors=MISSING,
        parameters=ID,
    ),
    "POST /v1/responses/{response_id}/cancel": Operation(
        id="cancelResponse",
        tag="responses",
        scope="inference",
        summary="Cancel a background response",
        description="End a background response. One that has ended stays as it is.",
        answers=answer(Response, "The response as it stands now."),
        errors=MISSING | {400: "The response was not made in the background."},
        parameters=ID,
    ),
    "GET /v1/responses/{response_id}/input_items": Operation(
        id="listResponseInputItems",
        tag="responses",
        scope="inference",
        summary="List a response's input",
        description="Return the items that a response was asked with.",
        answers=answer(ResponseItemList, "A page of items."),
        errors=MISSING,
        parameters=ID | PAGE | {"order": {"description": "`desc`: the newest first."}},
    ),
}
