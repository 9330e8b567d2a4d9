"""FastAPI dependencies of the routes: the gateway's parts, and the authenticated caller with the required scope."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from backbone.bus.blobs import BlobStore
from backbone.store.documents import DocumentStore
from gateway.audit.entry import AuditEntry, entry_of
from gateway.audit.report import AuditReports
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
from gateway.inspector.inspector import Inspector
from gateway.jobs.api import JobsApi
from gateway.jobs.http_response import JobResponder
from gateway.jobs.search import JobSearch
from gateway.limits.budget_limiter import BudgetLimiter
from gateway.limits.followers import FollowerLimiter
from gateway.log_search import LogSearch
from gateway.metrics import MetricsExposition
from gateway.overview.hosts import HostDirectory
from gateway.overview.monitor import OverviewMonitor
from gateway.overview.public_status import PublicStatus
from gateway.overview.queue_page import QueueBrowser
from gateway.people.assembly import PeopleParts
from gateway.queue_holds import QueueHolds
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
    job_search: JobSearch
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
    audit: AuditReports
    inspector: Inspector
    log_search: LogSearch
    overview: OverviewMonitor
    holds: QueueHolds
    queues: QueueBrowser
    hosts: HostDirectory
    status: PublicStatus


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


def _require_audited(scope: Scope) -> Callable[[Request], Principal]:
    """Return the dependency of administrative routes, whose class is `AuditedRoute`."""

    def caller(request: Request) -> Principal:
        principal, entry = require_key(request), audit_entry(request)
        entry.identify(principal)
        principal.require(scope)
        entry.allow()
        return principal

    return caller


def require_key_manager(request: Request) -> Principal:
    """Authenticate a caller who may manage keys: any, or as a member those of the own team. Raises PermissionDenied."""
    principal, entry = require_key(request), audit_entry(request)
    entry.identify(principal)
    if principal.role not in {Role.MEMBER, Role.OPERATOR}:
        principal.require(Scope.ADMIN_KEYS)
    entry.allow()
    return principal


def require_usage_reader(request: Request) -> Principal:
    """Authenticate the caller of a route of usage. It is administrative for keys that may see other teams."""
    principal = require_key(request)
    if Scope.ADMIN_READ in principal.scopes:
        entry = audit_entry(request)
        entry.target = request.url.path.rpartition("/")[2]
        entry.identify(principal)
        entry.allow()
    return principal


def audit_entry(request: Request) -> AuditEntry:
    """Return what will be recorded of the request, to which its route may add."""
    return entry_of(request.scope)


PartsDep = Annotated[Parts, Depends(get_parts)]
Caller = Annotated[Principal, Depends(require_key)]
InferenceCaller = Annotated[Principal, Depends(_require(Scope.INFERENCE))]
JobsCaller = Annotated[Principal, Depends(_require(Scope.JOBS))]
AdminReader = Annotated[Principal, Depends(_require_audited(Scope.ADMIN_READ))]
Operator = Annotated[Principal, Depends(_require_audited(Scope.ADMIN_OPERATE))]
KeyAdmin = Annotated[Principal, Depends(_require_audited(Scope.ADMIN_KEYS))]
KeyManager = Annotated[Principal, Depends(require_key_manager)]
UsageReader = Annotated[Principal, Depends(require_usage_reader)]
AuditDep = Annotated[AuditEntry, Depends(audit_entry)]
