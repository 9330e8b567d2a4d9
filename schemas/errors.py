"""Every error a caller can meet, as OpenAI's error object, and the exceptions that carry it inside Nexus.

NexusError
├── InvalidRequest      400  the request is wrong; the same request never works
├── AuthenticationFailed 401
├── PermissionDenied    403
├── NotFound            404
├── MethodNotAllowed    405
├── RequestTimeout      408  the body did not arrive in time
├── RequestTooLarge     413
├── UnsupportedEncoding 415  the body's Content-Encoding is none that the gateway decodes
├── HeadersTooLarge     431
├── QueueFull           429
├── RateLimited         429  this key has as much under way as it may have
├── BackendFailed       502  an inference server dropped, answered nonsense, or failed
├── Unavailable         503  nobody can serve this now; later may work
│   └── BodyMemoryFull  503  the request's body found no memory within the time limit
├── RequestLoop         508  it came through more Nexus gateways than this one allows
├── DeadlineExceeded    504  a time limit of Nexus ran out
└── InternalError       500  a defect in Nexus
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from schemas.hops import HOPS_HEADER, LOOP_STATUS
from schemas.redaction import REDACTOR

WORKER_DRAINED = "worker_drained"
"""Code of a job handed back by a worker that shuts down: it has not failed."""
ACCEPTED_ENCODINGS = "gzip, deflate, zstd"
"""Content-Encodings of request bodies that the gateway decodes."""


class ErrorInfo(BaseModel):
    """An error as it travels: on the reply subject, in a job record and, by `body()`, to the caller."""

    model_config = ConfigDict(frozen=True)

    status: int
    type: str
    code: str | None = None
    message: str
    param: str | None = None
    retry_after_s: float | None = None
    """Seconds after which trying again makes sense; becomes `Retry-After`."""
    should_retry: bool | None = None
    """Becomes `x-should-retry`, which OpenAI's SDKs obey above their own rules."""

    @property
    def public_message(self) -> str:
        """The message as callers may read it: without addresses, host names and paths of the inside."""
        return REDACTOR.redact(self.message)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object, as callers may read it."""
        return {"error": {"message": self.public_message, "type": self.type, "param": self.param, "code": self.code}}

    def redacted(self) -> ErrorInfo:
        """The same without addresses, host names and paths of the inside."""
        message = self.public_message
        return self if message == self.message else self.model_copy(update={"message": message})

    def headers(self) -> dict[str, str]:
        """The response headers that go with this error."""
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
    """Something went wrong inside Nexus."""

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
        """The exception for an error that arrived over the wire."""
        return cls(info=info)


class InternalError(NexusError):
    """An internal error of Nexus; the request id helps to find it in the logs."""


class InvalidRequest(NexusError):
    """The request is not valid."""

    status = 400
    type = "invalid_request_error"
    code: ClassVar[str | None] = None


class AuthenticationFailed(NexusError):
    """No valid API key was given. Send it as 'Authorization: Bearer KEY'."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(NexusError):
    """This API key may not do that."""

    status = 403
    type = "permission_error"
    code = "permission_denied"


class NotFound(NexusError):
    """There is nothing here."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    """The model does not exist."""

    code = "model_not_found"


class MethodNotAllowed(NexusError):
    """This path does not take that method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeout(NexusError):
    """The request's body did not arrive in time."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"
    should_retry = False


class RequestTooLarge(NexusError):
    """The request's body is too large."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedEncoding(NexusError):
    """The request's Content-Encoding is not supported."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_content_encoding"


class HeadersTooLarge(NexusError):
    """The request's headers are too large."""

    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class QueueFull(NexusError):
    """The queue for this model is full; try again shortly."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retry_after_s = 2.0


class RateLimited(NexusError):
    """This API key has as many requests under way as it may have; try again when one has ended."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry_after_s = 1.0


class BackendFailed(NexusError):
    """The inference server failed."""

    status = 502
    type = "backend_error"
    code: ClassVar[str | None] = "backend_error"


class Unavailable(NexusError):
    """This cannot be served right now; try again shortly."""

    status = 503
    type = "server_error"
    code = "unavailable"
    retry_after_s = 5.0


class BodyMemoryFull(Unavailable):
    """The gateway's memory for request bodies is in use by other requests; send this request again shortly."""

    code = "body_memory_full"
    retry_after_s = 2.0


class RequestLoop(NexusError):
    """The request comes from a worker of a Nexus, whose jobs would go round in circles. Give that worker the URL of the inference server itself; for a Nexus behind another one, set GATEWAY_MAX_HOPS on this one."""

    status = 508
    type = "invalid_request_error"
    code = "request_loop"
    should_retry = False


class DeadlineExceeded(NexusError):
    """A time limit ran out."""

    status = 504
    type = "timeout_error"
    code = "timeout"
    should_retry = False
