"""The OpenAPI document, completed with what FastAPI does not know: keys, errors, and content types of answers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from gateway.http import Scope
from gateway.links import base_url

JSON = dict[str, Any]

BEARER = "bearer"
ERRORS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "The API key is missing or wrong.",
    "403": "The API key lacks the scope.",
    "404": "There is no such thing, or it belongs to another owner.",
    "429": "A queue is full, or the key has as much under way as it may have. `Retry-After` says when to come again.",
    "500": "A defect in Nexus. The request id helps to find it in the logs.",
    "503": "Nobody can serve this now. `Retry-After` says when to come again.",
}
BODY_ERRORS = {
    "408": "The body did not arrive in time.",
    "413": "The body is larger than the limit.",
    "415": "The body's `Content-Encoding` is not supported. `Accept-Encoding` names those that are.",
}
WORK_ERRORS = {
    "4XX": "Another error of the request, such as 422: the `Idempotency-Key` was used with another one.",
    "502": "The inference server failed.",
    "504": "A time limit ran out.",
}
ERROR: JSON = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
BINARY: JSON = {"schema": {"type": "string", "format": "binary"}}
TEXT: JSON = {"schema": {"type": "string"}}
OBJECT: JSON = {"schema": {"type": "object", "additionalProperties": True}}
STREAM = {"text/event-stream": TEXT}
SOUND = {f"audio/{kind}": BINARY for kind in ("mpeg", "opus", "aac", "flac", "wav", "pcm")}
CONTENTS: dict[str, JSON] = {
    "POST /v1/chat/completions": {"application/json": OBJECT, **STREAM},
    "POST /v1/completions": {"application/json": OBJECT, **STREAM},
    "POST /v1/responses": {"application/json": OBJECT, **STREAM},
    "GET /v1/responses/{response_id}": {"application/json": OBJECT, **STREAM},
    "POST /v1/images/generations": {"application/json": OBJECT, **STREAM},
    "POST /v1/images/edits": {"application/json": OBJECT, **STREAM},
    "POST /v1/models/pull": {"application/json": OBJECT, **STREAM},
    "POST /v1/audio/speech": {**SOUND, **STREAM},
    "POST /v1/audio/transcriptions": {
        "application/json": OBJECT, "text/plain": TEXT, "text/vtt": TEXT, "application/x-subrip": TEXT, **STREAM,
    },
    "POST /v1/audio/translations": {
        "application/json": OBJECT, "text/plain": TEXT, "text/vtt": TEXT, "application/x-subrip": TEXT,
    },
    "GET /v1/jobs/{job_id}/result": {"application/json": OBJECT, "application/octet-stream": BINARY, **STREAM, **SOUND},
    "GET /v1/jobs/{job_id}/events": STREAM,
    "GET /v1/files/{file_id}/content": {"application/octet-stream": BINARY},
    "GET /v1/results/{name}": {"image/*": BINARY, "audio/*": BINARY, "application/octet-stream": BINARY},
    "GET /metrics": {"text/plain": TEXT},
}  # fmt: skip
"""What answers of these routes are, where it is not JSON alone."""
WORK = frozenset({"inference", "jobs", "responses"})
"""Tags of routes that wait for an inference server, or hand over its answer."""
HOST = re.compile(r"(https?://(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\]))(?::\d+)?")
SIGNED = "/v1/results/"
"""Routes whose URL is the permission."""


class ApiDocument:
    """The document as it is served: by the API itself, or by the observability port beside it."""

    def __init__(
        self,
        make: Callable[[], JSON],
        *,
        beside: Callable[[], JSON] | None = None,
        public_url: str = "",
        port: int = 0,
    ) -> None:
        """`make`: FastAPI's document of the API. `beside`: that of the app which serves this one, where it is another;
        the API is then at `public_url`, or at `port` of the host that the reader named.
        """
        self._make = make
        self._beside = beside
        self._public_url = public_url.rstrip("/")
        self._port = port
        self._made: JSON | None = None

    def of(self, scope: Scope) -> JSON:
        """Return the document for the reader of this request."""
        if self._made is None:
            self._made = complete(copy.deepcopy(self._make()))
            if self._beside is not None:
                own = complete(copy.deepcopy(self._beside()))["paths"]
                here = {"servers": [{"url": "/"}]}
                for path, methods in own.items():
                    self._made["paths"][path] = {method: operation | here for method, operation in methods.items()}
        server = self.server(scope)
        return self._made | {"servers": [{"url": server}]} if server else self._made

    def server(self, scope: Scope) -> str:
        """Return the API's URL; empty: where the document is."""
        if self._beside is None:
            return ""
        if self._public_url or not self._port:
            return self._public_url
        match = HOST.fullmatch(base_url(scope))
        return f"{match[1]}:{self._port}" if match is not None else ""


def complete(document: JSON) -> JSON:
    """Add to FastAPI's document, in place, and return it."""
    parts = document.setdefault("components", {})
    schemas = parts.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Error"] = ERROR
    parts["securitySchemes"] = {BEARER: {"type": "http", "scheme": "bearer", "description": "An API key of Nexus."}}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            _complete(path, f"{method.upper()} {path}", operation)
    return document


def _complete(path: str, route: str, operation: JSON) -> None:
    responses: JSON = operation["responses"]
    responses.pop("422", None)
    for answer in responses.values():
        for content in answer.get("content", {}).values():
            if content.get("schema") == {}:
                content.update(OBJECT)
    success = next(code for code in responses if code.startswith("2"))
    if route in CONTENTS:
        responses[success]["content"] = CONTENTS[route]
    if not path.startswith("/v1/"):
        return
    if not path.startswith(SIGNED):
        operation["security"] = [{BEARER: []}]
    errors = dict(ERRORS)
    if "requestBody" in operation:
        errors |= BODY_ERRORS
    if WORK & set(operation.get("tags", ())):
        errors |= WORK_ERRORS
    for code, description in sorted(errors.items()):
        responses.setdefault(
            code,
            {
                "description": description,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        )
