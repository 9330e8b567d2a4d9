"""Translates Nexus's errors into Anthropic's. Pure."""

from __future__ import annotations

from typing import Any

JSON = dict[str, Any]

OVERLOADED = 529
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    410: "not_found_error",
    413: "request_too_large",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    504: "timeout_error",
    508: "invalid_request_error",
    OVERLOADED: "overloaded_error",
}
"""Anthropic's types by status; every other one is an `api_error`."""
OVERLOADED_CODES = frozenset({"queue_full"})
"""Codes of errors that are no fault of the caller's: the model has more work than it can do."""
CONTEXT_EXCEEDED = "context_length_exceeded"
CONTEXT_NOTE = "prompt is too long: "
"""How Anthropic begins this message: agents shorten the conversation when they read it."""


def anthropic_status(status: int, body: JSON) -> int:
    """Return the status for an error object of Nexus."""
    return OVERLOADED if _error(body).get("code") in OVERLOADED_CODES else status


def anthropic_error(status: int, body: JSON, request_id: str) -> JSON:
    """Return Anthropic's error object for one of Nexus. Nexus's code and field are its details."""
    error = _error(body)
    code, param = error.get("code"), error.get("param")
    message = str(error.get("message") or "The request failed.")
    if code == CONTEXT_EXCEEDED:
        message = CONTEXT_NOTE + message
    shape: JSON = {"type": TYPES.get(anthropic_status(status, body), "api_error"), "message": message}
    if code or param:
        shape["details"] = {"error_code": code, "param": param}
    return {"type": "error", "error": shape, "request_id": request_id}


def _error(body: JSON) -> JSON:
    error = body.get("error")
    return error if isinstance(error, dict) else {}
