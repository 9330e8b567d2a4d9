"""Build the FastAPI applications: the API beside its hot routes, and the observability port."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI, Request
from fastapi.responses import Response

from backbone.version import VERSION
from gateway.audit.audit_log import AuditLog
from gateway.audit.model_jobs import AuditedModelJobs
from gateway.console.files import ConsoleFiles
from gateway.dependencies import Parts
from gateway.dialects.anthropic.endpoint import COUNT_PATH, MESSAGES_PATH
from gateway.http.error_handlers import answer_errors
from gateway.jobs.http_handler import PATH as SUBMIT
from gateway.landing_page import LandingPage
from gateway.openapi import ApiDocument
from gateway.routes import (
    aliases,
    audit,
    batches,
    budgets,
    catalog,
    console,
    dead_letters,
    docs,
    files,
    hosts,
    inspector,
    jobs,
    keys,
    landing_page,
    logs,
    message_batches,
    models,
    operations,
    organization,
    overview,
    people,
    queues,
    responses,
    results,
    services,
    sign_in,
    team_jobs,
    teams,
    usage,
    voices,
)
from schemas.endpoints import ENDPOINTS, SERVED
from schemas.errors import InternalError

ROUTERS = [
    landing_page.router,
    console.router,
    operations.health_router,
    operations.router,
    overview.router,
    hosts.router,
    queues.router,
    models.router,
    catalog.router,
    voices.router,
    aliases.router,
    services.router,
    keys.router,
    teams.router,
    team_jobs.router,
    sign_in.pages_router,
    sign_in.router,
    sign_in.links_router,
    people.router,
    jobs.router,
    dead_letters.router,
    files.router,
    batches.router,
    responses.router,
    message_batches.router,
    results.router,
    usage.router,
    budgets.router,
    organization.router,
    audit.router,
    logs.router,
    inspector.own_router,
    inspector.router,
]

DIALECT_PATHS = (MESSAGES_PATH, COUNT_PATH)
"""The paths of `POST` requests that a dialect serves before FastAPI."""


def make_app(
    parts: Parts,
    public: frozenset[str] = frozenset(),
    *,
    public_url: str = "",
    observability_port: int = 0,
    audit_log: AuditLog | None = None,
    model_jobs: AuditedModelJobs | None = None,
) -> FastAPI:
    """Build the API. Hot routes are only listed, for the OpenAPI document and for 405: `AsgiApp` serves them.

    `public`: names of `PUBLIC_ROUTES`. `observability_port`: the port of the documentation that the landing page names to readers
    on this machine; 0: none. `audit_log`: records the calls of administrative routes; None: nothing does. `model_jobs`: serves the
    endpoints that need an administrative scope; None: `AsgiApp` does.
    """
    app = _bare_app("Nexus")
    app.state.parts = parts
    app.state.audit = audit_log
    app.state.console = ConsoleFiles()
    app.state.landing_page = LandingPage(public_url, "docs" in public, observability_port)
    for router in ROUTERS:
        app.include_router(router)
    app.include_router(operations.readiness if "readiness" in public else operations.public_readiness)
    if "metrics" in public:
        app.include_router(operations.metrics_router)
    if "status" in public:
        app.include_router(overview.status_router)
    if "docs" in public:
        app.include_router(docs.router)
    _list_hot_routes(app, model_jobs)
    answer_errors(app)
    app.state.document = ApiDocument(app.openapi)
    return app


def make_observability_app(parts: Parts, api: FastAPI, public_url: str, port: int) -> FastAPI:
    """Build the observability port's application: health, readiness, metrics, and the documentation of `api`, which is at `port`."""
    app = _bare_app("Nexus observability")
    app.state.parts = parts
    app.state.document = ApiDocument(api.openapi, beside=app.openapi, public_url=public_url, port=port)
    for router in (operations.health_router, operations.readiness, operations.metrics_router, docs.router):
        app.include_router(router)
    answer_errors(app)
    return app


def _bare_app(title: str) -> FastAPI:
    return FastAPI(
        title=title,
        version=VERSION,
        summary="One OpenAI-compatible gateway in front of every AI server a team owns.",
        redirect_slashes=False,  # many clients take the redirect of a POST for an empty answer
        docs_url=None,  # FastAPI's page loads scripts from another host
        redoc_url=None,
        openapi_url=None,
    )


async def served_by_asgi_app(request: Request) -> Response:
    """Stand in for a route that is served before FastAPI, which lists it, and answers 405 to other methods."""
    raise InternalError(f"{request.url.path} was not served by AsgiApp")


def _list_hot_routes(app: FastAPI, model_jobs: AuditedModelJobs | None) -> None:
    """Register the routes that `AsgiApp` serves, and those that `model_jobs` serves."""
    hot: dict[tuple[str, str], Callable[[Request], Awaitable[Response]]] = {
        (endpoint.path, "POST"): served_by_asgi_app for endpoint in ENDPOINTS
    }
    if model_jobs is not None:
        hot |= {(endpoint.path, "POST"): model_jobs.route(endpoint) for endpoint in ENDPOINTS if endpoint not in SERVED}
    hot |= {(path, "POST"): served_by_asgi_app for path in DIALECT_PATHS}
    hot |= {(SUBMIT, "POST"): served_by_asgi_app, (SUBMIT + "/{job_id}", "GET"): served_by_asgi_app}
    for (path, method), serve in hot.items():
        app.add_api_route(path, serve, methods=[method], tags=["inference"])
