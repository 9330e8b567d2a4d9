"""What an OpenAI-compatible server's error answer means, as one of our errors: pure.

| the server says | we say |
|---|---|
| 400, 409, 413, 415, 422, other 4xx | BackendRefused, 400 (413 kept): the caller's request is wrong |
| 404 about a model | ModelNotServed |
| 404, 405 otherwise; 501 | BackendRefused: this server cannot do that |
| any but 429 and 503, about more tokens than the model takes | BackendRefused, 400 `context_length_exceeded` |
| 403 about the caller's input | BackendRefused, 400 `content_policy_violation` |
| 401, 403 | BackendError: the worker's key for the server is wrong; the server's words might quote it and are dropped |
| 408, 502, 504, 5xx in general | BackendError, transient |
| 429 about a quota that is used up | BackendRefused, 429: no later try can pass |
| 429, 503 | BackendUnavailable, 429 with the server's code, or 503. With `Retry-After`, or where the model is being loaded, the worker leaves the model alone for so long |
| 500 that complains about the request | BackendRefused: llama-server does that |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import orjson

from schemas.errors import ErrorInfo
from workers.backends.base import BackendError, BackendRefused, BackendUnavailable, ModelNotServed

MESSAGE_LIMIT = 2000
MAX_WAIT_S = 3600.0
MAX_ESTIMATE_S = 60.0
LOADING_S = 2.0
"""How long to leave a server alone that loads the model and does not say for how long."""
LOADING = re.compile(r"\bloading\b|not (?:yet )?(?:loaded|ready)|starting up|warming up|initiali[sz]ing", re.IGNORECASE)
"""llama.cpp's `Loading model`, Hugging Face's `Model … is currently loading`, LocalAI's and others' like."""
KEPT_STATUSES = frozenset({413})
# Said in a 500 by llama-server about requests that can never work.
BAD_INPUT = re.compile(
    r"is not supported|not support|json\.exception|json schema|grammar|jinja|chat template|failed to parse|unrecognized",
    re.IGNORECASE,
)
TOO_LONG = re.compile(
    r"maximum context length|maximum model length|context the overflows|tokens to keep from the initial prompt"
    r"|maximum (?:input|sequence) length|range of input length|ContextWindowExceeded|too large to process|physical batch size"
    r"|(?:prompt|input)s?\b.{0,60}\btoo (?:long|large) to fit|max(?:imum)? allowed tokens per"
    r"|(?:can ?not|must not|may not|should not) exceed \d+ tokens|exceeds? (?:the )?(?:max(?:imum)?|limit)\b[^.]{0,60}\btokens"
    r"|requested \d+ tokens, max \d+ tokens"
    r"|context[ -](?:size|length|window)\b.{0,60}\b(?:exceed|overflow)"
    r"|(?:exceed|longer than|larger than|too large for|too long for)\w*\b.{0,80}\b(?:context|model's maximum|max_model_len|max_seq_len)"
    r"|(?:input|prompt|request|message)s?\b.{0,60}\btokens?\b.{0,60}\b(?:exceed|too large|too long|too many)"
    r"|prompt is too long|input (?:is )?too long|too many (?:input )?tokens"
    r"|tokens?`? \+ `?max_new_tokens|must have less than \d+ tokens|reduce the length of (?:the|your) (?:messages|prompt|input)",
    re.IGNORECASE,
)
"""Servers' words for an input that does not fit: llama.cpp, vLLM, SGLang, TGI, TEI, Ollama, LM Studio, Mistral, Jina, Voyage, Anthropic, Gemini, OpenAI."""
STRING_TOO_LONG = frozenset({"string_too_long", "value_error.any_str.max_length"})
"""What pydantic 2 and 1 call a text that is too long: Infinity bounds characters."""
INPUTS = ("input", "inputs", "prompt", "query", "documents", "texts")
"""Fields that hold what a model reads."""
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
FLAGGED = re.compile(
    r"content[ _](?:policy|filter|management)|moderation|\bflagged\b|safety (?:system|policy|filter)|responsible ai",
    re.IGNORECASE,
)
"""Servers' words for an input that they will not work on."""
SPENT = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_credits"})
"""Codes of a 429 that no later try can pass."""
CODES = {"exceed_context_size_error": CONTEXT_LENGTH_EXCEEDED}
"""Servers' own words for what OpenAI has a code for."""


