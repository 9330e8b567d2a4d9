"""Define every error that a caller can meet: OpenAI's error object, and the exceptions that carry it inside Nexus.

NexusError
├── InvalidRequest      400  the request is wrong, and never works
├── AuthenticationFailed 401
├── PermissionDenied    403
├── NotFound            404
│   └── ModelNotFound   404
├── MethodNotAllowed    405
├── RequestTimeout      408  the body did not arrive in time
├── RequestTooLarge     413
├── UnsupportedEncoding 415  the gateway cannot decode the body's Content-Encoding
├── HeadersTooLarge     431
├── QueueFull           429
├── RateLimited         429  the API key has reached its limit of open requests or running jobs
├── InsufficientQuota   429  a budget of the key or its team is used up
├── BackendFailed       502  the inference server broke the connection, sent an invalid answer, or failed
├── Unavailable         503  a part of Nexus or every worker for the model is away
│   └── BodyMemoryFull  503  the gateway had no memory for the body within the time limit
├── RequestLoop         508  the request has passed more Nexus gateways than this one allows
├── DeadlineExceeded    504  a time limit of Nexus was exceeded
└── InternalError       500  Nexus has a defect

The docstring of an exception is its default message.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from schemas.hops import HOPS_HEADER, LOOP_STATUS
from schemas.redaction import REDACTOR

WORKER_DRAINED = "worker_drained"
"""The error code of a job that a worker returns to the queue when it shuts down. The attempt does not count as failed."""
ACCEPTED_ENCODINGS = "gzip, deflate, zstd"
"""The Content-Encodings of request bodies that the gateway decodes."""


class ErrorInfo(BaseModel):
    """An error as it travels: on the reply subject, in a job record and, by `body()`, to the caller."""

    model_config = ConfigDict(frozen=True)

    status: int
    type: str
    code: str | None = None
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    """The number of seconds after which a retry makes sense. It becomes `Retry-After`."""
    should_retry: bool | None = None
    """Becomes `x-should-retry`, which OpenAI's SDKs obey before their own rules."""

    @property
    def public_message(self) -> str:
        """Return the message for callers, without internal addresses, host names and paths."""
        return REDACTOR.redact(self.message)

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object with the message for callers."""
        return {"error": {"message": self.public_message, "type": self.type, "param": self.param, "code": self.code}}

    def redacted(self) -> ErrorInfo:
        """Return the error without internal addresses, host names and paths."""
        message = self.public_message
        return self if message == self.message else self.model_copy(update={"message": message})

    def headers(self) -> dict[str, str]:
        """Return the response headers of this error."""
        out: dict[str, str] = {}
        if self.retry_after_s is not None:
            out["retry-after"] = str(max(1, round(self.retry_after_s)))
        if self.should_retry is not None:
            out["x-should-retry"] = "true" if self.should_retry else "false"
        if self.status == 415:
            out["accept-encoding"] = ACCEPTED_ENCODINGS
        if self.status == LOOP_STATUS:
            out[HOPS_HEADER] = "refused"
        return out


class NexusError(Exception):
    """The base of all errors that Nexus raises."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "internal_error"
    retry_after_s: ClassVar[float | None] = None
    should_retry: ClassVar[bool | None] = None

    def __init__(
        self,
        message: str | None = None,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
        info: ErrorInfo | None = None,
    ) -> None:
        text = message or (info.message if info else None) or (type(self).__doc__ or "").split("\n")[0]
        super().__init__(text)
        self.info = info or ErrorInfo(
            status=self.status,
            type=self.type,
            code=code or self.code,
            message=text,
            param=param,
            retry_after_s=self.retry_after_s if retry_after_s is None else retry_after_s,
            should_retry=self.should_retry if should_retry is None else should_retry,
        )

    @classmethod
    def from_info(cls, info: ErrorInfo) -> NexusError:
        """Return the exception for an error that was received."""
        return cls(info=info)


class InternalError(NexusError):
    """Nexus failed because of a defect. Report the request id: it finds the request in the logs."""


class InvalidRequest(NexusError):
    """The request is invalid. Correct it before you retry."""

    status = 400
    type = "invalid_request_error"
    code: ClassVar[str | None] = None


class AuthenticationFailed(NexusError):
    """The API key is missing or invalid. Send a valid key as 'Authorization: Bearer KEY'."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(NexusError):
    """The API key lacks the scope for this request. Use a key with the scope, or ask an operator for one."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFound(NexusError):
    """The resource does not exist, or it belongs to another owner."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """The model does not exist. GET /v1/models lists the models."""

    code = "model_not_found"


class MethodNotAllowed(NexusError):
    """This path does not support the method. The header Allow names the methods that it supports."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(NexusError):
    """The request's body did not arrive in time. Send the request again."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"
    should_retry = False


class RequestTooLarge(NexusError):
    """The request's body is too large. Send a smaller one."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedEncoding(NexusError):
    """The gateway does not support the request's Content-Encoding. Use one of gzip, deflate and zstd, or none."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_content_encoding"


class HeadersTooLarge(NexusError):
    """The request's headers are too large. Send fewer or shorter ones."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class QueueFull(NexusError):
    """The queue for this model is full. Retry shortly."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after_s = 2.0


class RateLimited(NexusError):
    """This API key has reached its limit of concurrent requests. Retry when one has ended."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry_after_s = 1.0


class InsufficientQuota(NexusError):
    """A budget of this API key or its team is used up. Wait until it renews, or ask the operator of this gateway to raise it."""

    status = 429
    type = "insufficient_quota"
    code = "insufficient_quota"
    should_retry = False


class BackendFailed(NexusError):
    """The inference server failed. Retry, or ask an operator to check the server."""

    status = 502
    type = "backend_error"
    code: ClassVar[str | None] = "backend_error"


class Unavailable(NexusError):
    """The service is unavailable. Retry shortly."""

    status = 503
    type = "server_error"
    code = "unavailable"
    retry_after_s = 5.0


class BodyMemoryFull(Unavailable):
    """The gateway's memory for request bodies is in use by other requests. Retry shortly."""

    code = "body_memory_full"
    retry_after_s = 2.0


class RequestLoop(NexusError):
    """The request comes from a worker of a Nexus, and its jobs would go round in circles. Give that worker the URL of the inference server itself. If one Nexus shall use another, set GATEWAY_MAX_HOPS on this one."""

    status = 508
    type = "invalid_request_error"
    code = "request_loop"
    should_retry = False


class DeadlineExceeded(NexusError):
    """A time limit of the request was exceeded."""

    status = 504
    type = "timeout_error"
    code = "timeout"
    should_retry = False
