"""FastAPI dependencies of the routes: the gateway's parts, and the authenticated caller with the required scope."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from backbone.bus.blobs import BlobStore
from backbone.store.documents import DocumentStore
from gateway.auth.authenticator import Authenticator, Principal
from gateway.auth.key_store import KeyStore
from gateway.auth.team_store import TeamStore
from gateway.batches.key_work import KeyWork
from gateway.batches.service import BatchService
from gateway.cached_result import CachedResult
from gateway.dispatcher import Dispatcher
from gateway.files import FileStore
from gateway.health import Readiness
from gateway.http.disconnect import CallerTasks
from gateway.http.inference_body import InferenceBodyReader
from gateway.jobs.api import JobsApi
from gateway.jobs.http_response import JobResponder
from gateway.limits.budget_limiter import BudgetLimiter
from gateway.limits.followers import FollowerLimiter
from gateway.metrics import MetricsExposition
from gateway.people.assembly import PeopleParts
from gateway.responses.service import ResponseService
from gateway.signed_urls import UrlSigner
from gateway.sync.handler import InferenceHandler
from gateway.usage.report import UsageReports
from schemas.keys import Scope
from schemas.people import Role


@dataclass(frozen=True, slots=True)
class Parts:
    """The gateway's parts that routes use, built once per process."""

    dispatcher: Dispatcher
    inference: InferenceHandler
    auth: Authenticator
    readiness: CachedResult[Readiness]
    blobs: BlobStore
    url_signer: UrlSigner
    exposition: MetricsExposition
    keys: KeyStore
    teams: TeamStore
    key_work: KeyWork
    jobs: JobsApi
    job_responder: JobResponder
    documents: DocumentStore
    caller_tasks: CallerTasks
    reader: InferenceBodyReader
    """Reader of requests that become durable jobs: its blobs last as long as the jobs."""
    files: FileStore
    batches: BatchService
    responses: ResponseService
    usage: UsageReports
    followers: FollowerLimiter
    people: PeopleParts
    budgets: BudgetLimiter
    check_webhook: Callable[[str], None]
    """Raises InvalidRequest for a URL that no webhook can be sent to."""


def get_parts(request: Request) -> Parts:
    """Return the parts of the running gateway."""
    parts: Parts = request.app.state.parts
    return parts


def require_key(request: Request) -> Principal:
    """Authenticate the caller. Raises AuthenticationFailed."""
    return get_parts(request).auth.authenticate(request.scope)


def _require(scope: Scope) -> Callable[[Request], Principal]:
    def caller(request: Request) -> Principal:
        principal = require_key(request)
        principal.require(scope)
        return principal

    return caller


def require_key_manager(request: Request) -> Principal:
    """Authenticate a caller who may manage keys: any, or as a member those of the own team. Raises PermissionDenied."""
    principal = require_key(request)
    if principal.role not in {Role.MEMBER, Role.OPERATOR}:
        principal.require(Scope.ADMIN_KEYS)
    return principal


PartsDep = Annotated[Parts, Depends(get_parts)]
Caller = Annotated[Principal, Depends(require_key)]
InferenceCaller = Annotated[Principal, Depends(_require(Scope.INFERENCE))]
JobsCaller = Annotated[Principal, Depends(_require(Scope.JOBS))]
AdminReader = Annotated[Principal, Depends(_require(Scope.ADMIN_READ))]
Operator = Annotated[Principal, Depends(_require(Scope.ADMIN_OPERATE))]
KeyAdmin = Annotated[Principal, Depends(_require(Scope.ADMIN_KEYS))]
KeyManager = Annotated[Principal, Depends(require_key_manager)]
