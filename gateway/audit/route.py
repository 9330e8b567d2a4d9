"""The class of administrative routes: each call of one is recorded. A route without an action's name cannot be made."""

from __future__ import annotations

import re
from asyncio import CancelledError
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.exceptions import HTTPException, RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute

from gateway.audit.actions import action_of
from gateway.audit.audit_log import AuditLog
from schemas.errors import NexusError

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

READS = "GET"
CLIENT_CLOSED = 499
"""The status where the caller disconnected before the answer."""
_PARAMETER = re.compile(r"\{(\w+)")


class AuditedRoute(APIRoute):
    """Records who called the route, on what, and with which result, before the answer is sent.

    The target is the path's parameter; the endpoint may say more to `AuditDep`. Its caller is identified by the dependency
    that requires an administrative scope.
    """

    def get_route_handler(self) -> Handler:
        """Return the route's handler, which records. Raises LookupError for a route without an action's name."""
        handle = super().get_route_handler()
        assert self.methods is not None
        [method] = self.methods
        action = action_of(method, self.path)
        parameter = _PARAMETER.search(self.path)
        name = parameter[1] if parameter is not None else ""

        async def handle_and_record(request: Request) -> Response:
            log: AuditLog | None = request.app.state.audit
            if log is None:
                return await handle(request)
            target = request.path_params.get(name, "")
            entry = log.open(action, request.scope, reads=method == READS, target=target)
            try:
                response = await handle(request)
            except BaseException as error:
                entry.end(*_answer_to(error))
                raise
            entry.end(response.status_code)
            return response

        return handle_and_record


def _answer_to(error: BaseException) -> tuple[int, str]:
    """Return the status and the error code of the answer that the application gives to an exception."""
    match error:
        case NexusError():
            return error.info.status, error.info.code or error.info.type
        case RequestValidationError():
            return 400, "invalid_request_error"
        case HTTPException():
            return error.status_code, "invalid_request_error"
        case CancelledError():
            return CLIENT_CLOSED, ""
    return 500, "internal_error"
