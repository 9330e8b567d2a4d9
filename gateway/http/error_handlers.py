"""Answer errors of the FastAPI applications with OpenAI's error object, with advice for wrong paths and methods."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from gateway.http.asgi import closes_connection, request_id_of
from schemas.endpoints import SERVED
from schemas.errors import ErrorInfo, InternalError, InvalidRequest, MethodNotAllowed, NexusError, NotFound

PREFIX = "/v1"
OPENAI_RESOURCES = frozenset({"batches", "files", "models", "responses", *(spec.path.split("/")[2] for spec in SERVED)})
"""First segments below `/v1`; with a base URL without `/v1`, they are the first segments of the path."""
OBSERVABILITY_PATHS = frozenset(("/docs", "/metrics", "/openapi.json"))
UNSUPPORTED_RESPONSE_PATH = re.compile(r"/v1/responses/(?!resp_)[^/]+")
"""Paths of OpenAI's other endpoints (`input_tokens`, `compact`), which no response's id matches."""


def answer_errors(app: FastAPI) -> None:
    """Answer every error of Nexus and of FastAPI with OpenAI's error object."""
    methods = AllowedMethods(app.routes)  # FastAPI names the methods of one route, and a path may have several

    @app.exception_handler(NexusError)
    async def nexus_error(_request: Request, error: NexusError) -> Response:
        return _error_response(error.info)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404 or UNSUPPORTED_RESPONSE_PATH.fullmatch(request.url.path):
            path = request.url.path
            return _error_response(
                NotFound(f"There is nothing at {request.method} {path[:200]}{path_hint(path)}.").info
            )
        if error.status_code == 405:
            path = request.url.path
            takes = ", ".join(sorted(methods.declared(path)))
            info = MethodNotAllowed(f"{path[:200]} does not accept {request.method}. It accepts {takes}.").info
            return _error_response(info, {**(error.headers or {}), "Allow": takes})
        return _error_response(
            ErrorInfo(status=error.status_code, type="invalid_request_error", code=None, message=str(error.detail))
        )

    @app.exception_handler(RequestValidationError)
    async def validation_error(_request: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        param = ".".join(str(part) for part in problem["loc"][1:]) or None
        where = f": '{param}'" if param else ""
        return _error_response(InvalidRequest(f"{problem['msg']}{where}", param=param).info)

    @app.exception_handler(Exception)
    async def unexpected_error(request: Request, _error: Exception) -> Response:
        return _error_response(InternalError(f"internal error; request id {request_id_of(request.scope)}").info)


def _error_response(info: ErrorInfo, headers: dict[str, str] | None = None) -> JSONResponse:
    extra = {"www-authenticate": "Bearer"} if info.status == 401 else {}
    if closes_connection(info):
        extra["connection"] = "close"
    return JSONResponse(info.body(), status_code=info.status, headers=info.headers() | extra | (headers or {}))


def path_hint(path: str) -> str:
    """Return advice to append to the message for an unknown path; empty if there is none."""
    if path.startswith(f"{PREFIX}{PREFIX}/"):
        return f": the base URL of the client ends in {PREFIX} twice, or the client adds {PREFIX} itself"
    if path.split("/")[1:2] and path.split("/")[1] in OPENAI_RESOURCES:
        return f": the base URL of the client must end in {PREFIX}"
    if path in OBSERVABILITY_PATHS:
        return " on this port: it is on OBSERVABILITY_PORT, and here too where PUBLIC_ROUTES names it"
    return ""


class AllowedMethods:
    """Knows the methods that each path of an application accepts."""

    def __init__(self, routes: Iterable[Any]) -> None:
        """`routes`: of a FastAPI application, including its routers."""
        self._exact: dict[str, set[str]] = {}
        self._patterns: list[tuple[re.Pattern[str], set[str]]] = []
        for route in _flat(routes):
            if "{" in route.path:
                self._patterns.append((route.path_regex, set(route.methods)))
            else:
                self._exact.setdefault(route.path, set()).update(route.methods)

    def declared(self, path: str) -> set[str]:
        """Return the methods of the routes at `path`, without HEAD and OPTIONS, which are implied."""
        methods = self._exact.get(path)
        if methods is None:
            methods = set().union(*(methods for pattern, methods in self._patterns if pattern.match(path)))
        return methods

    def allow_header(self, path: str) -> bytes:
        """Return the value of the header `Allow`; empty for an unknown path."""
        methods = self.declared(path)
        if not methods:
            return b""
        if "GET" in methods:
            methods = methods | {"HEAD"}
        return ", ".join(sorted(methods | {"OPTIONS"})).encode()


def _flat(routes: Iterable[Any]) -> Iterator[Any]:
    for route in routes:
        if (included := getattr(route, "original_router", None)) is not None:
            yield from _flat(included.routes)
        else:
            yield route
