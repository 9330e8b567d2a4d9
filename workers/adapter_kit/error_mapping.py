"""An OpenAI-compatible server's error answer, as a `BackendError`. Pure.

| server's answer | error |
|---|---|
| 400, 409, 413, 415, 422, other 4xx | BackendRefused, 400 (413 kept): the caller's request is wrong |
| 404 about a model | ModelNotServed |
| 404, 405 otherwise; 501 | BackendRefused: this server cannot do that |
| any status but 429 and 503, about more tokens than the model takes | BackendRefused, 400 `context_length_exceeded` |
| 403 about the caller's input | BackendRefused, 400 `content_policy_violation` |
| 401, 403 | BackendError: the worker's key for the server is wrong; the server's message might quote the key and is dropped |
| 400 with the code `model_not_found` | ModelNotServed |
| 408, 424, 425, 499, other 5xx | BackendError, transient |
| 402, or 429 about a quota that is used up | BackendRefused, 429: no retry can succeed |
| 429, 503, 529 | BackendUnavailable, 429 with the server's code, or 503. With `Retry-After`, or while the server loads the model, the worker pauses the model for that time |
| 500 whose message blames the request | BackendRefused: llama-server answers so |
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
from workers.adapter_kit import error_texts
from workers.backends.base import BackendError, BackendRefused, BackendUnavailable, ModelNotServed

MESSAGE_LIMIT = 2000
MAX_WAIT_S = 3600.0
MAX_ESTIMATE_S = 60.0
LOADING_PAUSE_S = 2.0
"""The pause for a server that loads the model and does not say how long that takes."""
LOADING = re.compile(r"\bloading\b|not (?:yet )?(?:loaded|ready)|starting up|warming up|initiali[sz]ing", re.IGNORECASE)
"""Messages about a model that is being loaded: llama.cpp's `Loading model`, Hugging Face's `Model … is currently loading`, and similar."""
KEPT_STATUSES = frozenset({413})
BAD_REQUEST = re.compile(
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
"""Messages about an input that does not fit: llama.cpp, vLLM, SGLang, TGI, TEI, Ollama, LM Studio, Mistral, Jina, Voyage, Anthropic, Gemini, OpenAI."""
STRING_TOO_LONG = frozenset({"string_too_long", "value_error.any_str.max_length"})
"""The error types of pydantic 2 and 1 for a text that is too long: Infinity limits characters."""
INPUTS = ("input", "inputs", "prompt", "query", "documents", "texts")
"""Fields that hold the model's input."""
UNSUPPORTED_ENDPOINT = "unsupported_endpoint"
CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
FLAGGED = re.compile(
    r"content[ _](?:policy|filter|management)|moderation|\bflagged\b|safety (?:system|policy|filter)|responsible ai",
    re.IGNORECASE,
)
"""Messages about an input that a server's content policy rejects."""
QUOTA_CODES = frozenset({
    "insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_credits",
    "insufficient_balance", "insufficient_balance_error",
})  # fmt: skip
"""Codes of a 429 for which no retry can succeed."""
MODEL_CODES = frozenset({"model_not_found", "DeploymentNotFound"})
"""Codes for a model that does not exist: OpenAI's and Azure's."""
BUSY_STATUSES = frozenset({429, 503, 529})
TRANSIENT_STATUSES = frozenset({408, 424, 425, 499})
"""Transient errors below 500: TGI's 424 for a generation that failed, a proxy's 499."""
ERROR_FIELDS = ("error", "detail", "errors", "base_resp")
MESSAGE_FIELDS = ("message", "msg", "error_message", "error_msg", "status_msg", "details", "description")
NUMBER_FIELDS = (
    "code",
    "status_code",
    "statusCode",
    "status",
    "error_code",
    "http_status",
    "http_status_code",
    "http_code",
)
ERROR_ONLY_FIELDS = ("detail", "errors", "error_message", "error_msg", "error_code")
"""Fields that only an error has."""
STANDARD_CODES = {"exceed_context_size_error": CONTEXT_LENGTH_EXCEEDED, "tokens_limit_reached": CONTEXT_LENGTH_EXCEEDED}
"""Servers' own codes, by the code that OpenAI uses."""


