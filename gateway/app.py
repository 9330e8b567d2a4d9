"""Build the FastAPI applications: the API beside its hot routes, and the observability port."""

from __future__ import annotations

import re

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from backbone.version import VERSION
from gateway.dependencies import Parts
from gateway.http.asgi import closes_connection, request_id_of
from gateway.http.path_hints import path_hint
from gateway.http.path_methods import AllowedMethods
from gateway.jobs.http_handler import PATH as SUBMIT
from gateway.landing_page import LandingPage
from gateway.openapi import ApiDocument
from gateway.routes import (
    aliases,
    batches,
    dead_letters,
    docs,
    files,
    jobs,
    keys,
    landing_page,
    models,
    operations,
    responses,
    results,
    services,
    voices,
)
from schemas.endpoints import ENDPOINTS
from schemas.errors import ErrorInfo, InternalError, InvalidRequest, MethodNotAllowed, NexusError, NotFound

NO_RESPONSE = re.compile(r"/v1/responses/(?!resp_)[^/]+")
"""Paths of OpenAI's other endpoints (`input_tokens`, `compact`), which no response's id matches."""
ROUTERS = [
    landing_page.router,
    operations.health_router,
    operations.router,
    models.router,
    voices.router,
    aliases.router,
    services.router,
    keys.router,
    jobs.router,
    dead_letters.router,
    files.router,
    batches.router,
    responses.router,
    results.router,
]


def make_app(
    parts: Parts, public: frozenset[str] = frozenset(), *, public_url: str = "", observability_port: int = 0
) -> FastAPI:
    """Build the API. Hot routes are only listed, for the OpenAPI document and for 405: `AsgiApp` serves them.

    `public`: names of `PUBLIC_ROUTES`. `observability_port`: the port of the documentation that the landing page names to readers
    on this machine; 0: none.
    """
    app = _bare_app("Nexus")
    app.state.parts = parts
    app.state.welcome = LandingPage(public_url, "docs" in public, observability_port)
    for router in ROUTERS:
        app.include_router(router)
    app.include_router(operations.readiness if "readiness" in public else operations.public_readiness)
    if "metrics" in public:
        app.include_router(operations.metrics_router)
    if "docs" in public:
        app.include_router(docs.router)
    _list_hot_routes(app)
    _answer_errors(app)
    app.state.document = ApiDocument(app.openapi)
    return app


def make_observability_app(parts: Parts, api: FastAPI, public_url: str, port: int) -> FastAPI:
    """Build the observability port's application: health, readiness, metrics, and the documentation of `api`, which is at `port`."""
    app = _bare_app("Nexus observability")
    app.state.parts = parts
    app.state.document = ApiDocument(api.openapi, beside=app.openapi, public_url=public_url, port=port)
    for router in (operations.health_router, operations.readiness, operations.metrics_router, docs.router):
        app.include_router(router)
    _answer_errors(app)
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
    """Stand in for a route that `AsgiApp` serves: FastAPI lists it, and answers 405 to other methods."""
    raise InternalError(f"{request.url.path} was not served by AsgiApp")


def _list_hot_routes(app: FastAPI) -> None:
    """Register the routes that `AsgiApp` serves."""
    hot = [*((endpoint.path, "POST") for endpoint in ENDPOINTS), (SUBMIT, "POST"), (SUBMIT + "/{job_id}", "GET")]
    for path, method in hot:
        app.add_api_route(path, served_by_asgi_app, methods=[method], tags=["inference"])


def _answer_errors(app: FastAPI) -> None:
    """Every error of ours and of the framework, as OpenAI's object."""
    methods = AllowedMethods(app.routes)  # the framework names those of one route, where a path may have several

    @app.exception_handler(NexusError)
    async def ours(_request: Request, error: NexusError) -> Response:
        return _json(error.info)

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404 or NO_RESPONSE.fullmatch(request.url.path):
            path = request.url.path
            return _json(NotFound(f"there is nothing at {request.method} {path[:200]}{path_hint(path)}").info)
        if error.status_code == 405:
            path = request.url.path
            takes = ", ".join(sorted(methods.declared(path)))
            info = MethodNotAllowed(f"{path[:200]} does not take {request.method}; it takes {takes}").info
            return _json(info, {**(error.headers or {}), "Allow": takes})
        return _json(
            ErrorInfo(status=error.status_code, type="invalid_request_error", code=None, message=str(error.detail))
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        param = ".".join(str(part) for part in problem["loc"][1:]) or None
        where = f": '{param}'" if param else ""
        return _json(InvalidRequest(f"{problem['msg']}{where}", param=param).info)

    @app.exception_handler(Exception)
    async def defect(request: Request, _error: Exception) -> Response:
        return _json(InternalError(f"internal error; request id {request_id_of(request.scope)}").info)


def _json(info: ErrorInfo, headers: dict[str, str] | None = None) -> JSONResponse:
    extra = {"www-authenticate": "Bearer"} if info.status == 401 else {}
    if closes_connection(info):
        extra["connection"] = "close"
    return JSONResponse(info.body(), status_code=info.status, headers=info.headers() | extra | (headers or {}))
