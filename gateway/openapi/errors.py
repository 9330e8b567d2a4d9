"""The descriptions of errors that many routes share, and of response headers."""

from __future__ import annotations

from gateway.openapi.operation import JSON, JSON_TYPE, Operation

HEADERS: dict[str, JSON] = {
    "x-request-id": {
        "description": "The id of the request. Every log line about the request contains it.",
        "schema": {"type": "string", "pattern": "^req_[0-9a-f]{24}$"},
    },
    "request-id": {
        "description": "The same id, where Anthropic's clients look for it.",
        "schema": {"type": "string", "pattern": "^req_[0-9a-f]{24}$"},
    },
    "x-nexus-job-id": {
        "description": "The id of the job that answers the request.",
        "schema": {"type": "string"},
    },
    "x-nexus-token-count": {
        "description": "Whether the inference server has counted the tokens.",
        "schema": {"type": "string", "enum": ["exact", "estimate"]},
    },
    "x-nexus-adapted": {
        "description": "Request parameters that the inference server does not support and that Nexus replaced by their nearest equivalent.",
        "schema": {"type": "string", "pattern": "^[a-z_]+(, [a-z_]+)*$"},
    },
    "x-nexus-hops": {
        "description": "`refused`: the request passed through too many gateways. Nexus workers send this header with the number of gateways.",
        "schema": {"type": "string", "const": "refused"},
    },
    "Retry-After": {
        "description": "The number of seconds to wait before a retry.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "x-should-retry": {
        "description": "Whether OpenAI's SDKs should retry the request. Overrides their own rules.",
        "schema": {"type": "string", "enum": ["true", "false"]},
    },
    "WWW-Authenticate": {
        "description": "The authentication scheme.",
        "schema": {"type": "string", "const": "Bearer"},
    },
    "Accept-Encoding": {
        "description": "The supported encodings of request bodies.",
        "schema": {"type": "string", "const": "gzip, deflate, zstd"},
    },
    "Location": {
        "description": "The path of the job.",
        "schema": {"type": "string", "format": "uri-reference"},
    },
    "Preference-Applied": {
        "description": "The preferences of `Prefer` that were honored.",
        "schema": {"type": "string"},
    },
    "Content-Disposition": {
        "description": "The name of the file.",
        "schema": {"type": "string"},
    },
    "Content-Length": {
        "description": "The size of the body in bytes.",
        "schema": {"type": "integer", "minimum": 0},
    },
}
ERROR_HEADERS = {
    401: ("WWW-Authenticate",),
    415: ("Accept-Encoding",),
    408: ("x-should-retry",),
    429: ("Retry-After",),
    503: ("Retry-After",),
    529: ("Retry-After",),
}
OPTIONAL_ERROR_HEADERS = {
    429: ("x-should-retry",),
    502: ("x-should-retry",),
    503: ("x-should-retry",),
    504: ("x-should-retry",),
    508: ("x-should-retry", "x-nexus-hops"),
}

PUBLIC = {500: "A defect in Nexus. Search the gateway's log for the request id."}
COMMON = PUBLIC | {
    400: "The request is invalid. `param` names the field.",
    404: "The object does not exist, or belongs to another owner.",
    429: "This address sent too many invalid keys, or the key has too many unfinished requests. "
    "`Retry-After` says when to retry.",
    503: "The service is unavailable. `Retry-After` says when to retry.",
}
KEYED = {401: "The API key is missing, invalid, revoked or expired."}
SCOPED = {403: "The API key lacks the scope '{scope}'."}
BODY = {
    408: "The body did not arrive in time.",
    413: "The body is larger than the limit.",
    415: "The body's `Content-Encoding` is not supported. `Accept-Encoding` lists the supported encodings.",
}
WORK = {
    429: "The model's queue is full, or the key has reached its limit of unfinished jobs. `Retry-After` says when to retry.",
    502: "The inference server failed.",
    504: "A time limit was reached.",
    508: "The request passed through more gateways than `GATEWAY_MAX_HOPS` allows. Check that no worker's server URL leads back to this gateway.",
}
OVERLOADED = {
    429: "The key has reached one of its limits. `Retry-After` says when to retry.",
    529: "The model's queue is full. `Retry-After` says when to retry.",
}
ANY_REFUSAL = {
    "4XX": "Another client error: an `Idempotency-Key` that was used with a different request, or a status from the inference server."
}


def errors_of(operation: Operation, *, api: bool) -> dict[str, str]:
    """Return the descriptions of a route's errors, by status.

    Args:
        operation: The route.
        api: Whether the route's path begins with `/v1/`.
    """
    found: dict[int, str] = dict(COMMON if api else PUBLIC)
    if api and operation.scope is not None:
        found |= KEYED
        if operation.scope:
            found |= {code: text.format(scope=operation.scope) for code, text in SCOPED.items()}
    if operation.body is not None or operation.files:
        found |= BODY
    if operation.runs_inference:
        found |= WORK | (OVERLOADED if operation.of_anthropic else {})
    found |= operation.errors
    codes = {str(code): text for code, text in sorted(found.items())}
    return codes | ANY_REFUSAL if operation.runs_inference or operation.may_answer_other_4xx else codes


def request_id_headers(operation: Operation) -> tuple[str, ...]:
    """Return the names of the headers with the request's id."""
    return ("x-request-id", "request-id") if operation.of_anthropic else ("x-request-id",)


def error_response(code: str, description: str, operation: Operation) -> JSON:
    """Return one error response in OpenAPI's form."""
    status = int(code) if code.isdigit() else 0
    headers: JSON = {name: {"$ref": f"#/components/headers/{name}"} for name in request_id_headers(operation)}
    for name in (*ERROR_HEADERS.get(status, ()), *OPTIONAL_ERROR_HEADERS.get(status, ())):
        headers[name] = {"$ref": f"#/components/headers/{name}"}
    return {
        "description": description,
        "headers": headers,
        "content": {
            JSON_TYPE: {
                "schema": {"$ref": f"#/components/schemas/{'AnthropicError' if operation.of_anthropic else 'Error'}"}
            }
        },
    }