@dataclass(frozen=True, slots=True)
class Complaint:
    """A server's error object, whichever of the usual shapes it has."""

    message: str = ""
    type: str = ""
    param: str | None = None
    code: str | None = None
    number: int = 0
    """`code`, where it is an HTTP status."""
    estimated_s: float = 0.0
    """How long a server that loads a model thinks that it will take."""

    @property
    def about_the_request(self) -> bool:
        """Whether it says that the same request can never work."""
        if self.type in ("invalid_request_error", "not_supported_error", *CODES) or self.type.startswith("BadRequest"):
            return True
        return 400 <= self.number < 500 or bool(BAD_INPUT.search(self.message))

    @property
    def too_long(self) -> bool:
        """Whether it says that the request holds more tokens than the model takes."""
        return self.code == CONTEXT_LENGTH_EXCEEDED or bool(TOO_LONG.search(self.message))

    @property
    def flagged(self) -> bool:
        """Whether it says that the server will not work on this input."""
        return any(bool(FLAGGED.search(text)) for text in (self.message, self.type, self.code or ""))

    @property
    def about_the_model(self) -> bool:
        """Whether it says that the model does not exist."""
        return self.code == "model_not_found" or self.param == "model" or "model" in self.message.lower()


def read_complaint(value: Any) -> Complaint:
    """`{"error": {…}}`, `{"error": "…"}`, `{"detail": …}` (FastAPI), `{"object": "error", …}` (older vLLM), or the inner object."""
    if isinstance(value, dict):
        for key in ("error", "detail"):
            if value.get(key):
                return replace(read_complaint(value[key]), estimated_s=_estimate(value.get("estimated_time")))
        return _from_object(value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return _from_validation(value[0])
    return Complaint(str(value)[:MESSAGE_LIMIT]) if value else Complaint()


def _from_object(value: dict[str, Any]) -> Complaint:
    if isinstance(value.get("message"), dict | list):  # Mistral: FastAPI's validation error inside its own
        return read_complaint(value["message"])
    code = value.get("code")
    number = code if isinstance(code, int) else int(code) if isinstance(code, str) and code.isdecimal() else 0
    kind = str(value.get("type") or "")
    param = value.get("param")
    return Complaint(
        message=str(value.get("message") or "")[:MESSAGE_LIMIT],
        type=kind,
        param=param if isinstance(param, str) else None,
        code=CODES.get(kind) or (code if isinstance(code, str) and not number else None),
        number=number,
    )


def _estimate(value: Any) -> float:
    """`estimated_time`, as Hugging Face's servers say it."""
    return min(float(value), MAX_ESTIMATE_S) if isinstance(value, int | float) and value > 0 else 0.0


def _from_validation(value: dict[str, Any]) -> Complaint:
    """FastAPI's `{"loc": ["body", "messages"], "msg": "…"}`."""
    place = ".".join(str(part) for part in value.get("loc", ()) if part != "body")
    text = str(value.get("msg") or "")[:MESSAGE_LIMIT]
    too_long = str(value.get("type")) in STRING_TOO_LONG and place.split(".", 1)[0] in INPUTS
    code = CONTEXT_LENGTH_EXCEEDED if too_long else None
    return Complaint(f"{place}: {text}" if place else text, "invalid_request_error", place or None, code)


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
    """The error for an answer whose status is not 200."""
    complaint = _read_body(body)
    if status not in (401, 429, 503) and complaint.too_long:
        return _refused(400, complaint, CONTEXT_LENGTH_EXCEEDED)
    if status == 403 and complaint.flagged:
        return _refused(400, complaint, "content_policy_violation")
    if status == 429 and (complaint.code in SPENT or complaint.type in SPENT):
        return _refused(429, complaint, complaint.type)
    if status in (401, 403):
        return BackendError(f"the backend refused the worker's key ({status})", should_retry=False)
    if status in (429, 503):
        text = complaint.message or f"the backend is busy ({status})"
        wait_s = retry_after(headers.get("retry-after"), headers.get("date"))
        if wait_s is None and status == 503 and LOADING.search(text):
            wait_s = complaint.estimated_s or LOADING_S
        info = _rate_limit(text, complaint, wait_s) if status == 429 else None
        return BackendUnavailable(text, retry_after_s=wait_s, pause_s=wait_s, info=info)
    if status == 404:
        return _not_found(complaint)
    if status == 408 or status >= 500:
        if status == 501 or (status == 500 and complaint.about_the_request):
            return _refused(400, complaint)
        return BackendError(_words(status, complaint), transient=True)
    if status >= 400:
        return _refused(status if status in KEPT_STATUSES else 400, complaint)
    return BackendError(f"the backend answered {status}")


def stream_error(value: Any) -> BackendError:
    """The error for an error object inside a stream that began with 200."""
    complaint = read_complaint(value)
    if complaint.too_long:
        return _refused(400, complaint, CONTEXT_LENGTH_EXCEEDED)
    if complaint.number == 503:
        return BackendUnavailable(complaint.message or None)
    if complaint.about_the_request:
        return _refused(400, complaint)
    return BackendError(complaint.message or "the backend reported an error without saying which", transient=True)


def retry_after(value: str | None, date: str | None = None) -> float | None:
    """The seconds of a `Retry-After` header, which holds seconds or a date, between 0 and `MAX_WAIT_S`; None: it holds neither.

    A date is compared with the answer's own `Date`, since the server's clock may differ.
    """
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        at, now = _moment(value), _moment(date) or datetime.now(UTC)
        if at is None:
            return None
        seconds = (at - now).total_seconds()
    return None if seconds != seconds else max(0.0, min(seconds, MAX_WAIT_S))  # noqa: PLR0124


def _moment(text: str | None) -> datetime | None:
    try:
        at = parsedate_to_datetime(text or "")
    except (ValueError, OverflowError):
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _read_body(body: bytes) -> Complaint:
    try:
        return read_complaint(orjson.loads(body))
    except orjson.JSONDecodeError:
        text = body.decode("utf-8", "replace").strip()
        return Complaint() if text.startswith("<") else Complaint(text[:MESSAGE_LIMIT])


def _words(status: int, complaint: Complaint) -> str:
    return complaint.message or f"the backend answered {status}"


def _not_found(complaint: Complaint) -> BackendError:
    if complaint.about_the_model:
        return ModelNotServed(complaint.message, param="model")
    return _refused(404, Complaint("the backend has no such endpoint", code="unsupported_endpoint"))


def _refused(status: int, complaint: Complaint, code: str | None = None) -> BackendError:
    """`code`: OpenAI's, where the server gives none."""
    message = complaint.message or f"the backend refused the request ({status})"
    info = ErrorInfo(
        status=status,
        type="invalid_request_error" if status != 429 else complaint.type or "rate_limit_error",
        code=complaint.code or code or None,
        message=message,
        param=complaint.param,
        should_retry=False if status == 429 else None,
    )
    return BackendRefused(message, info=info)


def _rate_limit(message: str, complaint: Complaint, retry_after_s: float | None) -> ErrorInfo:
    return ErrorInfo(
        status=429,
        type=complaint.type or "rate_limit_error",
        code=complaint.code or "rate_limit_exceeded",
        message=message,
        retry_after_s=BackendUnavailable.retry_after_s if retry_after_s is None else retry_after_s,
    )