@dataclass(frozen=True, slots=True)
class ServerErrorBody:
    """A server's error object, read from any of the usual forms."""

    message: str = ""
    type: str = ""
    param: str | None = None
    code: str | None = None
    number: int = 0
    """`code`, where it is an HTTP status."""
    estimated_s: float = 0.0
    """The server's estimate of the time that loading the model takes."""
    retry_s: float | None = None
    """The time to wait, where the object holds one."""

    @property
    def blames_request(self) -> bool:
        """Whether the same request can never succeed."""
        if self.type in ("invalid_request_error", "not_supported_error", *STANDARD_CODES) or self.type.startswith(
            "BadRequest"
        ):
            return True
        return 400 <= self.number < 500 or bool(BAD_REQUEST.search(self.message))

    @property
    def is_too_long(self) -> bool:
        """Whether the request holds more tokens than the model takes."""
        if self.code == CONTEXT_LENGTH_EXCEEDED:
            return True
        matches = bool(TOO_LONG.search(self.message)) or error_texts.is_too_long(self.message)
        return matches and not error_texts.is_throttled(self.message)

    @property
    def is_flagged(self) -> bool:
        """Whether the server's content policy rejects the input."""
        words = (self.message, self.type, self.code or "")
        return any(bool(FLAGGED.search(text) or error_texts.FLAGGED.search(text)) for text in words)

    @property
    def blames_model(self) -> bool:
        """Whether the model does not exist."""
        return self.code in MODEL_CODES or self.param == "model" or "model" in self.message.lower()


def is_error_body(value: Any) -> bool:
    """Return whether JSON that came with status 200, in a stream or in one piece, is an error."""
    if isinstance(value, list):
        return any(isinstance(one, dict) and is_error_body(one) for one in value)
    if not isinstance(value, dict):
        return False
    if value.get("error") or value.get("object") == "error" or value.get("type") == "error":
        return True
    if isinstance(value.get("choices"), list):
        return False
    result = value.get("base_resp")
    if isinstance(result, dict) and result.get("status_code"):
        return True
    if any(value.get(name) for name in ERROR_ONLY_FIELDS) or value.get("success") is False:
        return True
    has_message = any(isinstance(value.get(name), str) and value[name] for name in MESSAGE_FIELDS)
    return has_message and (_error_number(value) >= 400 or isinstance(value.get("code"), str))


