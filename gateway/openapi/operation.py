"""The types that describe one route in the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

JSON = dict[str, Any]
Schema = type[BaseModel] | tuple[type[BaseModel], ...] | JSON
"""One model; several models that the body's `endpoint` tells apart; or a JSON schema that no model can express."""

JSON_TYPE = "application/json"
SSE_TYPE = "text/event-stream"
TEXT: JSON = {"type": "string"}
EVENT: JSON = {
    "type": "object",
    "description": "One event of the stream.",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "id": {"type": "string"}, "data": {"type": "string"}},
}
BINARY: JSON = {"type": "string", "format": "binary"}


@dataclass(frozen=True, slots=True)
class SuccessResponse:
    """Describes a successful response of a route."""

    description: str
    content: Mapping[str, Schema] = field(default_factory=dict)
    """Schemas by media type. Empty if the response has no body."""
    headers: tuple[str, ...] = ()
    """Names from `HEADERS`, in addition to the headers of every response."""
    example: Any = None
    """An example of the JSON body."""


@dataclass(frozen=True, slots=True)
class Operation:
    """Describes one route."""

    id: str
    """The `operationId`. Code generators derive method names from it, so it never changes."""
    tag: str
    summary: str
    """The task, in the imperative: "Cancel a job"."""
    description: str
    responses: Mapping[int, SuccessResponse]
    scope: str | None = ""
    """The scope that the API key needs. Empty: any valid key. None: the route needs no key."""
    body: Schema | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    """Descriptions of the files in a multipart body, by field. The first file is required."""
    examples: Mapping[str, JSON] = field(default_factory=dict)
    """Example bodies by title. Swagger UI sends the first one on "Try it out"."""
    errors: Mapping[int, str] = field(default_factory=dict)
    """Error descriptions by status, added to the common errors of `gateway.openapi.errors` or replacing them."""
    of_anthropic: bool = False
    """The route is one of Anthropic's API: its errors have that form, and its answers the header `request-id`."""
    runs_inference: bool = False
    """The route waits for an inference server or returns its answer, and so can also return its errors."""
    may_answer_other_4xx: bool = False
    """The route can return 4xx statuses that are not listed. Implied by `runs_inference`."""
    parameters: Mapping[str, JSON] = field(default_factory=dict)
    """Additions to FastAPI's parameters, by name. An entry with `in` adds a parameter that FastAPI does not know."""


def json_response(shape: Schema, description: str, **options: Any) -> Mapping[int, SuccessResponse]:
    """Return the description of a 200 response with a JSON body."""
    return {200: SuccessResponse(description, {JSON_TYPE: shape}, **options)}
