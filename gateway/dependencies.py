"""What routes are given: FastAPI dependencies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from backbone.bus.blobs import BlobStore
from backbone.store.documents import DocumentStore
from gateway.auth.authenticator import Auth, Principal
from gateway.auth.key_store import KeyRing
from gateway.batches.service import BatchService
from gateway.cached_result import SharedResult
from gateway.dispatcher import Dispatcher
from gateway.files import Files
from gateway.health import Readiness
from gateway.http.disconnect import Waiting
from gateway.http.inference_body import Reader
from gateway.jobs.api import Jobs
from gateway.jobs.http_response import JobResponder
from gateway.metrics_text import Exposition
from gateway.responses.service import ResponseService
from gateway.signed_urls import Links
from gateway.sync.handler import Inference
from schemas.keys import Scope


@dataclass(frozen=True, slots=True)
class Parts:
    """The gateway's parts, made once per process."""

    dispatcher: Dispatcher
    inference: Inference
    auth: Auth
    readiness: SharedResult[Readiness]
    blobs: BlobStore
    links: Links
    exposition: Exposition
    keys: KeyRing
    jobs: Jobs
    job_responder: JobResponder
    documents: DocumentStore
    waiting: Waiting
    reader: Reader
    """For requests that become durable jobs: its blobs last as long as those."""
    files: Files
    batches: BatchService
    responses: ResponseService


def get_parts(request: Request) -> Parts:
    """The parts of the running gateway."""
    parts: Parts = request.app.state.parts
    return parts


def require_key(request: Request) -> Principal:
    """The caller. Raises AuthenticationFailed."""
    return get_parts(request).auth.check(request.scope)


def _require(scope: Scope) -> Callable[[Request], Principal]:
    def caller(request: Request) -> Principal:
        principal = require_key(request)
        principal.require(scope)
        return principal

    return caller


PartsDep = Annotated[Parts, Depends(get_parts)]
Caller = Annotated[Principal, Depends(require_key)]
InferenceCaller = Annotated[Principal, Depends(_require(Scope.INFERENCE))]
JobsCaller = Annotated[Principal, Depends(_require(Scope.JOBS))]
AdminCaller = Annotated[Principal, Depends(_require(Scope.ADMIN))]