def parse_error_body(value: Any) -> ServerErrorBody:
    """Parse a server's error object.

    Its forms: `{"error": {…}}`, `{"error": "…"}`, `{"detail": …}` (FastAPI), `{"object": "error", …}` (older vLLM), the inner object,
    `[{"error": {…}}]` (Gemini), `{"base_resp": {…}}` (MiniMax), `{"error_code": …, "error_msg": …}` (Baidu).
    """
    if isinstance(value, dict):
        for key in ERROR_FIELDS:
            if value.get(key) and not _says_less_than_message(value, key):
                inner = parse_error_body(value[key])
                number = inner.number or _error_number(value)
                return replace(inner, number=number, estimated_s=_parse_estimate(value.get("estimated_time")))
        return _from_object(value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return _from_validation(value[0]) if "msg" in value[0] else parse_error_body(value[0])
    return ServerErrorBody(str(value)[:MESSAGE_LIMIT]) if value else ServerErrorBody()


def _says_less_than_message(value: dict[str, Any], key: str) -> bool:
    """Return whether `message` beside `key` says more: Spring's and Nest's `{"status": 400, "error": "Bad Request", "message": "…"}`."""
    short, message = value[key], value.get("message")
    if key == "detail":
        return bool(message)
    return isinstance(short, str) and isinstance(message, str) and len(message) > len(short)


def _from_object(value: dict[str, Any]) -> ServerErrorBody:
    if isinstance(value.get("message"), dict | list):  # Mistral: FastAPI's validation error inside its own
        return parse_error_body(value["message"])
    code = value.get("code")
    number = _error_number(value)
    kind = str(value.get("type") or "")
    param = value.get("param")
    message = next(
        (value[name] for name in MESSAGE_FIELDS if value.get(name) and not isinstance(value[name], list)), ""
    )
    return ServerErrorBody(
        message=str(message)[:MESSAGE_LIMIT],
        type=kind,
        param=param if isinstance(param, str) else None,
        code=STANDARD_CODES.get(kind)
        or STANDARD_CODES.get(str(code))
        or (code if isinstance(code, str) and code and not code.isdecimal() else None),
        number=number,
        retry_s=_parse_retry_info(value.get("details")),
    )


def _error_number(value: dict[str, Any]) -> int:
    """Return an error object's number, an HTTP status or one of the server's own; 0 where it has none."""
    for name in NUMBER_FIELDS:
        number = value.get(name)
        if isinstance(number, str) and number.isdecimal() and len(number) < 10:
            number = int(number)
        if isinstance(number, int) and number:
            return number
    return 0


def _parse_retry_info(details: Any) -> float | None:
    """Read Google's `{"@type": "…RetryInfo", "retryDelay": "17s"}`."""
    for one in details if isinstance(details, list) else ():
        delay = one.get("retryDelay") if isinstance(one, dict) else None
        if isinstance(delay, str):
            return parse_retry_after(delay.removesuffix("s"))
    return None


def _parse_estimate(value: Any) -> float:
    """Read `estimated_time` of Hugging Face's servers."""
    return min(float(value), MAX_ESTIMATE_S) if isinstance(value, int | float) and value > 0 else 0.0


def _from_validation(value: dict[str, Any]) -> ServerErrorBody:
    """Read FastAPI's `{"loc": ["body", "messages"], "msg": "…"}`."""
    place = ".".join(str(part) for part in value.get("loc", ()) if part != "body")
    text = str(value.get("msg") or "")[:MESSAGE_LIMIT]
    is_too_long = str(value.get("type")) in STRING_TOO_LONG and place.split(".", 1)[0] in INPUTS
    code = CONTEXT_LENGTH_EXCEEDED if is_too_long else None
    return ServerErrorBody(f"{place}: {text}" if place else text, "invalid_request_error", place or None, code)


def error_from_response(status: int, headers: Mapping[str, str], body: bytes) -> BackendError:
    """Return the error for a response whose status is not 200."""
    return _map_error(status, headers, _read_body(body))


def error_from_payload(value: Any) -> BackendError:
    """Return the error for an error object that came with status 200, inside a stream or in one piece."""
    error = parse_error_body(value)
    if error.is_too_long:
        return _request_error(400, replace(error, code=CONTEXT_LENGTH_EXCEEDED))
    status = error.number if 400 <= error.number < 600 else 0
    status = status or error_texts.status_for(error.type, error.code or "")
    if error.is_flagged and status < 500:
        return _request_error(400, error, "content_policy_violation")
    if status == 404 and not error.blames_model:
        status = 400
    if status in (0, 500) and error.blames_request:
        status = 400
    if not error.message:
        error = replace(error, message="the backend reported an error without a message")
    return _map_error(status or 500, {}, error)


def _map_error(status: int, headers: Mapping[str, str], error: ServerErrorBody) -> BackendError:
    if status not in (401, 402, *BUSY_STATUSES) and error.is_too_long:
        return _request_error(400, replace(error, code=CONTEXT_LENGTH_EXCEEDED))
    if status in (400, 403) and error.is_flagged:
        return _request_error(400, error, "content_policy_violation")
    if status == 402 or (status == 429 and (error.code in QUOTA_CODES or error.type in QUOTA_CODES)):
        return _request_error(429, error, error.type if error.type in QUOTA_CODES else "insufficient_quota")
    if status in (401, 403):
        return BackendError(f"the backend refused the worker's key ({status})", should_retry=False)
    if status in BUSY_STATUSES:
        return _busy_error(status, headers, error)
    if status == 404 or (status == 400 and error.code in MODEL_CODES):
        return _not_found_error(error)
    if status in TRANSIENT_STATUSES or status >= 500:
        if status == 501 or (status == 500 and error.blames_request):
            return _request_error(400, error)
        return BackendError(_message(status, error), transient=True)
    if status >= 400:
        return _request_error(status if status in KEPT_STATUSES else 400, error)
    return BackendError(f"the backend answered {status}")


def _busy_error(status: int, headers: Mapping[str, str], error: ServerErrorBody) -> BackendUnavailable:
    text = error.message or f"the backend is busy ({status})"
    wait_s = _requested_wait_s(headers, error)
    if wait_s is None and status == 503 and LOADING.search(text):
        wait_s = error.estimated_s or LOADING_PAUSE_S
    info = _rate_limit_info(text, error, wait_s) if status == 429 else None
    return BackendUnavailable(text, retry_after_s=wait_s, pause_s=wait_s, info=info)


def _requested_wait_s(headers: Mapping[str, str], error: ServerErrorBody) -> float | None:
    """Return how long the server asks to wait: `retry-after-ms` (Azure), `Retry-After`, or the error object's own time."""
    milliseconds = parse_retry_after(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    wait_s = parse_retry_after(headers.get("retry-after"), headers.get("date"))
    return error.retry_s if wait_s is None else wait_s


def parse_retry_after(value: str | None, date: str | None = None) -> float | None:
    """Return the seconds of a `Retry-After` header, between 0 and `MAX_WAIT_S`; None where it holds neither seconds nor a date.

    A date is compared with the response's own `Date`, since the server's clock may differ.
    """
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        at, now = _parse_date(value), _parse_date(date) or datetime.now(UTC)
        if at is None:
            return None
        seconds = (at - now).total_seconds()
    return None if seconds != seconds else max(0.0, min(seconds, MAX_WAIT_S))  # noqa: PLR0124


def _parse_date(text: str | None) -> datetime | None:
    try:
        at = parsedate_to_datetime(text or "")
    except (ValueError, OverflowError):
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _read_body(body: bytes) -> ServerErrorBody:
    try:
        return parse_error_body(orjson.loads(body))
    except orjson.JSONDecodeError:
        text = body.decode("utf-8", "replace").strip()
        return ServerErrorBody() if text.startswith("<") else ServerErrorBody(text[:MESSAGE_LIMIT])


def _message(status: int, error: ServerErrorBody) -> str:
    return error.message or f"the backend answered {status}"


def _not_found_error(error: ServerErrorBody) -> BackendError:
    if error.blames_model:
        return ModelNotServed(error.message, param="model")
    return _request_error(404, ServerErrorBody("the backend has no such endpoint", code=UNSUPPORTED_ENDPOINT))


def _request_error(status: int, error: ServerErrorBody, code: str | None = None) -> BackendError:
    """Return the error for a request that is wrong. `code`: the code where the server gives none."""
    message = error.message or f"the backend refused the request ({status})"
    info = ErrorInfo(
        status=status,
        type="invalid_request_error" if status != 429 else error.type or "rate_limit_error",
        code=error.code or code or None,
        message=message,
        param=error.param,
        should_retry=False if status == 429 else None,
    )
    return BackendRefused(message, info=info)


def _rate_limit_info(message: str, error: ServerErrorBody, retry_after_s: float | None) -> ErrorInfo:
    return ErrorInfo(
        status=429,
        type=error.type or "rate_limit_error",
        code=error.code or "rate_limit_exceeded",
        message=message,
        retry_after_s=BackendUnavailable.retry_after_s if retry_after_s is None else retry_after_s,
    )
