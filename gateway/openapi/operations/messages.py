"""The descriptions of the routes of Anthropic's Messages API."""

from __future__ import annotations

from typing import Any

from pydantic import Field, create_model

from gateway.openapi.operation import (
    EVENT,
    JSON,
    JSON_TYPE,
    SSE_TYPE,
    TEXT,
    Operation,
    Schema,
    SuccessResponse,
    json_response,
)
from gateway.openapi.operations.common import ACCEPTED, MODEL, PREFERENCES, identifier, inference_responses
from gateway.openapi.shapes.messages import (
    MessageBatch,
    MessageBatchDeleted,
    MessageBatchList,
    MessageObject,
    MessageTokenCount,
)
from schemas.anthropic.batches import MessageBatchRequest
from schemas.anthropic.messages import UNSUPPORTED_FIELDS, MessagesInput, MessagesRequest

FIELDS: dict[str, Any] = {
    name: (None, Field(default=None, description=f"Rejected: {why}.")) for name, why in UNSUPPORTED_FIELDS.items()
}
DOCUMENTED_REQUEST = create_model(
    "MessagesRequest", __base__=MessagesRequest, __doc__="A request for a message.", **FIELDS
)
DOCUMENTED_COUNT = create_model(
    "MessageCountRequest", __base__=MessagesInput, __doc__="A request whose tokens are counted.", **FIELDS
)
"""The request body, including the rules that the route checks in addition to the field types."""

HELLO = {"role": "user", "content": "Say hello in one sentence."}
EVENTS: dict[str, Schema] = {
    SSE_TYPE: EVENT
    | {
        "description": "One server-sent event, whose `event` is the `type` of its data: `message_start`, `content_block_start`, "
        "`content_block_delta`, `content_block_stop`, `message_delta`, `message_stop`, `ping` or `error`."
    }
}
BATCH = {"message_batch_id": identifier("msgbatch_", "The id of a batch of messages.", "^msgbatch_[0-9a-f]{32}$")}
NO_BATCH = {404: "The batch does not exist, or belongs to another owner."}
PAGE: dict[str, JSON] = {
    "limit": {
        "in": "query",
        "description": "The maximum number of objects in a page.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 20},
    },
    **{
        name: {
            "in": "query",
            "description": f"The page {where} this id.",
            "schema": {"type": "string"} | BATCH["message_batch_id"]["schema"],
        }
        for name, where in (("after_id", "begins after"), ("before_id", "ends before"))
    },
}

OPERATIONS = {
    "POST /v1/messages": Operation(
        id="createMessage",
        tag="messages",
        scope="inference",
        of_anthropic=True,
        runs_inference=True,
        summary="Create a message",
        description="Generate the model's next message, as Anthropic's Messages API does. Every chat model answers. With `stream: true`, the message "
        "arrives as events. The caller runs the tools that the model calls. Nexus removes tools that only Anthropic can run.",
        body=DOCUMENTED_REQUEST,
        examples={
            "A question": {"model": MODEL, "max_tokens": 40, "messages": [HELLO]},
            "A stream": {"model": MODEL, "max_tokens": 40, "messages": [HELLO], "stream": True},
        },
        responses=inference_responses(MessageObject, "The message; with `stream: true` its events.", EVENTS),
        parameters=PREFERENCES,
    ),
    "POST /v1/messages/count_tokens": Operation(
        id="countMessageTokens",
        tag="messages",
        scope="inference",
        of_anthropic=True,
        runs_inference=True,
        summary="Count the tokens of a message request",
        description="Return how many tokens the prompt of a request for a message has. The inference server counts them (llama.cpp, vLLM); where it cannot, or "
        "is busy for more than 5 seconds, the count is an estimate. `x-nexus-token-count` says which.",
        body=DOCUMENTED_COUNT,
        examples={"A question": {"model": MODEL, "messages": [HELLO]}},
        responses={
            200: SuccessResponse(
                "The count.", {JSON_TYPE: MessageTokenCount}, ("x-nexus-job-id", "x-nexus-token-count")
            ),
            202: ACCEPTED,
        },
        parameters=PREFERENCES,
    ),
    "POST /v1/messages/batches": Operation(
        id="createMessageBatch",
        tag="messages",
        scope="jobs",
        of_anthropic=True,
        summary="Create a batch of messages",
        description="Run many requests for messages as jobs in the lane `flex`, within 24 hours. The key also needs the scope `inference`.",
        body=MessageBatchRequest,
        examples={
            "Two questions": {
                "requests": [
                    {"custom_id": name, "params": {"model": MODEL, "max_tokens": 40, "messages": [HELLO]}}
                    for name in ("first", "second")
                ]
            }
        },
        responses=json_response(MessageBatch, "The batch."),
        may_answer_other_4xx=True,
    ),
    "GET /v1/messages/batches": Operation(
        id="listMessageBatches",
        tag="messages",
        scope="jobs",
        of_anthropic=True,
        summary="List batches of messages",
        description="Return the caller's batches of messages, newest first.",
        responses=json_response(MessageBatchList, "A page of batches."),
        parameters=PAGE,
    ),
    "GET /v1/messages/batches/{message_batch_id}": Operation(
        id="getMessageBatch",
        tag="messages",
        scope="jobs",
        of_anthropic=True,
        summary="Get a batch of messages",
        description="Return a batch's status and its counts.",
        responses=json_response(MessageBatch, "The batch."),
        errors=NO_BATCH,
        parameters=BATCH,
    ),
    "GET /v1/messages/batches/{message_batch_id}/results": Operation(
        id="getMessageBatchResults",
        tag="messages",
        scope="jobs",
        of_anthropic=True,
        summary="Get the results of a batch of messages",
        description="Return the results of a batch that has ended, one JSON object on each line.",
        responses={200: SuccessResponse("The results.", {"application/x-jsonl": TEXT})},
        errors=NO_BATCH | {400: "The batch has not ended (`batch_not_ended`)."},
        parameters=BATCH,
    ),
    "POST /v1/messages/batches/{message_batch_id}/cancel": Operation(
        id="cancelMessageBatch",
        tag="messages",
        scope="jobs",
        of_anthropic=True,
        summary="Cancel a batch of messages",
        description="End a batch early. The results hold the messages that are complete by then.",
        responses=json_response(MessageBatch, "The batch's current state."),
        errors=NO_BATCH | {400: "The batch has already ended (`batch_ended`)."},
        parameters=BATCH,
    ),
    "DELETE /v1/messages/batches/{message_batch_id}": Operation(
        id="deleteMessageBatch",
        tag="messages",
        scope="jobs",
        of_anthropic=True,
        summary="Delete a batch of messages",
        description="Delete a batch that has ended, with its results.",
        responses=json_response(MessageBatchDeleted, "The batch is deleted."),
        errors=NO_BATCH | {400: "The batch has not ended (`batch_not_ended`)."},
        parameters=BATCH,
    ),
}
