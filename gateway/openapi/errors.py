"""Describe the errors of every kind of route, and the headers of answers."""

from __future__ import annotations

from gateway.openapi.operation import JSON, JSON_TYPE, Operation

HEADERS: dict[str, JSON] = {
    "x-request-id": {
        "description": "The request's id, which is in every log line about it.",
        "schema": {"type": "string", "pattern": "^req_[0-9a-f]{24}$"},
    },
    "x-nexus-job-id": {
        "description": "The id of the job that answers the request.",
        "schema": {"type": "string"},
    },
    "x-nexus-adapted": {
        "description": "Parameters of the request that the model's server lacks and that were replaced by their nearest equivalent.",
        "schema": {"type": "string", "pattern": "^[a-z_]+(, [a-z_]+)*$"},
    },
    "x-nexus-hops": {
        "description": "`refused`: too many gateways. Workers of Nexus send it with their number.",
        "schema": {"type": "string", "const": "refused"},
    },
    "Retry-After": {
        "description": "Seconds after which a retry makes sense.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "x-should-retry": {
        "description": "Whether OpenAI's SDKs retry the request, above their own rules.",
        "schema": {"type": "string", "enum": ["true", "false"]},
    },
    "WWW-Authenticate": {
        "description": "How to authenticate.",
        "schema": {"type": "string", "const": "Bearer"},
    },
    "Accept-Encoding": {
        "description": "The encodings of request bodies that are understood.",
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
        "description": "The file's name.",
        "schema": {"type": "string"},
    },
    "Content-Length": {
        "description": "Bytes of the body.",
        "schema": {"type": "integer", "minimum": 0},
    },
}
ERROR_HEADERS = {
    401: ("WWW-Authenticate",),
    415: ("Accept-Encoding",),
    408: ("x-should-retry",),
    429: ("Retry-After",),
    503: ("Retry-After",),
}
OPTIONAL_ERROR_HEADERS = {
    429: ("x-should-retry",),
    502: ("x-should-retry",),
    503: ("x-should-retry",),
    504: ("x-should-retry",),
    508: ("x-should-retry", "x-nexus-hops"),
}

PUBLIC = {500: "A defect in Nexus. The request id helps to find it in the logs."}
COMMON = PUBLIC | {
    400: "The request is wrong. `param` names the field.",
    404: "There is no such thing, or it belongs to another owner.",
    429: "Too many wrong keys came from this address, or the key has too many requests under way. "
    "`Retry-After` says when to retry.",
    503: "Nobody can serve this now. `Retry-After` says when to retry.",
}
KEYED = {401: "The API key is missing, wrong, revoked or expired."}
SCOPED = {403: "The API key lacks the scope '{scope}'."}
BODY = {
    408: "The body did not arrive in time.",
    413: "The body is larger than the limit.",
    415: "The body's `Content-Encoding` is not supported. `Accept-Encoding` names those that are.",
}
WORK = {
    429: "The queue of the model is full, or the key has as much under way as it may have. `Retry-After` says when to retry.",
    502: "The inference server failed.",
    504: "A time limit ran out.",
    508: "The request came from a worker of a Nexus, through more gateways than `GATEWAY_MAX_HOPS` allows: it would go round in circles.",
}
ANY_REFUSAL = {
    "4XX": "Another refusal: an `Idempotency-Key` that was used with another request, or a status of the inference server's own."
}


def errors_of(operation: Operation, *, api: bool) -> dict[str, str]:
    """Return the errors of a route by status, described. `api`: it is below `/v1`."""
    found: dict[int, str] = dict(COMMON if api else PUBLIC)
    if api and operation.scope is not None:
        found |= KEYED
        if operation.scope:
            found |= {code: text.format(scope=operation.scope) for code, text in SCOPED.items()}
    if operation.body is not None or operation.files:
        found |= BODY
    if operation.works:
        found |= WORK
    found |= operation.errors
    codes = {str(code): text for code, text in sorted(found.items())}
    return codes | ANY_REFUSAL if operation.works or operation.refuses else codes


def error_response(code: str, description: str) -> JSON:
    """Return one error of a route as the document says it."""
    status = int(code) if code.isdigit() else 0
    headers: JSON = {name: {"$ref": f"#/components/headers/{name}"} for name in ("x-request-id",)}
    for name in (*ERROR_HEADERS.get(status, ()), *OPTIONAL_ERROR_HEADERS.get(status, ())):
        headers[name] = {"$ref": f"#/components/headers/{name}"}
    return {
        "description": description,
        "headers": headers,
        "content": {JSON_TYPE: {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
