"""The seam between synchronous requests and durable jobs: an inference request that its caller wants as a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from backbone.tracing.spans import Span
from gateway.auth.authenticator import Principal
from gateway.http.asgi import HttpExchange, Receive, Reply, Scope
from gateway.http.inference_body import InferenceBodyReader, ReceivedRequest
from gateway.http.preferences import DeliveryPreferences
from schemas.endpoints import EndpointSpec
from schemas.errors import ErrorInfo


@dataclass(frozen=True, slots=True)
class DurableRequest:
    """An inference request, read and checked, whose delivery preferences make it a durable job."""

    principal: Principal
    endpoint: EndpointSpec
    received: ReceivedRequest
    preferences: DeliveryPreferences
    scope: Scope
    receive: Receive
    reply: Reply
    exchange: HttpExchange | None
    span: Span | None = None
    """The span of the request; None: tracing is off."""


class DurableAnswerer(Protocol):
    """Answers inference requests as durable jobs; `gateway.jobs` implements it, `gateway.sync` calls it."""

    @property
    def reader(self) -> InferenceBodyReader:
        """Reads bodies whose blobs last as long as a job may."""

    async def answer(self, request: DurableRequest) -> ErrorInfo | None:
        """Submit the job and answer the request. Returns the error that was sent as the answer.

        The job goes on after the caller has disconnected. Raises NexusError, and CallerDisconnected.
        """
